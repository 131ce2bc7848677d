"""Expressions and statements as lines of text."""
