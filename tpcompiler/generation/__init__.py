"""Text from a trained model: prompts in, tokens out, on the ranks of a spec."""
