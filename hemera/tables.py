"""The schema of every table, and reading and writing them.

Suffixes name units: ``_px`` pixels, ``_um`` micrometres, ``_mpp`` micrometres per pixel,
``_fraction`` a fraction, 0 to 1. ``x_px``, ``y_px`` are level-0 pixels of the slide, top-left.
No table contains a time, an absolute path or anything else that differs between equal runs.
"""

import collections
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hemera.config.base import Options
from hemera.errors import TableError
from hemera.files.atomic import replacing
from hemera.files.faults import translated

STAINS = ("he", "her2")

_LISTS = {
    f"{name}s": pa.list_(pa.type_for_alias(name))
    for name in ("uint8", "int64", "string", "float64")
}


def _schema(text: str) -> pa.Schema:
    """Return a schema of lines ``type name ...  # comment``; ``type?`` allows empty values."""
    fields = []
    for line in text.strip().splitlines():
        kind, *names = line.partition("#")[0].split()
        alias = kind.rstrip("?")
        type_ = _LISTS[alias] if alias in _LISTS else pa.type_for_alias(alias)
        fields += [pa.field(name, type_, kind.endswith("?")) for name in names]
    return pa.schema(fields)


DESCRIBE = _schema("""
    string   pair stain file
    string   verdict  # accept, refuse; wrong_stain: overridden by verdict accept in the sheet
    string?  reason  # why it is not accepted, in words
    string?  digest  # SHA-256 of its size and of an overview's pixels
    string?  content_digest  # of the file, see `files.digests`; null: no such file
    string?  stain_found  # by its colours: he, ihc; null: they do not show it
    string?  reader vendor
    int64?   width_px height_px
    int32?   level_count
    float64? mpp
    string?  mpp_source  # sheet, or the header of the file that states it
    uint8s?  background  # its colour, RGB
    bool?    background_measured  # false: no background on the image, estimated from pale tissue
    uint8s?  fill  # colours, RGB after RGB, of places without image, as corners of a rotated one
    float64? tissue_threshold  # of saturation (he) or optical density over background (her2)
    float64? tissue_fraction tissue_area_um2 tissue_mpp
    float64? tissue_density  # 75th percentile over the tissue, mean of the channels
    float64? artefact_fraction  # of the tissue
    binary?  artefacts  # PNG of numbers of `imaging.artefacts.KINDS`, at tissue_mpp; null: none
    binary?  tissue  # PNG, 0 or 255, the image at tissue_mpp
    float64? alignment_ncc  # of HER2 that comes registered: correlation of structure in place
    float64? alignment_margin  # the same less the best of 48 shifted positions
    float64? alignment_others  # fraction of the unit's other HER2 images that match as well
    binary?  thumbnail  # JPEG
    float64? thumbnail_mpp
""")
"""describe: one row per image of a unit."""

CERTIFICATE = _schema("""
    string   pair
    string   verdict  # pass, review, fail
    string?  reason  # why it is not pass, in words
    string   engine  # deeperhistreg; own: a map made elsewhere
    string?  engine_version preset
    int32?   size_px  # shortest side of the canvas
    strings? attempts  # each attempt and its result
    string?  map  # nonrigid, rigid: which was kept; own, none
    bool?    mirrored  # the map mirrors
    string?  mirrored_by  # sheet, or probe: found against the sheet
    int64?   match_count
    float64? match_fraction
    float64? keypoint_fraction keypoint_error_um  # matches that the map was not fitted to
    float64? keypoint_error_low_um keypoint_error_high_um  # 90 % of them are between
    float64? mirror_probe  # matches over those of the mirror image
    float64? tile_ok misaligned_fraction lncc ncc ncc_margin
    float64? rotation_deg scale anisotropy determinant
    float64? folding_fraction coverage_fraction displacement_median_um displacement_mpp
    float64? error_median_um error_p90_um  # of the estimates in QUALITY
    float64s? rigid  # [a, b, c, d, e, f]: moving_um = (a x + b y + c, d x + e y + f)
""")
"""register: one row per whole-slide pair."""

