"""Reading and writing files: atomic writes and ordered threads."""
