"""The schema of every table, and reading and writing them.

Suffixes name units: ``_px`` pixels, ``_um`` micrometres, ``_mpp`` micrometres per pixel,
``_fraction`` a fraction, 0 to 1. ``x_px``, ``y_px`` are level-0 pixels of the slide, top-left.
No table contains a time, an absolute path or anything else that differs between equal runs.
"""

import collections
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hemera.config.base import Options
from hemera.errors import TableError
from hemera.files.atomic import replacing
from hemera.files.faults import translated

STAINS = ("he", "her2")

DESCRIBE = pa.schema(
    [
        pa.field("pair", pa.string(), False),
        pa.field("stain", pa.string(), False),  # he, her2
        pa.field("file", pa.string(), False),  # its name, without the folder
        pa.field("verdict", pa.string(), False),  # accept, refuse
        pa.field("reason", pa.string()),  # why it is refused, in words
        pa.field("reader", pa.string()),
        pa.field("vendor", pa.string()),
        pa.field("width_px", pa.int64()),
        pa.field("height_px", pa.int64()),
        pa.field("level_count", pa.int32()),
        pa.field("mpp", pa.float64()),
        pa.field("mpp_source", pa.string()),  # sheet, or the header of the file that states it
        pa.field("background", pa.list_(pa.uint8())),  # its colour, RGB
        # saturation (he) or optical density over background (her2) from which a pixel is tissue
        pa.field("tissue_threshold", pa.float64()),
        pa.field("tissue_fraction", pa.float64()),
        pa.field("tissue_area_um2", pa.float64()),
        pa.field("tissue_mpp", pa.float64()),
        pa.field("tissue", pa.binary()),  # PNG, 0 or 255, the image at tissue_mpp
        pa.field("thumbnail", pa.binary()),  # JPEG
        pa.field("thumbnail_mpp", pa.float64()),
    ]
)
"""describe: one row per image of a unit."""

CERTIFICATE = pa.schema(
    [
        pa.field("pair", pa.string(), False),
        pa.field("verdict", pa.string(), False),  # pass, review, fail
        pa.field("reason", pa.string()),  # why it is not pass, in words
        pa.field("engine", pa.string(), False),  # deeperhistreg; own: a map made elsewhere
        pa.field("engine_version", pa.string()),
        pa.field("preset", pa.string()),
        pa.field("size_px", pa.int32()),  # shortest side of the canvas
        pa.field("attempts", pa.list_(pa.string())),  # each attempt and its result
        pa.field("map", pa.string()),  # nonrigid, rigid: which was kept; own, none
        pa.field("mirrored", pa.bool_()),  # the map mirrors
        pa.field("mirrored_by", pa.string()),  # sheet, or probe: found against the sheet
        pa.field("match_count", pa.int64()),
        pa.field("match_fraction", pa.float64()),
        pa.field("mirror_probe", pa.float64()),  # matches over those of the mirror image
        pa.field("tile_ok", pa.float64()),
        pa.field("lncc", pa.float64()),
        pa.field("ncc", pa.float64()),
        pa.field("ncc_margin", pa.float64()),
        pa.field("rotation_deg", pa.float64()),
        pa.field("scale", pa.float64()),
        pa.field("anisotropy", pa.float64()),
        pa.field("determinant", pa.float64()),
        pa.field("folding_fraction", pa.float64()),
        pa.field("coverage_fraction", pa.float64()),
        pa.field("displacement_median_um", pa.float64()),
        pa.field("displacement_mpp", pa.float64()),
        pa.field("error_median_um", pa.float64()),  # of the estimates in QUALITY
        pa.field("error_p90_um", pa.float64()),
        # the rigid map, [a, b, c, d, e, f]: moving_um = (a x + b y + c, d x + e y + f)
        pa.field("rigid", pa.list_(pa.float64())),
    ]
)
"""register: one row per whole-slide pair."""

QUALITY = pa.schema(
    [
        pa.field("pair", pa.string(), False),
        pa.field("x_um", pa.float64(), False),  # centre of the square on H&E
        pa.field("y_um", pa.float64(), False),
        pa.field("side_um", pa.float64(), False),
        pa.field("step_um", pa.float64(), False),  # distance of neighbouring squares
        pa.field("ncc", pa.float64(), False),  # correlation of haematoxylin in place
        pa.field("best_shifted_ncc", pa.float64(), False),  # best of 16 shifted versions
        pa.field("residual_x_um", pa.float64(), False),  # where it matches best instead
        pa.field("residual_y_um", pa.float64(), False),
    ]
)
"""register: one row per square of tissue; zero rows where there is no map."""

