"""Parallelized modules in other people's training loops: clipping, and state that torch's checkpoints take."""
