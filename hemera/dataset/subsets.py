"""The tiles of each network, and whether they may be used together."""

import logging

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hemera.config import IndexOptions
from hemera.dataset.splits import draw
from hemera.errors import LeakageError
from hemera.sheet import SPLITS

log = logging.getLogger(__name__)

Names = npt.NDArray[np.str_]

NETWORKS = ("generation", "segmentation")


def draw_subset(table: pa.Table, network: str, options: IndexOptions) -> Names:
    """Return the split of each tile for a network, (N,); an empty text for one not drawn."""
    names, accepted, datasets, splits = (
        table.column(name) for name in ("tile", "accepted", "dataset", "split")
    )
    present = set(datasets.unique().to_pylist())
    result = np.full(table.num_rows, "", "U5")
    for split in SPLITS:
        subset, key = f"{network} {split}", f"{network}_datasets"
        if network == "generation" and split == "test":
            key = "generation_test_datasets"
        wanted: tuple[str, ...] = getattr(options, key)
        pool = pc.and_(accepted, pc.equal(splits, split))
        if wanted:
            of_wanted = pc.is_in(datasets, value_set=pa.array(wanted, pa.string()))
            pool = pc.and_(pool, of_wanted)
        if absent := ", ".join(sorted(set(wanted) - present)):
            log.warning("%s: no tile is of %s; index.%s names it", subset, absent, key)
        places = np.flatnonzero(pool.to_numpy(zero_copy_only=False))
        count: int | None = getattr(options, f"{network}_{split}")
        purpose = f"{network}/{split}"
        texts = (name for chunk in names.filter(pool).chunks for name in chunk.to_pylist())
        chosen = draw(texts, count, seed=options.seed, purpose=purpose)
        result[places[chosen]] = split
        if count is not None and len(places) < count:
            log.warning(
                "%s: %d of %d requested tiles; the accepted tiles allow no more",
                subset, len(places), count,
            )  # fmt: skip
    return result


def check_subsets(cases: Names, generation: Names, segmentation: Names) -> None:
    """Check that GenerationNet has seen no test case of SegmentationNet; LeakageError otherwise.

    All are (N,): the case of each tile, and its splits by `draw_subset`.
    """
    seen = cases[np.isin(generation, ("train", "val"))]
    if both := np.intersect1d(seen, cases[segmentation == "test"]).tolist():
        raise LeakageError(
            f"case {both[0]}: GenerationNet saw it and SegmentationNet is tested on it; this is "
            "a fault of the draw, report it"
        )


def mixed_resolutions(table: pa.Table, tolerance: float) -> str:
    """Return a warning when resolutions of accepted tiles differ by more than a fraction, or ""."""
    accepted = table.select(["dataset", "mpp"]).filter(table.column("accepted"))
    grouped = accepted.group_by("dataset").aggregate([("mpp", "min"), ("mpp", "max")])
    spans = grouped.sort_by("dataset").to_pylist()
    high = max((span["mpp_max"] for span in spans), default=0.0)
    low = min((span["mpp_min"] for span in spans), default=0.0)
    if high <= low * (1 + tolerance):
        return ""
    words = []
    for span in spans:
        ends = dict.fromkeys(f"{span[end]:.3g}" for end in ("mpp_min", "mpp_max"))
        words.append(f"{span['dataset']} {' to '.join(ends)}")
    fact = (
        f"tiles of different resolution are mixed ({', '.join(words)} um/px): a network sees two "
        "scales"
    )
    log.warning("%s; tile.mpp sets one for all", fact)
    return fact
