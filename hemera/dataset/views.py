"""Views: the equal squares into which a tile is cut for an encoder."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

RGB = npt.NDArray[np.uint8]


def cut_views(
    rgb: RGB, tissue: npt.NDArray[np.bool_], split: int, tissue_min: float
) -> Iterator[tuple[int, int, RGB]]:
    """Yield row, column and pixels of the views of a tile with enough tissue.

    Args:
        rgb: the tile, (S, S, 3).
        tissue: which of its pixels are tissue, (S, S).
        split: views along a side; pixels that remain are left out.
        tissue_min: smallest tissue fraction of a view.
    """
    side = len(rgb) // split
    for i in range(split):
        for j in range(split):
            place = np.s_[i * side : (i + 1) * side, j * side : (j + 1) * side]
            if float(tissue[place].mean()) >= tissue_min:
                yield i, j, np.ascontiguousarray(rgb[place])
