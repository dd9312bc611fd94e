"""Metrics of images and segmentations, and published results."""
