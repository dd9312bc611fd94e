"""The pages: about the data (report) and about the networks (evaluate).

Each is one HTML file that contains everything it shows: no request leaves it, and equal inputs give
equal bytes. Text from tables and names of images is escaped.
"""
