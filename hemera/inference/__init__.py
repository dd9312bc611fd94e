"""Trained networks applied to views of tiles, and to whole slides."""
