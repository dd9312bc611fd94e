"""A small index with shards for the tests of training: what is positive can be seen on H&E."""

import hashlib
from pathlib import Path

import cv2
import numpy as np

from hemera import tables
from hemera.dataset.shards import ShardWriter
from hemera.imaging.codecs import encode, encode_mask
from hemera.masks import label_format

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


def write_index(results: Path, train: int = 3, val: int = 2, test: int = 2, **drawn: int) -> Path:
    """Write tiles, masks and index; the first tile of val and of test has no positive cell."""
    for folder in ("tile", "mask", "index"):
        (results / folder).mkdir(parents=True, exist_ok=True)
    rows = []
    with (
        ShardWriter(results / "tile" / "unit.tar") as tiles,
        ShardWriter(results / "mask" / "unit.tar") as labels,
    ):
        parts = [*["train"] * train, *["val"] * val, *["test"] * test]
        for number, part in enumerate(parts):
            tile = f"pair{number}_000000_{number:06d}"
            he, her2, mask = draw_tile(number, **drawn)
            if part != "train" and part not in parts[:number]:
                mask = mask & 4
            row = {
                "tile": tile, "pair": f"pair{number}", "x_px": 0, "y_px": number,
                "her2_x_px": 0.0, "her2_y_px": 0.0, "size_px": WIDTH, "mpp": 0.5, "he_mpp": 0.5,
                "her2_mpp": 0.5, "tissue_fraction": 1.0, "her2_tissue_fraction": 1.0,
                "he_sharpness": 99.0, "her2_sharpness": 99.0, "her2_coverage_fraction": 1.0,
                "folding_fraction": 0.0, "shard": "tile/unit.tar", "dataset": "bci",
                "score": "3+" if number % 2 else "1+", "registration": "registered",
                "stain_shard": "mask/unit.tar", "accepted": True, "case": f"case{number}",
                "split": part, "generation_split": part, "segmentation_split": part,
            }  # fmt: skip
            for stain, image in (("he", he), ("her2", her2)):
                data = encode(image)
                offset, length = tiles.add(f"{tile}.{stain}.jpg", data)
                row |= {f"{stain}_offset": offset, f"{stain}_length": length}
                row[f"{stain}_sha256"] = hashlib.sha256(data).hexdigest()
            data = encode_mask(mask)
            offset, length = labels.add(f"{tile}.stain.png", data)
            row |= {"stain_offset": offset, "stain_length": length}
            row["stain_sha256"] = hashlib.sha256(data).hexdigest()
            rows.append(row)
    index = results / "index" / "index.parquet"
    metadata = {"fingerprint": "f" * 64, "mask_target": "stain"}
    tables.write(index, rows, tables.index(("stain",)), metadata)
    return index
