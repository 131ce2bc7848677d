"""The names of variables, sizes and attributes."""
