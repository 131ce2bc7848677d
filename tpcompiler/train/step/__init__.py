"""One step: forward and backward over micro-batches, recomputation, recorded CUDA graphs."""
