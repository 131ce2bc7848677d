"""What values, sizes and attributes are called."""
