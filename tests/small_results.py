"""A folder of results as the stages before report leave it, written by the real writers.

Tables of describe, register, landmarks, tile and mask are made by hand, so that every state can be
had at will; score, filter and index run for real.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from hemera import config, tables
from hemera.dataset.shards import ShardWriter
from hemera.imaging.codecs import encode, encode_mask
from hemera.imaging.quality import histogram_similarity
from hemera.masks import label_format
from hemera.registration.displacement import Displacement, none
from hemera.registration.displacement_files import write_displacement
from hemera.sheet import Pair, read_sheet, units, write_rows
from hemera.stages import filter, index, landmarks
from tests.small_tables import stored, tile_row

BLOCK_COUNT = 2
SIZE_PX = 96


@dataclasses.dataclass(frozen=True)
class Made:
    """One pair of the cohort, and what becomes of it."""

    pair: str
    dataset: str = "bci"
    score: str = ""
    split: str = ""
    case: str = ""
    slide: bool = False
    state: str = "tiled"
    reason: str = ""
    verdict: str = "pass"
    person: str = ""
    tiles: int = 4
    sharpness: float = 80.0
    landmarks: bool = False
    tile_ok: float | None = None
    map: str = "nonrigid"
    mirrored_by: str = ""
    aligned: float = 0.0
    """Of a pair that comes registered: margin of its alignment over -0.2."""
    attempts: tuple[str, ...] = ("default_initial_nonrigid at 4096 px: pass",)


def make(folder: Path, pairs: list[Made], *, engines: tuple[str, ...] = ("stain",)) -> Path:
    """Write sheet and results; return the sheet. The results lie in ``folder / "results"``."""
    rows = [
        {
            "pair": made.pair,
            "case": made.case or made.pair,
            "dataset": made.dataset,
            "score": made.score,
            "split": made.split,
            "verdict": made.person,
            "he": f"{made.pair}_he.{'tif' if made.slide else 'png'}",
            "her2": f"{made.pair}_her2.{'tif' if made.slide else 'png'}",
            "registered": "false" if made.slide else "true",
            "he_landmarks": "points.csv" if made.landmarks else "",
            "her2_landmarks": "points.csv" if made.landmarks else "",
        }
        for made in pairs
    ]
    folder.mkdir(parents=True, exist_ok=True)
    sheet = folder / "pairs.tsv"
    sheet.write_text(write_rows(rows))
    results = folder / "results"
    by_name = {made.pair: made for made in pairs}
    for unit, members in units(read_sheet(sheet), BLOCK_COUNT).items():
        _unit(results, unit, [(pair, by_name[pair.pair]) for pair in members], engines)
    if any(made.landmarks for made in pairs):
        landmarks.run(
            sheet=sheet,
            results=results,
            errors=results / "landmarks" / "cohort.errors.parquet",
            predictions=results / "landmarks" / "cohort.predictions.csv",
            options=config.LandmarksOptions(),
        )
    filter.run(
        sheet=sheet,
        block_count=BLOCK_COUNT,
        results=results,
        engines=engines,
        tiles=results / "filter" / "tiles.parquet",
        options=config.FilterOptions(),
    )
    index.run(
        sheet=sheet,
        tiles=results / "filter" / "tiles.parquet",
        engines=engines,
        index=results / "index" / "index.parquet",
        card=results / "index" / "card.md",
        options=config.IndexOptions(target=engines[0]),
    )
    return sheet


def tissue(seed: int, height: int, width: int, tint: tuple[int, int, int]) -> np.ndarray:
    """Return something that looks like tissue from afar: dark blobs on a pale ground."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), (236, 226, 234), np.uint8)
    for _ in range(max(8, height * width // 500)):
        centre = int(rng.integers(width)), int(rng.integers(height))
        shade = tuple(int(c) for c in np.clip(np.array(tint) + rng.integers(-25, 25, 3), 0, 255))
        cv2.circle(image, centre, int(rng.integers(2, 7)), shade, -1, cv2.LINE_AA)
    return image


def _unit(
    results: Path, unit: str, members: list[tuple[Pair, Made]], engines: tuple[str, ...]
) -> None:
    described: list[dict[str, Any]] = []
    outcomes, tile_rows, mask_rows = [], [], []
    for folder in ("tile", "mask"):
        (results / folder).mkdir(parents=True, exist_ok=True)
    with (
        ShardWriter(results / "tile" / f"{unit}.tar") as tile_shard,
        ShardWriter(results / "mask" / f"{unit}.tar") as mask_shard,
    ):
        for pair, made in members:
            described += _describe(pair, made)
            tiled = made.state == "tiled"
            if made.slide:
                _register(results, unit, pair, made)
            outcomes.append(
                {
                    "pair": pair.pair,
                    "state": made.state,
                    "reason": made.reason or None,
                    "registration": _registration(made),
                    "tiles_grid": made.tiles + 3,
                    "tiles_tissue": made.tiles if tiled else 0,
                    "tiles_artefact": 0,
                    "tiles_unreadable": 0,
                    "tiles_written": made.tiles if tiled else 0,
                }
            )
            for number in range(made.tiles if tiled else 0):
                row, masked = _tile(unit, pair, made, number, tile_shard, mask_shard, engines)
                tile_rows.append(row)
                mask_rows += masked
    metadata = tables.provenance(config.DescribeOptions())
    tables.write(results / "describe" / f"{unit}.parquet", described, tables.DESCRIBE, metadata)
    metadata = {"options_describe": metadata["options"]}
    metadata |= tables.provenance(config.TileOptions(size_px=SIZE_PX))
    if any(made.slide for _, made in members):
        metadata["options_register"] = tables.provenance(config.RegisterOptions())["options"]
    tables.write(results / "tile" / f"{unit}.parquet", tile_rows, tables.TILE, metadata)
    tables.write(results / "tile" / f"{unit}.pairs.parquet", outcomes, tables.PAIRS, metadata)
    metadata = tables.provenance(config.MaskOptions(engines={"stain": {}}))
    tables.write(results / "mask" / f"{unit}.parquet", mask_rows, tables.MASK, metadata)
    cells = [row for masked in mask_rows for row in _cells(masked)]
    tables.write(results / "mask" / f"{unit}.cells.parquet", cells, tables.CELLS)


def _cells(masked: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the cells of a tile on its diagonal, the stained ones first."""
    return [
        {
            "tile": masked["tile"],
            "engine": masked["engine"],
            "cell": k + 1,
            "x_px": SIZE_PX * (k + 0.5) / masked["cells"],
            "y_px": SIZE_PX * (k + 0.5) / masked["cells"],
            "area_px": 30,
            "positive": k < masked["weak_cells"],
            "intensity": int(k < masked["weak_cells"]),
            "membrane_od": masked["membrane_od"],
        }
        for k in range(masked["cells"])
    ]


def _registration(made: Made) -> str:
    if made.person:
        return {"accept": "accepted", "refuse": "refused"}[made.person]
    return made.verdict if made.slide else "registered"


def _describe(pair: Pair, made: Made) -> list[dict[str, Any]]:
    rows = []
    for stain, path in (("he", pair.he), ("her2", pair.her2)):
        row: dict[str, Any] = {
            "pair": pair.pair,
            "stain": stain,
            "file": path.name,
            "verdict": "accept",
        }
        if made.state == "unreadable" and stain == "her2":
            row |= {"verdict": "refuse", "reason": made.reason}
        else:
            width, height = (400, 300) if stain == "he" else (360, 320)
            image = tissue(3, height, width, (120, 70, 150) if stain == "he" else (130, 90, 60))
            row |= {
                "reader": "openslide",
                "width_px": width * 10,
                "height_px": height * 10,
                "level_count": 3,
                "mpp": 0.92,
                "mpp_source": "sheet",
                "background": [240, 240, 242],
                "background_measured": stain == "he",
                "tissue_fraction": 0.6,
                "thumbnail": encode(image, "jpeg", 85),
                "thumbnail_mpp": 9.2,
                "digest": f"{pair.pair} {stain}",
            }
            if stain == "her2" and not made.slide:
                row |= {"alignment_ncc": 0.25, "alignment_others": 0.5 - made.aligned}
                row["alignment_margin"] = made.aligned - 0.2
        rows.append(row)
    return rows


def _register(results: Path, unit: str, pair: Pair, made: Made) -> None:
    failed, mapped = made.verdict == "fail", made.map != "none"
    field = none()
    if mapped:
        field = Displacement(np.full((30, 40, 2), (180.0, -90.0), np.float32), 92.0)
    write_displacement(results / "register" / f"{unit}.displacement.npz", field)
    row: dict[str, Any] = {
        "pair": pair.pair,
        "verdict": made.verdict,
        "reason": None if made.verdict == "pass" else made.reason or "tile_ok 0.12 below 0.30",
        "engine": "deeperhistreg",
        "engine_version": "1.0.1",
        "preset": "default_initial_nonrigid",
        "map": made.map,
        "attempts": [],
    }
    if made.state != "unreadable":
        row |= {"size_px": 4096, "attempts": list(made.attempts), "match_count": 4}
    if mapped:
        row |= {
            "mirrored": made.mirrored_by != "",
            "mirrored_by": made.mirrored_by or None,
            "match_count": 4 if failed else 280,
            "match_fraction": 0.1 if failed else 0.81,
            "mirror_probe": 0.9 if failed else 11.0,
            "tile_ok": (0.12 if failed else 0.72) if made.tile_ok is None else made.tile_ok,
            "lncc": 0.02 if failed else 0.24,
            "ncc_margin": -0.2 if failed else 0.15,
            "scale": 1.002,
            "rotation_deg": 12.5,
            "anisotropy": 1.01,
            "determinant": 1.0,
            "folding_fraction": 0.0,
            "coverage_fraction": 0.98,
            "displacement_median_um": 201.2,
            "displacement_mpp": 92.0,
            "error_median_um": 192.0,
            "error_p90_um": 675.0,
            "rigid": [1.0, 0.01, 170.0, -0.01, 1.0, -80.0],
        }
    metadata = tables.provenance(config.RegisterOptions())
    tables.write(results / "register" / f"{unit}.parquet", [row], tables.CERTIFICATE, metadata)
    path = results / "register" / f"{unit}.quality.parquet"
    tables.write(path, _quality(pair.pair) if mapped else [], tables.QUALITY, metadata)
    if made.landmarks:
        points = []
        for k in range(1, 12):
            point = {"pair": pair.pair, "point": str(k)}
            point |= {f"{stain}_x_um": 100.0 * k for stain in tables.STAINS}
            point |= {f"{stain}_y_um": 50.0 * k for stain in tables.STAINS}
            if mapped:
                point |= {"error_um": float(k), "error_diagonal_fraction": k / 4600}
            initial = 40.0 + k
            point |= {"initial_error_um": initial, "official_initial_error_um": initial}
            point["official_error_um"] = float(k) if mapped else initial
            points.append(point)
        tables.write(results / "landmarks" / f"{unit}.parquet", points, tables.LANDMARKS)
        (results / "landmarks" / f"{unit}.csv").write_text("point_id,he_x,he_y\n")


def _quality(pair: str) -> list[dict[str, Any]]:
    """Return squares on a slide of 3680 x 2760 um whose error grows to the right."""
    return [
        {
            "pair": pair,
            "x_um": 300.0 + 184 * column,
            "y_um": 400.0 + 184 * line,
            "side_um": 368.0,
            "step_um": 184.0,
            "ncc": 0.5,
            "best_shifted_ncc": 0.2 if column < 12 else 0.6,
            "residual_x_um": 3.0 * column**2,
            "residual_y_um": 0.0,
            "spread_um": 3.0 * column**2,
        }
        for column in range(17)
        for line in range(11)
    ]


def _tile(
    unit: str,
    pair: Pair,
    made: Made,
    number: int,
    tile_shard: ShardWriter,
    mask_shard: ShardWriter,
    engines: tuple[str, ...],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    seed = int.from_bytes(hashlib.sha256(f"{pair.pair}/{number}".encode()).digest()[:4])
    he = tissue(seed, SIZE_PX, SIZE_PX, (110, 60, 150))
    her2 = tissue(seed, SIZE_PX, SIZE_PX, (125, 85, 55))
    dark = her2.min(axis=2) < 140
    row = tile_row(
        pair.pair,
        number,
        y_px=0,
        size_px=SIZE_PX,
        mpp=0.92 if made.slide else 0.46,
        her2_x_px=number * SIZE_PX + (180 / 0.92 if made.slide else 3.5),
        her2_y_px=-90 / 0.92 if made.slide else 1.25,
        her2_tissue_fraction=0.8,
        # The last tile of a pair is background.
        tissue_fraction=0.2 if number == 3 else 0.7 + 0.01 * (seed % 20),
        he_sharpness=150.0 + seed % 50,
        her2_sharpness=made.sharpness,
        histogram_similarity=histogram_similarity(he, her2),
        registration_error_um=7.0 * number if made.slide else None,
        registration_error_low_um=2.0 * number if made.slide else None,
        registration_error_high_um=21.0 * number if made.slide else None,
        registration_ncc=0.5 if made.slide else None,
        registration_margin=0.2 if made.slide else None,
        alignment_margin=None if made.slide else made.aligned - 0.2 + 0.1 * (number == 0),
        shard=f"tile/{unit}.tar",
    )
    name = row["tile"]
    for stain, rgb in (("he", he), ("her2", her2)):
        row |= stored(tile_shard, f"{stain}_", f"{name}.{stain}.jpg", encode(rgb, "jpeg", 95))
    masked = []
    first = dark if made.score in ("2+", "3+") else dark & (seed % 3 == 0)
    # The second engine calls more positive to the right, so that the two agree in part.
    second = dark & (np.arange(SIZE_PX) > SIZE_PX * (seed % 7) / 7)
    compared: dict[str, Any] = dict.fromkeys(tables.MASK.names[9:12])
    if len(engines) > 1:
        both, total = float((first & second).sum()), float(first.sum() + second.sum())
        compared["agreement_dice"] = 2 * both / (total or 1)
        compared["agreement_sign"] = float((first == second)[dark].mean())
        compared["agreement_cells"] = 12
    for engine, positive in zip(engines, (first, second, first), strict=False):
        classes = np.where(
            positive, label_format.POSITIVE, np.where(dark, label_format.NEGATIVE, 0)
        )
        label = label_format.pack(classes, dark, positive.astype(np.uint8))
        masked.append(
            {
                **dict.fromkeys(tables.MASK_STATISTICS, 0),
                "tile": name,
                "pair": pair.pair,
                "engine": engine,
                "nucleus_fraction": float(dark.mean()),
                "positive_fraction": float(label_format.positive(label).mean()),
                "weak_fraction": float(positive.mean()),
                "cells": 12,
                "positive_cells": 9 if positive.any() else 0,
                "weak_cells": 9 if positive.any() else 0,
                "membrane_od": 0.0625 if positive.any() else 0.0,
                "note": None,
                **compared,
                "shard": f"mask/{unit}.tar",
                **stored(mask_shard, "", f"{name}.{engine}.png", encode_mask(label)),
            }
        )
    return row, masked
