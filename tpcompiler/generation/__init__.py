"""Generates text with a trained model, on the ranks of a spec: prompts in, tokens out."""
