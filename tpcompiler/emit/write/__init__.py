"""The file: classes, constructors, forwards, the header."""
