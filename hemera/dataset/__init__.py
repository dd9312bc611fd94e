"""The dataset: tiling, shards, filter criteria, splits, index, torch dataset."""
