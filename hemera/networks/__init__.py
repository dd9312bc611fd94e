"""The networks and their losses: torch alone, no table, no choice of device; files in `storage`.

Images are tensors (B, 3, H, W), RGB. GenerationNet and its discriminator take [-1, 1], as pix2pix
does; SegmentationNet takes [0, 1] and normalises for each of its branches itself. What a network
returns before a sigmoid is a logit.
"""
