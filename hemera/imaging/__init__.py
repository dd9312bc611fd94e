"""Images of slides: readers, color, tissue, geometry, pyramids."""
