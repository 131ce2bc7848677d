"""The `tpc` commands and what they draw."""
