"""Cases with tiles of H&E and HER2, of which HER2 is darker the higher the score."""

from pathlib import Path
from typing import Any

import numpy as np

from hemera import tables
from hemera.config import CasesOptions, TileOptions, TrainEncoderOptions
from hemera.dataset import cases as labelled
from hemera.dataset.shards import ShardWriter
from hemera.files import layout
from hemera.imaging.codecs import encode
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
    **values: Any,
) -> list[dict[str, Any]]:
    """Write cases and their tiles, each case a unit; the last `alone` have no HER2.

    `same`: numbers of two cases with the same HER2 tile. `values` as for `case_rows`.
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


def encoder_paths(results: Path) -> dict[str, Path]:
    """Return the outputs of stage train_encoder."""
    patterns = {
        "weights": layout.ENCODER,
        "metadata": layout.ENCODER_METADATA,
        "history": layout.ENCODER_HISTORY,
    }
    return {
        name: layout.path(pattern, results, network="her2_cnn")
        for name, pattern in patterns.items()
    }


def encoder_inputs(results: Path) -> dict[str, Path]:
    """Return its inputs."""
    return {
        "cases": layout.path(layout.STATUS_CASES, results),
        "case_tiles": layout.path(layout.STATUS_TILES, results),
        "results": results,
    }


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
