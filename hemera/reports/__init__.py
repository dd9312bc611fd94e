"""The pages about the data and about the networks.

Each is one HTML file that contains everything it shows; equal inputs give equal bytes.
"""
