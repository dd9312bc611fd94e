"""What the histograms of haematoxylin separate: on tiles whose answer is known."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from hemera.reports.evidence import _separation


def tiles(fractions: list[float]) -> tuple[Any, dict[str, np.ndarray]]:
    """Rows of tiles, and their H&E image: blue nuclei on that fraction of the tile, in bands."""
    rows, images = [], {}
    for number, fraction in enumerate(fractions):
        rgb = np.full((64, 96, 3), (245, 244, 246), np.uint8)
        rgb[:, : round(96 * fraction)] = (120, 100, 170)
        rgb[:, -4:] = (190, 180, 215)
        images[f"t{number}"] = rgb
        rows.append({"tile": f"t{number}", "pair": f"p{number}", "dataset": "d"})
        rows[-1] |= {f"{stain}_background": [245, 244, 246] for stain in ("he", "her2")}
    return pd.DataFrame(rows), images


@pytest.mark.parametrize("moved", [0, 3])
def test_true_and_shuffled_pairs(moved: int) -> None:
    """HER2 has the histogram of its own H&E tile: 1; of that of another pair: below chance."""
    fractions = [0.1, 0.2, 0.3, 0.6, 0.75, 0.9]
    frame, images = tiles(fractions)
    names = list(images)

    def read(row: Any, stain: str) -> np.ndarray:
        place = names.index(row["tile"]) + (moved if stain == "her2" else 0)
        return images[names[place % len(names)]]

    found = _separation(frame, read)
    assert found is not None
    assert found["tiles"] == 6
    if moved:
        assert found["auc"] < 0.5
        assert found["true"] < found["wrong"]
    else:
        assert found["auc"] == 1.0
        assert found["true"] == pytest.approx(1.0)


def test_one_pair_has_nothing_to_be_shuffled_with() -> None:
    frame, images = tiles([0.3, 0.4])
    assert _separation(frame.assign(pair="p"), lambda row, _: images[row["tile"]]) is None
