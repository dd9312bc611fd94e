"""One module per stage of the graph; each has a `run` that writes all its outputs or raises."""
