"""A local web application on the results of a study: inspect pairs and tiles, and decide."""
