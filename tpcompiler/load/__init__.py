"""Finds the model that MODEL names on the command line: in a Python file, or of Hugging Face."""
