"""The module calls that a program consists of, which of them are equal, and what becomes a loop."""