QUALITY = _schema("""
    string   pair
    float64  x_um y_um  # centre of the square on H&E
    float64  side_um
    float64  step_um  # distance of neighbouring squares
    float64  ncc  # correlation of haematoxylin in place
    float64  best_shifted_ncc  # best of 16 shifted versions
    float64  residual_x_um residual_y_um  # where it matches best instead
    float64  spread_um  # expected distance of the best match
""")
"""register: one row per square of tissue; zero rows where there is no map."""

LANDMARKS = _schema("""
    string   pair point
    float64? he_x_um he_y_um her2_x_um her2_y_um
    float64? predicted_x_um predicted_y_um  # the HER2 side mapped to H&E
    float64? error_um  # of the H&E side mapped to HER2; null: no map
    float64? error_diagonal_fraction  # of the H&E slide
    float64? initial_error_um  # with the identity
    float64? official_error_um  # of the prediction, on H&E; without one, as unregistered
    float64? official_initial_error_um  # unregistered
""")
"""landmarks: one row per point, zero rows where the file gave none; metadata `reason` states why a
table has no rows or no predictions."""

LANDMARKS_COHORT = _schema("""
    string   aggregation  # pair; median, mean, std (divided by n): over the pairs
    string?  pair  # null: of several
    string?  dataset  # null: of all
    int64    pairs  # that have figures
    int64    unregistered  # of these, without a map
    int64    points  # with coordinates on both slides
    float64? error_median_um error_p90_um
    float64? error_median_diagonal_fraction error_p90_diagonal_fraction
    float64? initial_error_median_um initial_error_p90_um
    float64? official_error_p90_um official_error_mean_um
    float64? official_initial_error_p90_um official_initial_error_mean_um
    string?  reason  # why figures are lacking, in words
""")
"""landmarks of the cohort: one row per pair with landmarks, then median, mean and deviation over
the pairs of all data sets and of each. ACROBAT ranks by `official_error_p90_um`: its median in
2022, its mean in 2023; the mean of `official_error_mean_um` is its mean of means."""

TILE = _schema("""
    string   tile pair
    int64    x_px y_px
    float64? her2_x_px her2_y_px  # the tile's top-left on HER2; null, as all of HER2: H&E alone
    int32    size_px
    float64  mpp he_mpp  # of the tile and of H&E
    float64? her2_mpp
    float64? registration_error_um  # at the tile's centre; null: came registered, or not measured
    float64? registration_error_low_um registration_error_high_um  # with a probability of 90 %
    float64? registration_ncc  # correlation of haematoxylin in place
    float64? registration_margin  # the same less the best shifted version
    float64  tissue_fraction
    float64? her2_tissue_fraction
    float64  he_sharpness  # variance of the Laplacian, at 0.5 um/px
    float64? her2_sharpness
    float64? histogram_similarity  # null: one of the two is flat
    float64? alignment_margin  # of a pair that comes registered, as in DESCRIBE
    uint8s   he_background  # its colour, RGB, of the slide or source image
    uint8s?  her2_background
    float64  he_pen_fraction
    float64? her2_pen_fraction
    float64  he_fold_fraction
    float64? her2_fold_fraction
    float64  he_edge_fraction  # of bubbles and of the coverslip, hairs
    float64? her2_edge_fraction
    float64  he_dust_fraction
    float64? her2_dust_fraction
    float64  he_other_fraction  # of a mask that the sheet gives, without kinds
    float64? her2_other_fraction
    float64  he_blur_fraction  # of 4 x 4 cells of the tile
    float64? her2_blur_fraction
    binary?  artefacts  # PNG of `dataset.excluded`: what the mask excludes; null: nothing
    float64? her2_coverage_fraction folding_fraction
    string   shard  # relative to the folder of results
    int64    he_offset he_length
    string   he_sha256
    int64?   her2_offset her2_length
    string?  her2_sha256
""")
"""tile: one row per tile above the tissue floor."""

