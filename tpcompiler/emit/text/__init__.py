"""Pieces of Python as text: expressions, subscripts, line breaks and comments."""
