"""Cases with tiles of H&E and HER2, of which HER2 is darker the higher the score."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from hemera import tables
from hemera.config import CasesOptions, TileOptions, TrainEncoderOptions
from hemera.dataset import cases as labelled
from hemera.dataset.shards import ShardWriter
from hemera.files import layout
from hemera.files.geojson import annotation
from hemera.imaging.codecs import encode, encode_mask
from hemera.masks import label_format
from hemera.sheet import SCORES, write_rows
from hemera.stages import train_encoder
from tests.small_status import case_rows
from tests.small_tables import stored, tile_row

SIDE = 64
TILES = 1
QUICK: dict[str, Any] = {
    "base_width": 4, "hidden": 64, "epochs": 14, "batch_size": 4, "learning_rate": 0.001,
    "device": "cpu", "torch_threads": 1,
}  # fmt: skip


def her2_pixels(score: int, seed: int) -> Any:
    """Return a tile whose lightness is 0.95 less 0.28 for each step of the score, with noise."""
    draws = np.random.default_rng(seed)
    level = 255 * (0.95 - 0.28 * score)
    color = np.clip(level + np.array([30, 0, -30]), 0, 255)
    return np.clip(color + draws.normal(0, 4, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)


def write_cohort(
    results: Path,
    count: int = 24,
    *,
    alone: int = 0,
    same: tuple[int, int] | None = None,
    halves: bool = False,
    **values: Any,
) -> list[dict[str, Any]]:
    """Write cases and their tiles, each case a unit; the last `alone` have no HER2.

    `same`: numbers of two cases with the same HER2 tile. `halves`: the left half of H&E is dark.
    `values` as for `case_rows`.
    """
    rows = case_rows(count, **values)
    metadata = tables.provenance(CasesOptions()) | {"fingerprint": labelled.fingerprint(rows)}
    tables.write(layout.path(layout.STATUS_CASES, results), rows, tables.STATUS_CASES, metadata)
    listed = []
    for number, row in enumerate(rows):
        case = row["case"]
        has_her2 = number < count - alone
        shard = layout.path(layout.TILE_SHARD, results, unit=case)
        shard.parent.mkdir(parents=True, exist_ok=True)
        found = []
        with ShardWriter(shard) as writer:
            for place in range(TILES):
                made = tile_row(case, place, size_px=SIDE)
                seed = 100 * (same[0] if same and number in same else number) + place
                # H&E has the lightness of HER2 as well, so that the network has something to find.
                score = ("0", "1+", "2+", "3+").index(row["score"] or "0")
                he, her2 = (her2_pixels(score, seed + extra) for extra in (50, 0))
                if halves:
                    he[:, : SIDE // 2] //= 3
                for stain, pixels in (("he", he), ("her2", her2)):
                    name = f"{made['tile']}.{stain}.png"
                    made |= stored(writer, f"{stain}_", name, encode(pixels, "png"))
                if not has_her2:
                    made |= {name: None for name in made if name.startswith("her2_")}
                found.append(made)
                listed.append(
                    {"tile": made["tile"], "pair": case, "case": case, "unit": case,
                     "he_sha256": made["he_sha256"], "accepted": True, "reason": None}
                )  # fmt: skip
        path = layout.path(layout.TILES, results, unit=case)
        tables.write(path, found, tables.TILE, tables.provenance(TileOptions(size_px=SIDE)))
    tables.write(layout.path(layout.STATUS_TILES, results), listed, tables.STATUS_TILES)
    return rows


def encoder_paths(results: Path, network: str = "her2_cnn") -> dict[str, Path]:
    """Return the outputs of stage train_encoder."""
    patterns = {
        "weights": layout.ENCODER,
        "metadata": layout.ENCODER_METADATA,
        "history": layout.ENCODER_HISTORY,
    }
    return {
        name: layout.path(pattern, results, network=network) for name, pattern in patterns.items()
    }


def encoder_inputs(results: Path) -> dict[str, Path]:
    """Return its inputs."""
    return {
        "cases": layout.path(layout.STATUS_CASES, results),
        "case_tiles": layout.path(layout.STATUS_TILES, results),
        "results": results,
    }


def write_masks(results: Path, rows: list[dict[str, Any]], *, virtual: bool = False) -> None:
    """Write cells and masks of engine stain: cells of the intensity of the score everywhere.

    `virtual`: of the HER2 of stage restain.
    """
    real = (layout.TILES, layout.MASK_SHARD, layout.MASKS, layout.CELLS)
    made = (layout.VIRTUAL_TILES, layout.VIRTUAL_MASK_SHARD, layout.VIRTUAL_MASKS,
            layout.VIRTUAL_CELLS)  # fmt: skip
    for row in rows:
        case, score = row["case"], SCORES.index(row["score"])
        paths = [
            layout.path(pattern, results, unit=case) for pattern in (made if virtual else real)
        ]
        tiles = tables.read(paths[0], tables.TILE).to_pylist()
        shard = paths[1]
        shard.parent.mkdir(parents=True, exist_ok=True)
        masks, cells = [], []
        with ShardWriter(shard) as writer:
            for tile in (tile for tile in tiles if tile["her2_offset"] is not None):
                inside = np.ones((SIDE, SIDE), np.uint8)
                mask = label_format.pack(inside * 2, inside > 1, inside * score)
                mask[:4] = 0
                place = stored(writer, "", f"{tile['tile']}.stain.png", encode_mask(mask))
                numbers = {
                    field.name: 0 for field in tables.MASK
                    if not (field.nullable or str(field.type) == "string")
                }  # fmt: skip
                kind = ("", "weak_", "moderate_", "strong_")[score]
                numbers |= {"cells": (SIDE // 4) ** 2, f"{kind}cells": (SIDE // 4) ** 2}
                numbers |= {"membrane_od": 0.1, "cytoplasm_od": 0.1}
                masks.append(
                    {**numbers, "tile": tile["tile"], "pair": case, "engine": "stain",
                     "shard": f"mask/{case}.tar", **place}
                )  # fmt: skip
                cells += [
                    {"tile": tile["tile"], "engine": "stain", "cell": 1 + place, "x_px": x,
                     "y_px": y, "area_px": 9, "positive": score > 0, "intensity": score}
                    for place, (y, x) in enumerate(np.ndindex(SIDE // 4, SIDE // 4))
                    for x, y in [(4 * x + 2.0, 4 * y + 2.0)]
                ]  # fmt: skip
        tables.write(paths[2], masks, tables.MASK)
        tables.write(paths[3], cells, tables.CELLS)


def write_annotations(results: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a sheet whose annotations have the left half of each tile as tumour; return it."""
    listed = []
    for row in rows:
        (tile,) = tables.read(
            layout.path(layout.TILES, results, unit=row["case"]), tables.TILE
        ).to_pylist()
        x, y = tile["x_px"], tile["y_px"]
        side = SIDE * tile["mpp"] / tile["he_mpp"]
        halves = {"Tumour": shapely.box(x, y, x + side / 2, y + side),
                  "Stroma": shapely.box(x + side / 2, y, x + side, y + side)}  # fmt: skip
        features = [annotation(box, name, (0, 0, 0)) for name, box in halves.items()]
        path = results / f"{row['case']}.geojson"
        path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
        listed.append(
            {"pair": row["case"], "case": row["case"], "dataset": "d", "he": f"{row['case']}.png",
             "annotations": path.name}
        )  # fmt: skip
    sheet = results / "pairs.tsv"
    sheet.write_text(write_rows(listed))
    return sheet


def train_her2_cnn(results: Path, **options: Any) -> dict[str, Path]:
    """Run stage train_encoder; return its outputs."""
    paths = encoder_paths(results)
    train_encoder.run(
        network="her2_cnn",
        **encoder_inputs(results),
        **paths,
        options=TrainEncoderOptions(**{**QUICK, **options}),
    )
    return paths