PAIRS = _schema("""
    string   pair
    string   state  # tiled, refused, wrong_stain, no_tissue, unreadable
    string?  reason  # why it is not tiled, in words
    string   registration  # registered (came so), pass, review, fail, accepted, refused, he_only
    int64    tiles_grid  # positions on the grid inside the image
    int64    tiles_tissue  # of these, above the tissue floor
    int64    tiles_artefact  # of these, not read: under pen, a fold or an edge on H&E
    int64    tiles_unreadable tiles_written
""")
"""tile: one row per pair, with the reason where it has no tiles."""

MASK = _schema("""
    string   tile pair engine
    float64  nucleus_fraction positive_fraction
    float64  weak_fraction moderate_fraction strong_fraction  # pixels of DAB intensity 1, 2, 3
    float64  excluded_fraction  # pen, folds, dust
    float64? agreement_dice  # of positive masks, with the engine that agrees least; null: one ran
    float64? agreement_sign  # likewise, fraction of matched cells; null: none matched
    int64?   agreement_cells  # matched
    int64    cells positive_cells weak_cells moderate_cells strong_cells
    float64? h_score  # 0 to 300; null: no cells
    float64? membrane_od cytoplasm_od  # means of CELLS; null: no cells, or not measured
    string?  note  # deepliif: blank, without tissue; stain: what its pair does not show
    string   shard
    int64    offset length
    string   sha256
""")
"""mask: one row per tile and engine."""

MASK_STATISTICS = tuple(MASK.names[3:20])
"""The columns of MASK that describe a mask."""

MASK_COLUMNS = (*MASK_STATISTICS, "shard", "offset", "length", "sha256")
"""The columns of MASK that tables of tiles contain per engine, as ``{engine}_{name}``."""

CELLS = _schema("""
    string   tile engine
    int32    cell
    float32  x_px y_px  # centroid in the tile
    int32    area_px
    bool     positive
    int8     intensity  # 0 to 3
    float32? completeness  # stained fraction of the membrane ring
    float32? membrane_od  # DAB density that the membrane adds to that of the cytoplasm
    float32? cytoplasm_od nucleus_od  # DAB density of the rest of the cell: diffuse staining
""")
"""mask: one row per cell. Densities are above background; null: not measured."""

STAINING = _schema("""
    string   engine case dataset score
    int64    tiles cells  # accepted tiles
    string   blocks  # behind the interval: tiles; quarters of fewer than four tiles; empty: none
    float64? h_score h_score_low h_score_high  # 90 % interval
    float64? membrane_od membrane_od_low membrane_od_high cytoplasm_od  # means over the cells
    float64? probability_0 probability_ultralow probability_1 probability_2 probability_3
""")
"""report: one row per engine and case."""

HISTORY = _schema("""
    int32    epoch  # from 1
    string   part  # train, val
    string   quantity  # a loss, a metric, the learning rate
    float64  value
""")
"""train_*: one row per epoch, split and quantity."""

EVALUATION_TILES = _schema("""
    string   tile case dataset score
    string   network  # generation, segmentation
    string   method  # a preset, mean_colour, blurred; segmenter, branch_..., all_positive, ...
    float64? psnr_db  # infinite: the images are equal
    float64? ssim  # uniform window of 7, as BCI is scored
    float64? ssim_gaussian  # with a Gaussian window
    float64? lpips  # null: no weights were named
    float64s? stain_sums  # of `evaluation.stain_quality.tile_sums`
    int64s?  cells cells_real  # of intensity 0 to 3, of both images; null: not compared
    int64?   positive_cells positive_cells_real matched_cells
    int64?   true_positive_px false_positive_px false_negative_px true_negative_px
    int64?   changed_px  # answers that change with another branch, see `evaluation.branch_swap`
""")
"""evaluate: one row per tile, network and method."""

METRICS = _schema("""
    string   network
    string   method  # and best_constant: the better of all_positive and all_negative
    string   group  # all, or dataset=…, score=…, case=…
    string   metric  # a column of EVALUATION_TILES, psnr_infinite, fid, f1, branch_changed...
    string   aggregation  # mean, pooled, mean_nonempty, empty, tiles, cases, set, count, a swap
    float64? value
    float64? deviation  # over tiles, for means; over random subsets, for kid
    float64? low high  # bootstrap interval over cases; null: of one case, of a set, not requested
    int64    tiles
""")
"""evaluate: one row per network, method, group, metric and aggregation."""


