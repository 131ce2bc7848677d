"""`tpc plan`: finds the best spec for a number of GPUs, by the predicted time and memory of every layout."""
