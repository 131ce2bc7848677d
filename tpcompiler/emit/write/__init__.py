"""Functions, constructors, classes and the whole file."""
