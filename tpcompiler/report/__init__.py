"""The page of `tpc report`: what was split, what crosses ranks, memory and time, the diff, the verdict."""
