"""`tpc plan`: from a number of GPUs to a spec, by the predicted time and memory of every layout."""
