"""Assign cases to splits and draw the tiles of each network, by hash; check for leakage.

Drawing ranks names by a hash of seed and name, so that an added case or tile moves few others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from hemera.errors import LeakageError


def split_cases(
    cases: Mapping[str, tuple[str, str, str]],
    *,
    seed: int,
    val_fraction: float,
    test_fraction: float,
) -> dict[str, str]:
    """Give every case a split.

    A case whose split the sheet names keeps it. The free cases of a data set are drawn, in equal
    fractions of each score, for the splits that the sheet leaves open: a data set with its own test
    cases gets no further ones, and likewise validation. At least one of the free cases trains.

    Args:
        cases: case to (data set, score, split or empty).
        seed: of the draw.
        val_fraction: fraction of a data set's free cases that goes to validation.
        test_fraction: fraction that goes to test.

    Returns:
        Case to train, val or test.
    """
    splits = {case: split for case, (_, _, split) in cases.items() if split}
    for dataset in sorted({dataset for dataset, _, _ in cases.values()}):
        own = {case: values for case, values in cases.items() if values[0] == dataset}
        named = {split for _, _, split in own.values()}
        free = _interleaved(
            {case: score for case, (_, score, split) in own.items() if not split}, seed
        )
        val = _rounded(len(free), 0.0 if "val" in named else val_fraction)
        test = _rounded(len(free), 0.0 if "test" in named else test_fraction)
        # Few cases: one at least must train, and validation goes before test.
        while val + test and val + test >= len(free):
            val, test = (val - 1, test) if val > test else (val, test - 1)
        for number, case in enumerate(free):
            splits[case] = "val" if number < val else "test" if number < val + test else "train"
    return splits


def draw(
    tiles: Sequence[str],
    datasets: Sequence[str],
    count: int | None,
    *,
    seed: int,
    purpose: str,
    shares: Mapping[str, float] | None = None,
) -> npt.NDArray[np.bool_]:
    """Draw `count` of `tiles` without replacement; all of them when count is None or too large.

    Args:
        tiles: names.
        datasets: data set of each.
        count: how many are wanted.
        seed: of the draw.
        purpose: makes draws for different ends independent.
        shares: relative number of tiles of each data set; None: as available. Fewer tiles are
            drawn when a data set has too few.

    Returns:
        Which are drawn, shape (len(tiles),).
    """
    chosen = np.zeros(len(tiles), dtype=bool)
    if not len(tiles):
        return chosen
    ranks = np.argsort(_keys(tiles, seed, purpose), kind="stable")
    if shares is None:
        chosen[ranks[: len(tiles) if count is None else count]] = True
        return chosen
    names = np.asarray(datasets)
    total = sum(shares.values())
    size = len(tiles) if count is None else count
    if count is None:
        # As many as the scarcest data set allows at these shares.
        size = min(
            int(np.count_nonzero(names == name) * total / share)
            for name, share in shares.items()
            if share
        )
    # The running sum is rounded, not each share, so that `size` are drawn and not one more.
    upto = 0.0
    for name, share in shares.items():
        first, upto = round(size * upto / total), upto + share
        own = ranks[names[ranks] == name]
        chosen[own[: round(size * upto / total) - first]] = True
    return chosen


def check_leakage(
    rows: Iterable[tuple[str, str, str, str]],
) -> None:
    """Check that no case and no source image is in two splits.

    Args:
        rows: (case, H&E file, HER2 file, split) of every pair.

    Raises:
        LeakageError: naming the first of them and the remedy.
    """
    seen: dict[tuple[str, str], str] = {}
    for case, he, her2, split in rows:
        for key in (("case", case), ("source image", he), ("source image", her2)):
            first = seen.setdefault(key, split)
            if first != split:
                raise LeakageError(
                    f"{key[0]} {key[1]}: is in {first} and in {split}; give its pairs the same "
                    "case in pairs.tsv"
                )


def _interleaved(scores: Mapping[str, str], seed: int) -> list[str]:
    """Order cases at random, with all scores evenly distributed over the order."""
    groups: dict[str, list[str]] = {}
    for case in sorted(scores, key=lambda case: _key(case, seed, "case")):
        groups.setdefault(scores[case], []).append(case)
    places = {
        case: (number + 0.5) / len(group)
        for group in groups.values()
        for number, case in enumerate(group)
    }
    return sorted(places, key=lambda case: (places[case], _key(case, seed, "case")))


def _rounded(count: int, fraction: float) -> int:
    return max(1, round(count * fraction)) if fraction > 0 and count else 0


def _key(name: str, seed: int, purpose: str) -> bytes:
    return hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).digest()[:8]


def _keys(names: Sequence[str], seed: int, purpose: str) -> npt.NDArray[np.uint64]:
    return np.frombuffer(b"".join(_key(name, seed, purpose) for name in names), dtype=">u8")
