"""Nuclear markers such as Ki67, ER and PR: DAB inside the nuclei."""

import numpy as np
import numpy.typing as npt

from hemera.config import MaskOptions
from hemera.imaging.morphology import smoothed
from hemera.masks import label_format
from hemera.masks.stain import Options
from hemera.masks.stain.nuclei import Nuclei
from hemera.masks.stain.stains import SMOOTHING_UM, Stains

Float = npt.NDArray[np.float32]

# Weight of DAB beside haematoxylin in the density from which nuclei are segmented: a brown nucleus
# covers its counterstain only in part.
_DAB_WEIGHT = 0.35
# Fraction of the haematoxylin of dark nuclei that the separation may show as DAB.
_LEAK = 0.25
# Smallest fraction of a nucleus that reaches its class.
_STAINED_MIN = 0.5


def nuclear_stain(separated: Float) -> Float:
    """Return the density (H, W) of what stains nuclei: haematoxylin, and DAB of a lower weight."""
    positive = np.maximum(separated[..., :2], 0)
    return np.asarray(positive[..., 0] + np.float32(_DAB_WEIGHT) * positive[..., 1], np.float32)


def measure_nuclei(
    nuclei: Nuclei,
    separated: Float,
    mpp: float,
    stains: Stains,
    options: Options,
    shared: MaskOptions,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32], label_format.Cells]:
    """Grade every nucleus by its median DAB: the strongest class that half of its pixels reach.

    The median, because the outline of a negative nucleus may contain a part of a positive one that
    touches it. DAB is stained from `options.nucleus_dab` times the dark DAB of the slide: so the
    sign does not depend on how dark the slide was stained and scanned. It must also exceed what the
    separation leaves of the haematoxylin of dark nuclei. Moderate and strong are the common
    thresholds of DAB.

    Args:
        nuclei: of a tile (H, W).
        separated: (H, W, 3) densities, see `stains.separate`.
        mpp: resolution of both, um/px.
        stains: that the tile was separated with.
        options: threshold of a positive nucleus.
        shared: thresholds of moderate and strong, width of a cell around its nucleus.

    Returns:
        The DAB class of every pixel of a nucleus (H, W), 0 elsewhere; the cells (H, W), every
        nucleus with its ring; their table, where completeness is the stained fraction of a nucleus.
    """
    labels = nuclei.labels
    count = int(labels.max(initial=0))
    weak = max(options.nucleus_dab * stains.dark_dab, _LEAK * stains.nuclear_density)
    levels = np.array([weak, max(weak, shared.dab_moderate), max(weak, shared.dab_strong)])
    at = np.flatnonzero(labels != 0)
    of = labels.ravel()[at]
    y, x = np.divmod(at, labels.shape[1])
    dab = np.ascontiguousarray(separated[..., 1])
    stained = np.zeros(labels.shape, np.uint8)
    smooth = smoothed(dab, mpp, SMOOTHING_UM).ravel()[at]
    classes = np.searchsorted(levels, smooth, side="right").astype(np.uint8)
    stained.ravel()[at] = classes
    area = np.bincount(of, minlength=count + 1)[1:]
    mean = np.bincount(of, dab.ravel()[at], count + 1)[1:] / np.maximum(area, 1)
    fractions = np.array(
        [np.bincount(of, classes >= c, count + 1)[1:] / np.maximum(area, 1) for c in (1, 2, 3)]
    )
    grown = np.where(nuclei.depth_px >= -shared.ring_um / mpp, nuclei.regions, 0)
    ring = np.flatnonzero((grown != 0) & (labels == 0))
    around = grown.ravel()[ring]
    pixels = np.maximum(np.bincount(around, minlength=count + 1)[1:], 1)
    outside = np.bincount(around, dab.ravel()[ring], count + 1)[1:] / pixels
    return (
        stained,
        grown,
        label_format.Cells(
            x_px=(np.bincount(of, x, count + 1)[1:] / np.maximum(area, 1) + 0.5).astype(np.float32),
            y_px=(np.bincount(of, y, count + 1)[1:] / np.maximum(area, 1) + 0.5).astype(np.float32),
            area_px=area.astype(np.int32),
            positive=fractions[0] >= _STAINED_MIN,
            intensity=(fractions >= _STAINED_MIN).sum(axis=0).astype(np.uint8),
            completeness=fractions[0].astype(np.float32),
            membrane_od=np.full(count, np.nan, np.float32),
            cytoplasm_od=outside.astype(np.float32),
            nucleus_od=mean.astype(np.float32),
        ),
    )
