"""Which module calls make up a program, and which of them are the same layer."""
