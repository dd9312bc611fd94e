"""The dataset: shards, splits, index queries, torch dataset."""
