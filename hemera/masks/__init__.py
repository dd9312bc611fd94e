"""Masks: label images of HER2 tiles, and the engines that make them."""

ENGINES: dict[str, str] = {
    "deepliif": "hemera.masks.deepliif",
    "stain": "hemera.masks.stain",
}
"""Module of each engine, see `hemera.masks.engine`: a new engine is its module and an entry here.

Names, because the modules are imported only where an engine is configured.
"""
