"""MODEL on the command line: a file, a class, a Hugging Face directory or type."""
