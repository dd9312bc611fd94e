"""Formats of other software: GeoJSON, label images, outlines."""
