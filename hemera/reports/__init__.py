"""The pages people open: about the data (report), the networks (evaluate), presets (compare).

Each is one HTML file with everything in it: no request leaves it, and equal inputs give equal
bytes. What comes from a table or an image's name is escaped.
"""

from hemera.reports.comparison import ComparedTile, comparison_page
from hemera.reports.evaluation import Example, evaluation_page

__all__ = ["ComparedTile", "Example", "comparison_page", "evaluation_page"]
