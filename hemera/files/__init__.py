"""Helpers of reading and writing: atomic writes, ordered threads, GeoJSON, layout, faults."""
