"""The HER2 score of ASCO/CAP from cells by staining intensity.

Wolff et al. (J Clin Oncol 36, 2018), as far as counts of cells support it: the guideline counts
tumour cells with complete membranes; here all cells of an engine count, with the intensity that
`completeness_min` of their membrane reaches. A proxy, not a diagnosis.
"""

from collections.abc import Sequence

from hemera.sheet import SCORES

FRACTION = 0.10
"""Of the cells that must be exceeded; exactly 10 % is not enough."""


def asco_cap_score(counts: Sequence[float], intense_fraction: float | None = None) -> str:
    """Return the HER2 score of counted cells; an empty text without any cell.

    `counts` are the cells of intensity 0, 1, 2 and 3. 3+ when more than `FRACTION` are strong; else
    2+ when more are moderate or strong; else 1+ when more are stained at all; else 0. With
    `intense_fraction`, 2+ also when more than that are strong, as in the guideline of 2018.
    """
    none, weak, moderate, strong = (float(count) for count in counts)
    total = none + weak + moderate + strong
    if not total > 0:
        return ""
    limit = FRACTION * total
    if strong > limit:
        return SCORES[3]
    few_intense = intense_fraction is not None and strong > intense_fraction * total
    if moderate + strong > limit or few_intense:
        return SCORES[2]
    return SCORES[1] if weak + moderate + strong > limit else SCORES[0]