STATUS_CASES = _schema("""
    string   case dataset
    string?  site  # null: not in the sheet
    string   split  # train, val, test of the sheet; empty: none
    int32?   fold  # null: of the test split, or not used
    string?  score status
    string?  label_source  # status: of the sheet; score: derived from it; null: no status
    int64    pairs he_tiles  # images; accepted H&E tiles
    string   state  # used, unlabelled, equivocal, no_tiles, too_few
    string?  reason  # why it is not used, in words
""")
"""cases: one row per case. A case that has a score and tiles, but no status, has a fold as well."""

STATUS_TILES = _schema("""
    string   tile pair case unit
    string   he_sha256
    bool     accepted  # by the limits of section cases, which need no HER2
    string?  reason
""")
"""cases: one row per tile."""

STATUS_PREDICTIONS = _schema("""
    string   case method
    string   target  # status, score
    string   part  # oof: by cross-validation; test: the test split; site_out; shuffled
    int32?   fold  # null: of all folds
    string?  left_out  # the site that was left out of training
    int32    repeat  # of shuffled, from 0
    string   truth predicted  # negative, positive; 0, 1+, 2+, 3+
    float64  logit bias  # of status: logit = bias + contributions; of score: of more than 1+
    float64  probability  # of positive; of more than 1+
    float64? calibrated  # the same after temperature
    float64? threshold  # from which it is positive
    float64? p0 p1 p2 p3  # probabilities of the scores
    int32    models  # over which it is averaged
""")
"""aggregate: one row per case, target, part and repetition."""

CONTRIBUTIONS = _schema("""
    string   case pair tile
    int64    x_px y_px  # of the view, level-0 pixels of H&E
    float64  size_px  # likewise
    float64  attention  # times the number of views: 1 is even
    float64  contribution  # to the logit of STATUS_PREDICTIONS
""")
"""aggregate: one row per view and case whose status was predicted by models that did not see it."""

STATUS_METRICS = _schema("""
    string   method  # and majority, all_positive, all_negative
    string   target part  # as in STATUS_PREDICTIONS
    string   group  # all, or dataset=…, site=…, score=…
    string   metric
    float64? value low high
    int64    cases positive
""")
"""evaluate_status: one row per method, target, part, group and metric."""


def filtered(engines: Sequence[str]) -> pa.Schema:
    """Return the schema of filter's table of all tiles, with the statistics of `engines`."""
    mask = [
        MASK.field(name).with_name(f"{engine}_{name}").with_nullable(True)
        for engine in engines
        for name in MASK_COLUMNS
    ]
    named = _schema("string dataset score registration")
    accepted = _schema("""
        bool    accepted
        string? reason  # null: accepted
    """)
    return pa.schema([*TILE, *named, *mask, *accepted])


def index(engines: Sequence[str]) -> pa.Schema:
    """Return the schema of the index: filter's table with case, split and the subsets."""
    added = _schema("""
        string  case
        string  split  # train, val, test
        string? generation_split segmentation_split  # null: not used
    """)
    return pa.schema([*filtered(engines), *added])


