"""The two pages people open: about the data (report) and about the networks (evaluate).

Each is one HTML file with everything in it: no request leaves it, and equal inputs give equal
bytes. What comes from a table or an image's name is escaped.
"""

from hemera.pages.evaluation import Example, evaluation_page

__all__ = ["Example", "evaluation_page"]
