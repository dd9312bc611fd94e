"""The networks and their losses: torch alone, no table, no choice of device; files in `storage`.

Images are tensors (B, 3, H, W), RGB. GenerationNet and its discriminator see [-1, 1], as pix2pix
does; SegmentationNet sees [0, 1] and normalises for each of its branches itself. What a network
returns before a sigmoid is a logit.
"""
