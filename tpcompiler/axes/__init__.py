"""The axes of a graph: what every tensor dimension is made of, found by unification."""
