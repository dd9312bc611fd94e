"""The dataset in the formats of other software, and its card."""
