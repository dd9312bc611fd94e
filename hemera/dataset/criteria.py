"""The criteria that a tile must meet, for stage filter and the report."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hemera.registration.verdict import PASS, REVIEW

ACCEPTED = "accepted"
"""In the place of a reason."""

Mask = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Criterion:
    """One bound on one column of the table of tiles, and the reason of the tiles that miss it.

    Attributes:
        option: key of section `filter` with the bound; none there: the criterion is not applied.
        column: the measure; `agreement`, `excluded` and `nuclei` are those of the mask engines;
            None: the option is a switch.
        direction: how an accepted tile compares with the bound. NaN and null meet no bound.
    """

    reason: str
    text: str
    option: str
    column: str | None = None
    direction: str = ">="

    def missed(self, values: npt.NDArray[np.float64], limit: float) -> Mask:
        """Return which values of the column do not meet a bound."""
        return ~(values >= limit if self.direction == ">=" else values <= limit)


CRITERIA = (
    Criterion("registration_review", "its pair's registration is under review", "accept_review"),
    # Sharpness comes after tissue, because the noise of an empty tile is sharp.
    Criterion("low_tissue", "too little tissue", "tissue_fraction_min", "tissue_fraction"),
    Criterion(
        "outside_her2", "HER2 does not cover it", "her2_coverage_min", "her2_coverage_fraction"
    ),
    Criterion("folded", "the displacement folds in it", "folding_max", "folding_fraction", "<="),
    Criterion(
        "misregistered",
        "registered badly at this place",
        "registration_error_max_um",
        "registration_error_um",
        "<=",
    ),
    Criterion(
        "misregistered",
        "registered badly at this place",
        "registration_margin_min",
        "registration_margin",
    ),
    *(
        Criterion(reason, text, option, f"{stain}_{kind}_fraction", "<=")
        for reason, text, option, kind in (
            ("pen", "pen on it", "pen_max", "pen"),
            # The inside of a bubble is blurred, and a border of blur may look like a fold.
            ("edge", "the edge of a bubble or of the coverslip, or a hair", "edge_max", "edge"),
            ("partly_blurred", "out of focus in part", "blur_max", "blur"),
            ("tissue_fold", "a fold of the tissue", "fold_max", "fold"),
            ("dust", "dust on it", "dust_max", "dust"),
            (
                "other_artefact",
                "an artefact in the file that the sheet names",
                "other_max",
                "other",
            ),
        )
        for stain in ("he", "her2")
    ),
    Criterion("blurred_he", "blurred on H&E", "he_sharpness_min", "he_sharpness"),
    Criterion("blurred_her2", "blurred on HER2", "her2_sharpness_min", "her2_sharpness"),
    Criterion(
        "unlike_histograms",
        "haematoxylin unlike on the two stains",
        "histogram_similarity_min",
        "histogram_similarity",
    ),
    Criterion("artefact", "an artefact covers too much of it", "excluded_max", "excluded", "<="),
    Criterion("few_nuclei", "too few nuclei", "nuclei_min_per_mm2", "nuclei"),
    Criterion("disputed_mask", "the two mask engines disagree", "require_agreement", "agreement"),
)
"""In the order in which they are applied: the first that a tile misses is its reason."""

REASONS: dict[str, Criterion] = {}
"""The reasons in order, each with the first of its criteria."""
for _criterion in CRITERIA:
    REASONS.setdefault(_criterion.reason, _criterion)

MEASURES = {
    "tissue_fraction": ("Tissue on H&E", "fraction of the tile"),
    "her2_tissue_fraction": ("Tissue on HER2", "fraction of the tile"),
    "her2_coverage_fraction": ("Covered by HER2", "fraction of the tile"),
    "he_sharpness": ("Sharpness of H&E", "variance of the Laplacian, at 0.5 µm/px"),
    "her2_sharpness": ("Sharpness of HER2", "variance of the Laplacian, at 0.5 µm/px"),
    "histogram_similarity": ("Histogram similarity", "correlation, −1 to 1"),
    "folding_fraction": ("Folded by the displacement", "fraction of the tile"),
    "registration_error_um": ("Estimated registration error", "µm"),
    "registration_margin": (
        "Registration margin",
        "correlation in place less the best shifted one",
    ),
    "alignment_margin": (
        "Alignment of pairs provided registered",
        "correlation of structure in place less the best shifted one",
    ),
}
"""Title and unit of the measures that a page shows as histograms."""


def refusals(
    table: pa.Table, limits: Mapping[str, Any], engines: Sequence[str] = ()
) -> npt.NDArray[np.str_]:
    """Return the first reason against each tile, (N,); an empty text for an accepted tile.

    Args:
        table: columns of `tables.TILE` with `dataset`, `registration` and those of `engines`.
        limits: options of stage filter, by name.
        engines: mask engines, two or more where `require_agreement` is not None.
    """
    reasons = np.full(table.num_rows, "", dtype="U24")
    for criterion in CRITERIA:
        reasons[(reasons == "") & _missed(criterion, table, limits, engines)] = criterion.reason
    return reasons


def changed_decisions(
    table: pa.Table, limits: Mapping[str, Any], engines: Sequence[str] = ()
) -> dict[tuple[str, str], int]:
    """Return how many tiles would have another decision with other limits.

    Args:
        table: table of stage filter; limits and engines as for `refusals`.

    Returns:
        Number of tiles by decision before and after: `ACCEPTED` or a reason.
    """
    before = ["" if reason is None else reason for reason in table.column("reason").to_pylist()]
    pairs = zip(before, refusals(table, limits, engines).tolist(), strict=True)
    counts = collections.Counter(
        (old or ACCEPTED, new or ACCEPTED) for old, new in pairs if old != new
    )
    return dict(counts.most_common())


def stain_refusals(table: pa.Table, limits: Mapping[str, Any], stain: str) -> npt.NDArray[np.str_]:
    """Return the first reason against each tile of one stain, (N,), which needs not the other.

    Args:
        table: columns of `tables.TILE`; a tile without this stain is refused.
        limits: tissue_fraction_min, and by option those of sharpness and artefacts that apply.
        stain: he or her2.
    """
    reasons = np.full(table.num_rows, "", dtype="U24")
    for criterion in CRITERIA:
        column = criterion.column or ""
        if column == "tissue_fraction":
            column = {"he": "tissue_fraction", "her2": "her2_tissue_fraction"}[stain]
        elif not column.startswith(f"{stain}_") or criterion.option not in limits:
            continue
        missed = criterion.missed(_column(table, column), limits[criterion.option])
        reasons[(reasons == "") & missed] = criterion.reason
    return reasons


def _missed(
    criterion: Criterion, table: pa.Table, limits: Mapping[str, Any], engines: Sequence[str]
) -> Mask:
    """Return which tiles miss a criterion, (N,)."""
    limit = limits[criterion.option]
    if criterion.column is None:
        return _is_in(table, "registration", [REVIEW]) & (not limit)
    if limit is None:
        return np.zeros(table.num_rows, np.bool_)
    if criterion.column == "agreement":
        # The least of any two engines; where no cell matched, that of the masks.
        names = [f"{engine}_agreement_{name}" for engine in engines for name in ("dice", "sign")]
        values = np.fmin.reduce([_column(table, name) for name in names])
    elif criterion.column == "excluded":
        of_engines = [_column(table, f"{engine}_excluded_fraction") for engine in engines]
        values = np.fmax.reduce(of_engines, initial=0.0)
    elif criterion.column == "nuclei":
        if not engines:
            return np.zeros(table.num_rows, np.bool_)
        values = np.fmax.reduce([_nuclei_per_mm2(table, engine) for engine in engines])
        # Where nothing is left, another criterion decides.
        values = np.nan_to_num(values, nan=limit)
    else:
        values = _column(table, criterion.column)
    missed = criterion.missed(values, limit)
    if criterion.reason == "misregistered":
        # A registered pair has no certificate, and a manually accepted pair was inspected. Of
        # the others, a position without measurement is rejected.
        certified = _is_in(table, "registration", [PASS, REVIEW])
        missed &= certified | np.isfinite(_column(table, "registration_error_um"))
    if criterion.reason == "unlike_histograms":
        missed &= _is_in(table, "dataset", limits["histogram_datasets"])
    return missed


def _nuclei_per_mm2(table: pa.Table, engine: str) -> npt.NDArray[np.float64]:
    """Return the nuclei per mm^2 of tiles without their excluded pixels, NaN without any left."""
    side_mm = _column(table, "size_px") * _column(table, "mpp") / 1000
    area = side_mm**2 * (1 - _column(table, f"{engine}_excluded_fraction"))
    return _column(table, f"{engine}_cells") / np.where(area > 0, area, np.nan)


def _column(table: pa.Table, name: str) -> npt.NDArray[np.float64]:
    values: npt.NDArray[np.float64] = table.column(name).cast(pa.float64()).to_numpy()
    return values


def _is_in(table: pa.Table, column: str, values: Sequence[str]) -> Mask:
    found = pc.is_in(table.column(column), value_set=pa.array(values, pa.string()))
    result: Mask = found.to_numpy(zero_copy_only=False)
    return result
