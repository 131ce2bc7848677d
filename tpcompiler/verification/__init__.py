"""Numbers: all ranks run and are compared with the plain model, outputs and every gradient."""
