"""HER2 masks: label format, engines, scores."""
