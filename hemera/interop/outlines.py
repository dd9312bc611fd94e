"""Outlines of a mask that comes band by band: whole polygons with holes, whatever the height.

Frame: pixels of the mask whose edges are the integers, x to the right, y down. Outlines run along
the edges of pixels, so the area of a polygon is its count of pixels, exactly.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import numpy.typing as npt
import scipy.sparse
import scipy.sparse.csgraph

Ring = npt.NDArray[np.int64]
"""(N, 2) corners (x, y); the first is not repeated."""

# A corner of the outline is known by which of its four pixels are set: 1 above left, 2 above
# right, 4 below left, 8 below right. The set pixels lie to the right of who walks the outline.
_TURNS = (1, 2, 4, 8, 7, 11, 13, 14, 6, 9)
_LEAVES_ALONG_X = (1, 8, 11, 13)
_EDGE_BELOW = (4, 8, 7, 11)
_PIXEL = {1: (0, -1), 2: (0, 0), 4: (1, -1), 8: (1, 0), 7: (0, -1), 11: (0, 0), 13: (0, -1),
          14: (1, 0)}  # fmt: skip
"""A set pixel at the corner, as row (0 above) and column (0 right)."""
_PARTED = {6: (4, 2), 9: (1, 8)}
"""Pixels that meet in a corner alone are two regions; that corner is two, the left one first."""


def _table(codes: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    return np.isin(np.arange(16), codes)


_IS_TURN, _IS_PARTED = _table(_TURNS), _table(tuple(_PARTED))
_ALONG_X, _BELOW = _table(_LEAVES_ALONG_X), _table(_EDGE_BELOW)
_ROW, _COLUMN = (
    np.array([_PIXEL.get(code, (0, 0))[axis] for code in range(16)]) for axis in (0, 1)
)


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """Pixels that hang together by their edges."""

    rings: list[Ring]
    """The outer one, clockwise as it is seen, then the holes, counter-clockwise."""
    area_px: int


@dataclasses.dataclass(eq=False)
class _Piece:
    """A part of an outline whose two ends lie below what was seen so far."""

    head_x: int
    """Where the outline comes up from below."""
    tail_x: int
    """Where it goes down again."""
    parts: list[Ring]
    group: int


class Outlines:
    """Traces the regions of a mask of any height, given its rows from top to bottom.

    It holds the outlines of the regions that the last row touches, and nothing of the others.
    """

    def __init__(self, width: int) -> None:
        """Begin above the first row of a mask so wide."""
        self._width = width
        self._top = 0
        self._last = np.zeros(width, np.int32)  # of the last row: the number of its region, from 1
        self._rings: list[list[Ring]] = []  # of these regions, the outlines that are closed
        self._pieces: list[_Piece] = []

    def add(self, band: npt.NDArray[np.bool_]) -> list[Region]:
        """Take the next rows, (H, width); return the regions that end in or above them."""
        if not (self._last.any() or band.any()):
            self._top += len(band)
            return []
        number, found = cv2.connectedComponents(
            band.astype(np.uint8), connectivity=4, ltype=cv2.CV_32S
        )
        count = number - 1
        above = np.where(self._last > 0, self._last + count, 0)
        labels = np.vstack([above, found]).astype(np.int32, copy=False)
        groups, rings = self._joined(labels, count)
        self._walk(labels, groups, rings)
        last = groups[labels[-1]]
        kept = np.unique(last[labels[-1] > 0])
        unfinished = set(kept.tolist())
        regions = [
            _region(own) for group, own in enumerate(rings) if own and group not in unfinished
        ]
        renumbered = np.zeros(len(rings) + 1, np.int32)
        renumbered[kept] = np.arange(1, len(kept) + 1)
        self._last = np.where(labels[-1] > 0, renumbered[last], 0).astype(np.int32)
        self._rings = [rings[number] for number in kept]
        for piece in self._pieces:
            piece.group = int(renumbered[piece.group])
        self._top += len(band)
        return regions

    def close(self) -> list[Region]:
        """Return the regions that the last row touches."""
        return self.add(np.zeros((1, self._width), np.bool_))

    def _joined(
        self, labels: npt.NDArray[np.int32], count: int
    ) -> tuple[npt.NDArray[np.int64], list[list[Ring]]]:
        """Return of each label the number of its region, and what is closed of each region."""
        total = count + len(self._rings) + 1
        both = (labels[0] > 0) & (labels[1] > 0)
        above, below = labels[0][both], labels[1][both]
        links = scipy.sparse.coo_array(
            (np.ones(len(above), np.int8), (above, below)), shape=(total, total)
        )
        number, groups = scipy.sparse.csgraph.connected_components(links, directed=False)
        rings: list[list[Ring]] = [[] for _ in range(number)]
        for old, closed in enumerate(self._rings):
            rings[groups[count + 1 + old]] += closed
        for piece in self._pieces:
            piece.group = int(groups[count + piece.group])
        return groups.astype(np.int64), rings

    def _walk(
        self,
        labels: npt.NDArray[np.int32],
        groups: npt.NDArray[np.int64],
        rings: list[list[Ring]],
    ) -> None:
        """Follow the outlines through the band, from corner to corner."""
        x, y, codes = _corners(labels > 0)
        count, pieces = len(x), self._pieces
        # Behind the corners stand the ends of the pieces: head, tail, head, tail, ...
        ends = np.array([[piece.head_x, piece.tail_x] for piece in pieces], np.int64).ravel()
        all_x = np.concatenate([x, ends])
        all_y = np.concatenate([y, np.full(len(ends), -1)])
        below = np.concatenate([_BELOW[codes], np.ones(len(ends), np.bool_)])
        along_x = _ALONG_X[codes]
        # Down a column, an edge begins at every second corner and ends at the next.
        order = np.lexsort([below, all_y, all_x])
        begins = np.flatnonzero(below[order])
        begins = begins[begins + 1 < len(order)]
        ends_at = order[begins + 1]
        met = (all_x[ends_at] == all_x[order[begins]]) & ~below[ends_at]
        partner = np.full(len(all_x), -1)
        partner[order[begins[met]]] = ends_at[met]
        partner[ends_at[met]] = order[begins[met]]
        following = partner.copy()
        # Along a line, edges do the same, and the corners stand in this order.
        following[:count][along_x] = np.flatnonzero(along_x) ^ 1
        following[count::2] = np.arange(count + 1, len(all_x), 2)
        open_ = partner < 0
        heads = np.concatenate([along_x, np.arange(len(ends)) % 2 == 0]) & open_
        steps = following.tolist()
        seen = bytearray(len(steps))
        points = np.stack([x, y + self._top], axis=1)
        group_of = groups[labels[y + _ROW[codes], x + _COLUMN[codes]]]

        def path(start: int) -> list[int]:
            found, at = [], start
            while at >= 0 and not seen[at]:
                seen[at] = 1
                found.append(at)
                at = steps[at]
            return found

        def parts(found: list[int]) -> list[Ring]:
            nodes = np.array(found)
            cuts = np.flatnonzero(nodes >= count)
            if not len(cuts):
                return [points[nodes]]
            result: list[Ring] = []
            begin = 0
            for cut in cuts.tolist():
                if cut > begin:
                    result.append(points[nodes[begin:cut]])
                if (nodes[cut] - count) % 2 == 0:
                    result += pieces[(nodes[cut] - count) // 2].parts
                begin = cut + 1
            if begin < len(nodes):
                result.append(points[nodes[begin:]])
            return result

        def group(node: int) -> int:
            return int(group_of[node]) if node < count else pieces[(node - count) // 2].group

        self._pieces = []
        for start in np.flatnonzero(heads).tolist():
            found = path(start)
            self._pieces.append(
                _Piece(int(all_x[start]), int(all_x[found[-1]]), parts(found), group(start))
            )
        for start in range(len(steps)):
            if not seen[start]:
                rings[group(start)].append(np.concatenate(parts(path(start))))


def _corners(
    mask: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Return where outlines turn on the lines below every row but the last: x, line, kind."""
    pixels = np.pad(mask, ((0, 0), (1, 1))).view(np.uint8)
    codes = pixels[:-1, :-1] + 2 * pixels[:-1, 1:] + 4 * pixels[1:, :-1] + 8 * pixels[1:, 1:]
    y, x = np.nonzero(_IS_TURN[codes])
    found = codes[y, x]
    parted = _IS_PARTED[found]
    twice = np.repeat(np.arange(len(found)), 1 + parted)
    x, y, kinds = x[twice], y[twice], found[twice]
    second = np.flatnonzero(np.diff(twice, prepend=-1) == 0)
    for code, (left, right) in _PARTED.items():
        own = second[kinds[second] == code]
        kinds[own - 1], kinds[own] = left, right
    return x, y, kinds


def _region(rings: list[Ring]) -> Region:
    """Put a region's rings together, each cut where it touches itself."""
    parts = [part for ring in rings for part in _simple(ring)]
    areas = [_area(part) for part in parts]
    first = int(np.argmax(areas))
    return Region([parts[first], *parts[:first], *parts[first + 1 :]], sum(areas))


def _area(ring: Ring) -> int:
    """Return the area of a ring along the axes, negative for a hole."""
    x, y = ring[:, 0], ring[:, 1]
    return int(x @ np.roll(y, -1) - y @ np.roll(x, -1)) // 2


def _simple(ring: Ring) -> list[Ring]:
    """Cut a ring into rings that come to no point twice."""
    points = [(x, y) for x, y in ring.tolist()]
    if len(set(points)) == len(points):
        return [ring]
    result: list[Ring] = []
    way: list[tuple[int, int]] = []
    place: dict[tuple[int, int], int] = {}
    for point in points:
        if point in place:
            start = place[point]
            result.append(np.array(way[start:], np.int64))
            for gone in way[start + 1 :]:
                del place[gone]
            del way[start + 1 :]
        else:
            place[point] = len(way)
            way.append(point)
    result.append(np.array(way, np.int64))
    return result
