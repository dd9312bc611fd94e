"""Helpers of reading and writing: atomic writes, ordered threads, layout of results, faults."""
