"""Images of slides: readers, colour, tissue, geometry, pyramids."""
