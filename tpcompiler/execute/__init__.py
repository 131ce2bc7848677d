"""Runs graphs node by node: on one rank, or on all ranks in one process."""
