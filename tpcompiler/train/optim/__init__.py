"""What happens to gradients: clipping, scaling, the optimizer, the schedule."""