LANDMARKS = pa.schema(
    [
        pa.field("pair", pa.string(), False),
        pa.field("point", pa.string(), False),
        pa.field("he_x_um", pa.float64()),
        pa.field("he_y_um", pa.float64()),
        pa.field("her2_x_um", pa.float64()),
        pa.field("her2_y_um", pa.float64()),
        pa.field("predicted_x_um", pa.float64()),  # the HER2 side mapped to H&E
        pa.field("predicted_y_um", pa.float64()),
        pa.field("error_um", pa.float64()),  # of the H&E side mapped to HER2; null: no map
        pa.field("error_diagonal_fraction", pa.float64()),  # of the H&E slide
        pa.field("initial_error_um", pa.float64()),  # with the identity
        # of the prediction, on H&E; without one its unregistered HER2 coordinates count
        pa.field("official_error_um", pa.float64()),
        pa.field("official_initial_error_um", pa.float64()),  # unregistered
    ]
)
"""landmarks: one row per point, zero rows where the file gave none; metadata `reason` states why a
table has no rows or no predictions."""

LANDMARKS_COHORT = pa.schema(
    [
        # pair: one pair's figures; median, mean, std (divided by n): over the pairs
        pa.field("aggregation", pa.string(), False),
        pa.field("pair", pa.string()),  # null: of several
        pa.field("dataset", pa.string()),  # null: of all
        pa.field("pairs", pa.int64(), False),  # that have figures
        pa.field("unregistered", pa.int64(), False),  # of these, without a map
        pa.field("points", pa.int64(), False),  # with coordinates on both slides
        pa.field("error_median_um", pa.float64()),
        pa.field("error_p90_um", pa.float64()),
        pa.field("error_median_diagonal_fraction", pa.float64()),
        pa.field("error_p90_diagonal_fraction", pa.float64()),
        pa.field("initial_error_median_um", pa.float64()),
        pa.field("initial_error_p90_um", pa.float64()),
        pa.field("official_error_p90_um", pa.float64()),
        pa.field("official_error_mean_um", pa.float64()),
        pa.field("official_initial_error_p90_um", pa.float64()),
        pa.field("official_initial_error_mean_um", pa.float64()),
        pa.field("reason", pa.string()),  # why figures are lacking, in words
    ]
)
"""landmarks of the cohort: one row per pair with landmarks, then median, mean and deviation over
the pairs of all data sets and of each. ACROBAT ranks by `official_error_p90_um`: its median in
2022, its mean in 2023; the mean of `official_error_mean_um` is its mean of means."""

TILE = pa.schema(
    [
        pa.field("tile", pa.string(), False),
        pa.field("pair", pa.string(), False),
        pa.field("x_px", pa.int64(), False),
        pa.field("y_px", pa.int64(), False),
        pa.field("her2_x_px", pa.float64(), False),  # the tile's top-left on HER2
        pa.field("her2_y_px", pa.float64(), False),
        pa.field("size_px", pa.int32(), False),
        pa.field("mpp", pa.float64(), False),  # of the tile
        pa.field("he_mpp", pa.float64(), False),  # of the image
        pa.field("her2_mpp", pa.float64(), False),
        # estimated at the tile's centre; null: came registered, or not measured there
        pa.field("registration_error_um", pa.float64()),
        pa.field("registration_ncc", pa.float64()),  # correlation of haematoxylin in place
        pa.field("registration_margin", pa.float64()),  # the same less the best shifted version
        pa.field("tissue_fraction", pa.float64(), False),
        pa.field("her2_tissue_fraction", pa.float64(), False),
        pa.field("he_sharpness", pa.float64(), False),  # variance of the Laplacian, at 0.5 um/px
        pa.field("her2_sharpness", pa.float64(), False),
        pa.field("histogram_similarity", pa.float64()),  # null: one of the two is flat
        pa.field("her2_coverage_fraction", pa.float64(), False),
        pa.field("folding_fraction", pa.float64(), False),
        pa.field("shard", pa.string(), False),  # relative to the folder of results
        pa.field("he_offset", pa.int64(), False),
        pa.field("he_length", pa.int64(), False),
        pa.field("he_sha256", pa.string(), False),
        pa.field("her2_offset", pa.int64(), False),
        pa.field("her2_length", pa.int64(), False),
        pa.field("her2_sha256", pa.string(), False),
    ]
)
"""tile: one row per tile above the tissue floor."""