def write(
    path: Path,
    rows: pa.Table | Iterable[Mapping[str, Any]],
    schema: pa.Schema,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a table atomically; a missing key of a row is an empty value.

    Raises:
        TableError: when the rows do not fit the schema.
    """
    if not isinstance(rows, pa.Table):
        with translated(TableError, f"{path.name}: {_MISFIT}"):
            rows = _table(list(rows), schema)
    write_parts(path, [rows], schema, metadata)


def write_parts(
    path: Path,
    parts: Iterable[pa.Table],
    schema: pa.Schema,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a table atomically from consecutive parts, of which one at a time is in memory.

    Raises:
        TableError: when the rows do not fit the schema.
    """
    stored = schema.with_metadata(dict(metadata) if metadata else None)
    with (
        replacing(path) as temporary,
        pq.ParquetWriter(temporary, stored, compression="zstd", write_page_checksum=True) as writer,
    ):
        for part in parts:
            with translated(TableError, f"{path.name}: {_MISFIT}"):
                table = part.select(schema.names).cast(schema)
                table.validate(full=True)
            writer.write_table(table.replace_schema_metadata(stored.metadata))


def _table(rows: list[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    unknown = set().union(*rows) - set(schema.names)
    if unknown:
        raise ValueError(f"unknown columns {', '.join(sorted(unknown))}")
    table = pa.Table.from_pylist(rows, schema=schema)
    for field in schema:
        if pa.types.is_integer(field.type):
            # from_pylist cuts fractions without an error; cast does not.
            pa.array([row.get(field.name) for row in rows]).cast(field.type)
    return table


def read(path: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a table, or some of its columns, and check it against its schema.

    Raises:
        TableError: when the file is missing, is not Parquet, lacks columns or has other types.
    """
    wanted = _wanted(path, schema, columns)
    # pyarrow.parquet.read_table imports pandas: 1.5 s at the start of a job.
    with (
        translated(TableError, f"{path}: {_UNREADABLE}"),
        pq.ParquetFile(path, page_checksum_verification=True) as file,
    ):
        table = file.read(columns=wanted.names)
    return _checked(path, table, wanted)


def read_parts(
    path: Path, schema: pa.Schema, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """Yield a table, or some of its columns, in the parts in which it was written.

    Raises:
        TableError: as `read` does.
    """
    wanted = _wanted(path, schema, columns)
    with translated(TableError, f"{path}: {_UNREADABLE}"):
        file = pq.ParquetFile(path, page_checksum_verification=True)
    with file:
        for number in range(file.num_row_groups):
            with translated(TableError, f"{path}: {_UNREADABLE}"):
                table = file.read_row_group(number, columns=wanted.names)
            yield _checked(path, table, wanted)


def _wanted(path: Path, schema: pa.Schema, columns: Sequence[str] | None) -> pa.Schema:
    """Return the schema of the wanted columns; TableError where the file lacks one."""
    wanted = pa.schema([schema.field(name) for name in columns or schema.names])
    with translated(TableError, f"{path}: {_UNREADABLE}"):
        # In a damaged file, names are not UTF-8.
        stored = set(_stored_schema(path).names)
    lacking = [name for name in wanted.names if name not in stored]
    if lacking:
        raise TableError(f"{path}: no columns {', '.join(lacking)}; run its stage again")
    return wanted


def _checked(path: Path, table: pa.Table, wanted: pa.Schema) -> pa.Table:
    with translated(TableError, f"{path}: another version ({{error}}); run its stage again"):
        return table.select(wanted.names).cast(wanted)


def described(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the rows of a table `DESCRIBE` by pair and stain; a pair without rows has none."""
    found: dict[str, dict[str, dict[str, Any]]] = collections.defaultdict(dict)
    for row in read(path, DESCRIBE).to_pylist():
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
    """Return the key-value metadata of a Parquet file."""
    raw = _stored_schema(path).metadata or {}
    with translated(TableError, f"{path}: {_UNREADABLE}"):
        return {
            key.decode(): value.decode() for key, value in raw.items() if key != b"ARROW:schema"
        }


def mask_engines(index: Path) -> list[str]:
    """Return the mask engines of an index, in the order of its columns."""
    with translated(TableError, f"{index}: its mask engines are not a list ({{error}}); {_AGAIN}"):
        names = json.loads(read_metadata(index)["mask_engines"])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(names)
    return names


_AGAIN = "run index again"
_MISFIT = "the rows do not fit the schema ({error})"
_UNREADABLE = "not a Parquet file ({error}); delete it and run its stage again"


def _stored_schema(path: Path) -> pa.Schema:
    if not path.exists():
        raise TableError(f"{path}: no such table; run the stage that writes it")
    with translated(TableError, f"{path}: {_UNREADABLE}"):
        return pq.read_schema(path)
