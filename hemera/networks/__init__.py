"""The networks and their losses: torch alone, no table, no choice of device; files in `storage`.

GenerationNet and its discriminator take images in [-1, 1], SegmentationNet takes [0, 1].
"""
