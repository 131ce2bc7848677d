"""Graphs run as they stand: on one rank, or on all ranks in one process."""