PAIRS = pa.schema(
    [
        pa.field("pair", pa.string(), False),
        # tiled, refused, no_tissue, unreadable
        pa.field("state", pa.string(), False),
        pa.field("reason", pa.string()),  # why it is not tiled, in words
        # registered (came so), pass, review, fail, accepted or refused by a person
        pa.field("registration", pa.string(), False),
        pa.field("tiles_grid", pa.int64(), False),  # positions on the grid inside the image
        pa.field("tiles_tissue", pa.int64(), False),  # of these, above the tissue floor
        pa.field("tiles_unreadable", pa.int64(), False),
        pa.field("tiles_written", pa.int64(), False),
    ]
)
"""tile: one row per pair, with the reason where it has no tiles."""

MASK = pa.schema(
    [
        pa.field("tile", pa.string(), False),
        pa.field("pair", pa.string(), False),
        pa.field("engine", pa.string(), False),
        pa.field("nucleus_fraction", pa.float64(), False),
        pa.field("positive_fraction", pa.float64(), False),
        pa.field("weak_fraction", pa.float64(), False),  # pixels of DAB intensity 1
        pa.field("moderate_fraction", pa.float64(), False),
        pa.field("strong_fraction", pa.float64(), False),
        pa.field("excluded_fraction", pa.float64(), False),  # pen, folds, dust
        # With the other engine with which it agrees least; null where one ran.
        pa.field("agreement_dice", pa.float64()),  # of the positive masks
        pa.field("agreement_sign", pa.float64()),  # fraction of matched cells; null: none matched
        pa.field("agreement_cells", pa.int64()),  # matched
        pa.field("cells", pa.int64(), False),
        pa.field("positive_cells", pa.int64(), False),
        pa.field("weak_cells", pa.int64(), False),
        pa.field("moderate_cells", pa.int64(), False),
        pa.field("strong_cells", pa.int64(), False),
        pa.field("note", pa.string()),  # blank: a tile without tissue
        pa.field("shard", pa.string(), False),
        pa.field("offset", pa.int64(), False),
        pa.field("length", pa.int64(), False),
        pa.field("sha256", pa.string(), False),
    ]
)
"""mask: one row per tile and engine."""

MASK_STATISTICS = tuple(MASK.names[3:17])
"""The columns of MASK that describe a mask."""

MASK_COLUMNS = (*MASK_STATISTICS, "shard", "offset", "length", "sha256")
"""The columns of MASK that tables of tiles contain per engine, as ``{engine}_{name}``."""

CELLS = pa.schema(
    [
        pa.field("tile", pa.string(), False),
        pa.field("engine", pa.string(), False),
        pa.field("cell", pa.int32(), False),
        pa.field("x_px", pa.float32(), False),  # centroid in the tile
        pa.field("y_px", pa.float32(), False),
        pa.field("area_px", pa.int32(), False),
        pa.field("positive", pa.bool_(), False),
        pa.field("intensity", pa.int8(), False),  # 0 to 3
        pa.field("completeness", pa.float32()),  # stained fraction of the membrane ring
    ]
)
"""mask: one row per cell."""

HISTORY = pa.schema(
    [
        pa.field("epoch", pa.int32(), False),  # from 1
        pa.field("part", pa.string(), False),  # train, val
        pa.field("quantity", pa.string(), False),  # a loss, a metric, the learning rate
        pa.field("value", pa.float64(), False),
    ]
)
"""train_*: one row per epoch, split and quantity."""

EVALUATION_TILES = pa.schema(
    [
        pa.field("tile", pa.string(), False),
        pa.field("case", pa.string(), False),
        pa.field("dataset", pa.string(), False),
        pa.field("score", pa.string(), False),
        pa.field("network", pa.string(), False),  # generation, segmentation
        # a generator's preset, mean_colour, blurred; segmenter, all_positive, all_negative
        pa.field("method", pa.string(), False),
        pa.field("psnr_db", pa.float64()),  # infinite: the images are equal
        pa.field("ssim", pa.float64()),  # uniform window of 7, as BCI is scored
        pa.field("ssim_gaussian", pa.float64()),  # with a Gaussian window
        pa.field("lpips", pa.float64()),  # null: no weights were named
        pa.field("true_positive_px", pa.int64()),
        pa.field("false_positive_px", pa.int64()),
        pa.field("false_negative_px", pa.int64()),
        pa.field("true_negative_px", pa.int64()),
    ]
)
"""evaluate: one row per tile, network and method."""

METRICS = pa.schema(
    [
        pa.field("network", pa.string(), False),
        # as in EVALUATION_TILES, and best_constant: the better of all_positive and all_negative
        pa.field("method", pa.string(), False),
        pa.field("group", pa.string(), False),  # all, or dataset=…, score=…, case=…
        # psnr_db, psnr_infinite, ssim, ssim_gaussian, lpips, fid, kid, precision, recall, f1, iou
        pa.field("metric", pa.string(), False),
        # mean, pooled, mean_nonempty; count: of the tiles left out of the mean of psnr_db; set: of
        # all generated against all real tiles
        pa.field("aggregation", pa.string(), False),
        pa.field("value", pa.float64()),
        # standard deviation over tiles, for means; over random subsets, for kid
        pa.field("deviation", pa.float64()),
        # bootstrap interval over cases; null: of one case, of a set, or not requested
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("tiles", pa.int64(), False),
    ]
)
"""evaluate: one row per network, method, group, metric and aggregation."""


