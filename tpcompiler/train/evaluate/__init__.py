"""Perplexity and cloze accuracy."""
