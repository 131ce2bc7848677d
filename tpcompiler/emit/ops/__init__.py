"""What a graph node stands for, and how one ATen call is written by hand."""
