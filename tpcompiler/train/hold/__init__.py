"""How a rank holds its parameters, gradients and optimizer state."""
