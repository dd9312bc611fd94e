"""A small index with shards for the tests of training: what is positive can be seen on H&E."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from hemera import tables
from hemera.config import MaskOptions
from hemera.dataset.shards import ShardWriter
from hemera.imaging.codecs import encode, encode_mask
from hemera.masks import label_format
from tests.small_tables import stored, tile_row

HEIGHT, WIDTH = 128, 256


def draw_tile(seed: int, height: int = HEIGHT, width: int = WIDTH):
    """Draw pale tissue with nuclei: large dark ones have a brown ring on HER2, small ones none."""
    rng = np.random.default_rng(seed)
    he = np.full((height, width, 3), (232, 190, 215), np.uint8)
    her2 = np.full((height, width, 3), (236, 232, 230), np.uint8)
    classes = np.zeros((height, width), np.uint8)
    nucleus = np.zeros((height, width), np.uint8)
    for _ in range(height * width // 1200):
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        positive = rng.random() < 0.4
        radius = 9 if positive else 5
        cv2.circle(he, centre, radius, (95, 50, 125) if positive else (150, 105, 170), -1)
        if positive:
            cv2.circle(her2, centre, radius + 3, (125, 80, 45), -1)
        cv2.circle(her2, centre, radius, (150, 160, 195), -1)
        cv2.circle(classes, centre, radius + 3, 2 if positive else 1, -1)
        cv2.circle(nucleus, centre, radius, 1, -1)
    he = np.clip(he + rng.normal(0, 3, he.shape), 0, 255).astype(np.uint8)
    intensity = np.where(classes == 2, 3, 0).astype(np.uint8)
    return he, her2, label_format.pack(classes, nucleus.astype(bool), intensity)


def write_index(
    results: Path,
    train: int = 3,
    val: int = 2,
    test: int = 2,
    draw: Callable[..., tuple[Any, ...]] = draw_tile,
    **drawn: int,
) -> Path:
    """Write tiles, masks and index; the first tile of val and of test has no positive cell.

    `draw` returns H&E, HER2 and mask of a tile by its number, and may return columns of its row.
    """
    for folder in ("tile", "mask", "index"):
        (results / folder).mkdir(parents=True, exist_ok=True)
    rows = []
    with (
        ShardWriter(results / "tile" / "unit.tar") as tiles,
        ShardWriter(results / "mask" / "unit.tar") as labels,
    ):
        parts = [*["train"] * train, *["val"] * val, *["test"] * test]
        for number, part in enumerate(parts):
            he, her2, mask, *facts = draw(number, **drawn)
            if part != "train" and part not in parts[:number]:
                mask = mask & 4
            row = tile_row(
                f"pair{number}", 0, y_px=number, size_px=WIDTH, mpp=0.5,
                registration_error_um=None, shard="tile/unit.tar", dataset="bci",
                score="3+" if number % 2 else "1+", registration="registered",
                stain_shard="mask/unit.tar", accepted=True, case=f"case{number}",
                split=part, generation_split=part, segmentation_split=part,
            )  # fmt: skip
            row |= facts[0] if facts else {}
            for stain, image in (("he", he), ("her2", her2)):
                row |= stored(tiles, f"{stain}_", f"{row['tile']}.{stain}.jpg", encode(image))
            row |= stored(labels, "stain_", f"{row['tile']}.stain.png", encode_mask(mask))
            rows.append(row)
    index = results / "index" / "index.parquet"
    made = tables.provenance(MaskOptions(engines={"stain": {}}))["options"]
    metadata = {"fingerprint": "f" * 64, "mask_target": "stain", "options_mask": made}
    tables.write(index, rows, tables.index(("stain",)), metadata)
    return index
