"""Rows of the table of tiles, for the tests of the stages that read it."""

import hashlib
from typing import Any

from hemera.dataset.shards import ShardWriter


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def stored(shard: ShardWriter, prefix: str, name: str, data: bytes) -> dict[str, Any]:
    """Add a member to a shard; return its columns."""
    offset, length = shard.add(name, data)
    found = {"offset": offset, "length": length, "sha256": hashlib.sha256(data).hexdigest()}
    return {f"{prefix}{column}": value for column, value in found.items()}


def tile_row(
    pair: str, number: int, *, y_px: int = 512, size_px: int = 512, mpp: float = 0.46, **values: Any
) -> dict[str, Any]:
    """Return a row of `tables.TILE` that no filter refuses, given the values that differ."""
    x_px = size_px * number
    name = f"{pair}_{x_px:06d}_{y_px:06d}"
    return {
        "tile": name, "pair": pair, "x_px": x_px, "y_px": y_px,
        "her2_x_px": x_px + 0.1, "her2_y_px": 1 / 3, "size_px": size_px,
        "mpp": mpp, "he_mpp": mpp, "her2_mpp": mpp,
        "registration_error_um": 1.5, "registration_error_low_um": 0.5,
        "registration_error_high_um": 4.5, "registration_ncc": 0.4, "registration_margin": 0.2,
        "tissue_fraction": 0.75, "her2_tissue_fraction": 0.5,
        "he_sharpness": 100.0, "her2_sharpness": 50.0, "histogram_similarity": 0.6,
        "alignment_margin": None,
        **dict.fromkeys(
            (f"{stain}_{kind}_fraction" for stain in ("he", "her2")
             for kind in ("pen", "fold", "edge", "dust", "other", "blur")), 0.0,
        ),
        "he_background": [240, 240, 242], "her2_background": [241, 240, 238],
        "her2_coverage_fraction": 1.0, "folding_fraction": 0.0, "shard": f"tile/{pair}.tar",
        "he_offset": 512, "he_length": 100, "he_sha256": digest(f"he {name}"),
        "her2_offset": 1024, "her2_length": 200, "her2_sha256": digest(f"her2 {name}"),
        **values,
    }  # fmt: skip