def filtered(engines: Sequence[str]) -> pa.Schema:
    """Return the schema of filter's table of all tiles, with the statistics of `engines`."""
    mask = [
        MASK.field(name).with_name(f"{engine}_{name}").with_nullable(True)
        for engine in engines
        for name in MASK_COLUMNS
    ]
    return pa.schema(
        [
            *TILE,
            pa.field("dataset", pa.string(), False),
            pa.field("score", pa.string(), False),
            pa.field("registration", pa.string(), False),
            *mask,
            pa.field("accepted", pa.bool_(), False),
            pa.field("reason", pa.string()),  # null: accepted
        ]
    )


def index(engines: Sequence[str]) -> pa.Schema:
    """Return the schema of the index: filter's table with case, split and the subsets."""
    return pa.schema(
        [
            *filtered(engines),
            pa.field("case", pa.string(), False),
            pa.field("split", pa.string(), False),  # train, val, test
            pa.field("generation_split", pa.string()),  # train, val, test; null: not used
            pa.field("segmentation_split", pa.string()),
        ]
    )


def write(
    path: Path,
    rows: pa.Table | Iterable[Mapping[str, Any]],
    schema: pa.Schema,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a table atomically.

    Args:
        path: where it is written.
        rows: a table with the columns of the schema, or one mapping per row; a missing key is an
            empty value.
        schema: names, types and which columns have no empty values.
        metadata: key-value metadata of the file.

    Raises:
        TableError: when the rows do not fit the schema.
    """
    with translated(TableError, f"{path.name}: the rows do not fit the schema ({{error}})"):
        if not isinstance(rows, pa.Table):
            rows = pa.Table.from_pylist(list(rows), schema=schema)
        table = rows.select(schema.names).cast(schema)
        table.validate(full=True)
    table = table.replace_schema_metadata(dict(metadata) if metadata else None)
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read(path: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a table and check it against its schema.

    Args:
        path: a Parquet file.
        schema: the schema with which it was written.
        columns: the columns to read; None: all.

    Raises:
        TableError: when the file is missing, is not Parquet, lacks columns or has other types.
    """
    wanted = pa.schema([schema.field(name) for name in columns or schema.names])
    lacking = [name for name in wanted.names if name not in _stored_schema(path).names]
    if lacking:
        raise TableError(
            f"{path}: lacks the columns {', '.join(lacking)}; it is of another version, "
            "run its stage again"
        )
    with translated(TableError, f"{path}: {_UNREADABLE}"):
        table = pq.read_table(path, columns=wanted.names, partitioning=None)
    with translated(TableError, f"{path}: another version ({{error}}); run its stage again"):
        return table.select(wanted.names).cast(wanted)


def described(
    path: Path, columns: Sequence[str] | None = None
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the rows of a table `DESCRIBE` by pair and stain; a pair without rows has none."""
    found: dict[str, dict[str, dict[str, Any]]] = collections.defaultdict(dict)
    for row in read(path, DESCRIBE, columns).to_pylist():
        found[row["pair"]][row["stain"]] = row
    return found


def provenance(options: Options) -> dict[str, str]:
    """Return the metadata with the options that a table was made with."""
    values = options.model_dump()
    return {"options": json.dumps({**values, "version": type(options).version}, sort_keys=True)}


def inherited(stage: str, path: Path) -> dict[str, str]:
    """Return the options of `stage` in a table, and those of the stages before it, by stage."""
    metadata = read_metadata(path)
    found = {key: value for key, value in metadata.items() if key.startswith("options_")}
    if "options" in metadata:
        found[f"options_{stage}"] = metadata["options"]
    return found


def read_metadata(path: Path) -> dict[str, str]:
    """Return the key-value metadata of a Parquet file.

    Raises:
        TableError: when it is not a Parquet file.
    """
    raw = _stored_schema(path).metadata or {}
    return {key.decode(): value.decode() for key, value in raw.items() if key != b"ARROW:schema"}


_UNREADABLE = "not a Parquet file ({error}); delete it and run its stage again"


def _stored_schema(path: Path) -> pa.Schema:
    if not path.exists():
        raise TableError(f"{path}: no such table; run the stage that writes it")
    with translated(TableError, f"{path}: {_UNREADABLE}"):
        return pq.read_schema(path)
