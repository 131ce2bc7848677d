"""What is known of each op: one record a line, in a notation of its own."""
