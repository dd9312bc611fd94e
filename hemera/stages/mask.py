"""Stage mask: label images of the HER2 tiles of one unit, by every engine asked for."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from hemera import tables
from hemera.config import MaskOptions
from hemera.dataset import shards
from hemera.errors import ShardError, TableError
from hemera.imaging import codecs
from hemera.io.atomic import replacing
from hemera.masks import agreement
from hemera.masks import label_format as labels
from hemera.masks.stain import stains as stain
from hemera.masks.stain.segmentation import segment

logger = logging.getLogger(__name__)

_Engine = Callable[[npt.NDArray[np.uint8], float, stain.Stains], labels.Labelled]

_MPP_MAX = 100.0
_COLUMNS = ("tile", "pair", "mpp", "her2_offset", "her2_length")


def run(
    *,
    tiles: Path,
    tile_shard: Path,
    shard: Path,
    masks: Path,
    cells: Path,
    options: MaskOptions,
) -> None:
    """Label every tile of a unit; tables and shard keep the order of the tile table.

    Args:
        tiles: the unit's table of stage tile.
        tile_shard: its shard.
        shard: written: ``{tile}.{engine}.png``, 8-bit label images (see `hemera.masks`).
        masks: written: one row per tile and engine.
        cells: written: one row per cell.
        options: which engines, and their thresholds.

    Raises:
        EngineError: when an engine cannot run as asked.
        ShardError: when the tile shard does not hold what the table says.
        TableError: when the table gives a tile a resolution that none can have.
    """
    rows = tables.read(tiles, tables.TILE, _COLUMNS).to_pylist()
    for row in rows:
        if not 0 < row["mpp"] <= _MPP_MAX:
            raise TableError(
                f"{tiles}: {row['tile']} has {row['mpp']:g} um/px; delete the table and run stage "
                "tile again"
            )
    engines, made_by = _engines(options) if rows else ({}, {})
    stains = _stains(tile_shard, rows, options)
    mask_rows: list[dict[str, Any]] = []
    cell_tables: list[pa.Table] = []
    with replacing(shard) as temporary, shards.ShardWriter(temporary) as writer:
        for row in tqdm(rows, desc="mask", unit="tile", disable=None):
            rgb = _read(tile_shard, row)
            made = {
                name: engine(rgb, row["mpp"], stains[row["pair"]])
                for name, engine in engines.items()
            }
            agreed = _agreement(list(made.values()), row["mpp"])
            for name, labelled in made.items():
                data = codecs.encode_mask(labelled.mask)
                offset, length = writer.add(f"{row['tile']}.{name}.png", data)
                mask_rows.append(
                    {
                        "tile": row["tile"],
                        "pair": row["pair"],
                        "engine": name,
                        **statistics(labelled),
                        **agreed,
                        "note": labelled.note,
                        "shard": f"{shard.parent.name}/{shard.name}",
                        "offset": offset,
                        "length": length,
                        "sha256": hashlib.sha256(data).hexdigest(),
                    }
                )
                cell_tables.append(_cell_table(row["tile"], name, labelled.cells))
    tables.write(masks, mask_rows, tables.MASK, {**tables.provenance(options), **made_by})
    tables.write(cells, pa.concat_tables([tables.CELLS.empty_table(), *cell_tables]), tables.CELLS)
    logger.info("%s: %d tiles labelled by %s", shard.stem, len(rows), ", ".join(options.engines))


def statistics(labelled: labels.Labelled) -> dict[str, float | int]:
    """Return the measured columns of one row of MASK; fractions are of all pixels of the tile."""
    mask, cells = labelled.mask, labelled.cells
    pixels = np.bincount(labels.intensity(mask).ravel(), minlength=4) / mask.size
    strength = np.bincount(cells.intensity, minlength=4)
    return {
        "nucleus_fraction": float(labels.nuclei(mask).mean()),
        "positive_fraction": float(labels.positive(mask).mean()),
        "weak_fraction": float(pixels[1]),
        "moderate_fraction": float(pixels[2]),
        "strong_fraction": float(pixels[3]),
        "excluded_fraction": labelled.excluded_fraction,
        "cells": len(cells),
        "positive_cells": int(cells.positive.sum()),
        "weak_cells": int(strength[1]),
        "moderate_cells": int(strength[2]),
        "strong_cells": int(strength[3]),
    }


def _agreement(made: list[labels.Labelled], mpp: float) -> dict[str, float | int | None]:
    """Return the columns of MASK that compare two engines; none of them where one ran."""
    if len(made) < 2:
        return {}
    first, second = made
    sign, matched = agreement.sign_agreement(first.cells, second.cells, mpp)
    return {
        "agreement_dice": agreement.dice(labels.positive(first.mask), labels.positive(second.mask)),
        "agreement_sign": sign,
        "agreement_cells": matched,
    }


def _engines(options: MaskOptions) -> tuple[dict[str, _Engine], dict[str, str]]:
    """Return what labels a tile, by name, in the order of the options; and the weights it has."""
    made: dict[str, _Engine] = {}
    weights: dict[str, str] = {}
    for name in options.engines:
        if name == "deepliif":
            # Only here: it brings PyTorch.
            from hemera.masks import deepliif

            model = deepliif.Model(options)
            made[name] = model.segment
            weights["deepliif_sha256"] = model.sha256
        else:
            made[name] = lambda rgb, mpp, stains: segment(rgb, mpp, stains, options)
    return made, weights


def _stains(
    tile_shard: Path, rows: list[dict[str, Any]], options: MaskOptions
) -> dict[str, stain.Stains]:
    """Estimate the stains of every pair of the unit from tiles spread over it."""
    by_pair: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_pair.setdefault(row["pair"], []).append(row)
    stains = {}
    for pair, own in by_pair.items():
        count = min(len(own), options.stain_tiles)
        chosen = [own[k * len(own) // count] for k in range(count)]
        stains[pair] = stain.estimate([_read(tile_shard, row) for row in chosen], own[0]["mpp"])
        logger.debug("%s: %s", pair, stains[pair])
    return stains


def _read(tile_shard: Path, row: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    """Return the HER2 tile of a row."""
    data = shards.read_member(tile_shard, row["her2_offset"], row["her2_length"])
    try:
        return codecs.decode(data)
    except ShardError as error:
        raise ShardError(
            f"{tile_shard}: {row['tile']}.her2 cannot be decoded; delete the shard and run stage "
            "tile again"
        ) from error


def _cell_table(tile: str, engine: str, cells: labels.Cells) -> pa.Table:
    """Return the rows of CELLS of one tile."""
    count = len(cells)
    columns = {
        "tile": pa.repeat(tile, count),
        "engine": pa.repeat(engine, count),
        "cell": np.arange(1, count + 1, dtype=np.int32),
        "x_px": cells.x_px,
        "y_px": cells.y_px,
        "area_px": cells.area_px,
        "positive": cells.positive,
        "intensity": cells.intensity.astype(np.int8),
        "completeness": cells.completeness,
    }
    return pa.table(columns, schema=tables.CELLS)
