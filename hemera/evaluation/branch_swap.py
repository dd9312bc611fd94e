"""How far the answers of SegmentationNet depend on its generation branch.

The branch of a tile is exchanged for that of a tile of another case, for zeros, or, where it takes
a HER2 image, for that of the real one. An answer is whether a pixel is positive.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from hemera import tables
from hemera.config import EvaluateOptions
from hemera.dataset.torch_dataset import TileDataset
from hemera.evaluation import image_quality, metrics
from hemera.evaluation.image_quality import COUNTS, SEGMENTER, Network, Rows
from hemera.evaluation.metrics import Bootstrap
from hemera.evaluation.summary import CONFIDENCE
from hemera.masks import label_format
from hemera.networks.segmentation import VIRTUAL_BRANCHES, SegmentationNet

RGB = npt.NDArray[np.uint8]

SWAPS = ("other_tile", "zeros", "real_her2")
"""What the branch is exchanged for."""


def partners(cases: Sequence[str]) -> list[int | None]:
    """Return for each of N tiles, by their cases, the position of one of another case.

    Every tile is the partner of one, unless a case has more than half of them. None: only one case.
    """
    if len(set(cases)) < 2:
        return [None] * len(cases)
    # Sorted by case, and shifted by the size of the largest.
    order = sorted(range(len(cases)), key=lambda place: cases[place])
    shift = max(Counter(cases).values())
    found: list[int | None] = [None] * len(cases)
    for rank, place in enumerate(order):
        others = [other for other in order if cases[other] != cases[place]]
        shifted = order[(rank + shift) % len(order)]
        found[place] = shifted if cases[shifted] != cases[place] else others[rank % len(others)]
    return found


def measure(
    net: Network,
    tiles: TileDataset,
    facts: Mapping[str, Mapping[str, Any]],
    device: torch.device,
    options: EvaluateOptions,
) -> Rows:
    """Return rows of `tables.EVALUATION_TILES` with the counts of the answers of each swap.

    They are of evenly spaced tiles; none for a network without a branch. A partner of another size
    gives no row.
    """
    module = net.module
    assert isinstance(module, SegmentationNet)
    if module.generation is None:
        return []
    takes_image = module.generation.branch in VIRTUAL_BRANCHES
    wanted = min(options.swap_tiles, len(tiles))
    places = np.linspace(0, len(tiles) - 1, wanted).round().astype(int).tolist()
    others = partners([facts[tiles.tiles[place]]["case"] for place in places])
    rows: Rows = []
    for place, other in zip(
        tqdm(places, "exchange the branch", unit="tile", disable=None), others, strict=True
    ):
        item = image_quality.stored(tiles, place)
        truth, valid = label_format.positive(item.mask), ~label_format.excluded(item.mask)
        with torch.inference_mode(), net.autocast(device):
            he = _unit(image_quality.input_image(net, item), device)
            own = module.branch(he)
            branches = {"zeros": {level: torch.zeros_like(maps) for level, maps in own.items()}}
            if other is not None:
                image = image_quality.input_image(net, image_quality.stored(tiles, places[other]))
                if image.shape == item.he.shape:
                    branches["other_tile"] = module.branch(_unit(image, device))
            if takes_image:
                real = item.over_white("her2") if net.normalise_background else item.her2
                branches["real_her2"] = module.branch(he, _unit(real, device))
            answers = {
                name: image_quality.to_probability(module.fuse(he, maps)[0].float().cpu())
                >= metrics.THRESHOLD
                for name, maps in (branches | {SEGMENTER: own}).items()
            }
        fact = image_quality.tile_facts(facts, item.tile, "segmentation")
        for name in (name for name in SWAPS if name in branches):
            counts = metrics.confusion(answers[name], truth, valid)
            changed = np.count_nonzero((answers[name] != answers[SEGMENTER]) & valid)
            counted = dict(zip(COUNTS, counts, strict=True)) | {"changed_px": changed}
            rows.append(fact | {"method": method(name), **counted})
    return rows


def method(swap: str) -> str:
    """Return the method of the rows of a swap."""
    return f"branch_{swap}"


def _unit(image: RGB, device: torch.device) -> Tensor:
    """Return (1, 3, H, W) in [0, 1] of (H, W, 3)."""
    return torch.from_numpy(image).permute(2, 0, 1)[None].to(device).float() / 255


def summarise(rows: Rows, answers: Rows, options: EvaluateOptions) -> Rows:
    """Return the rows of `tables.METRICS` of the swaps `rows`, over all tiles.

    ``branch_changed``: fraction of the pixels whose answer changes. ``branch_f1_change``: pooled F1
    with the swap minus that without, on the same tiles, of `answers`, rows of SegmentationNet. The
    aggregation is the swap. Intervals are from a bootstrap of the cases of the tiles.
    """
    if not rows:
        return []
    columns = tables.EVALUATION_TILES.names
    own = pd.DataFrame(answers, columns=columns)
    own = own[own["method"] == SEGMENTER].set_index("tile")
    found: Rows = []
    for name, members in pd.DataFrame(rows, columns=columns).groupby("method", sort=False):
        bootstrap = Bootstrap(
            members["case"].tolist(),
            samples=options.bootstrap_samples,
            confidence=CONFIDENCE,
            seed=options.seed,
        )
        counts = members[list(COUNTS)].to_numpy(np.float64)
        changed = np.column_stack([members["changed_px"], counts.sum(1)])
        both = np.hstack([counts, own.loc[members["tile"], list(COUNTS)]])
        for metric, columns, statistic in (
            ("branch_changed", changed, lambda sums: metrics.ratio(sums[..., 0], sums[..., 1])),
            ("branch_f1_change", both, metrics.f1_difference),
        ):
            summary = metrics.of_sums(columns, statistic, len(members), bootstrap)
            found.append(
                {
                    "network": "segmentation",
                    "method": SEGMENTER,
                    "group": "all",
                    "metric": metric,
                    "aggregation": str(name).removeprefix(method("")),
                    **summary._asdict(),
                }
            )
    return found
