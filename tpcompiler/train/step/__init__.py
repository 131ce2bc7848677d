"""One training step: forward and backward over micro-batches, recomputation, recorded CUDA graphs."""
