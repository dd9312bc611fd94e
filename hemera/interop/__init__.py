"""Annotations of other software, and their transfer between slides: GeoJSON, labels, outlines."""
