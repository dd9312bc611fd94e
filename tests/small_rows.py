"""Rows of `tables.EVALUATION_TILES` of one method."""

import numpy as np

from hemera.evaluation import stain_quality
from hemera.evaluation.image_quality import SEGMENTER


def row(network, tile, case="c", **values):
    method = "hemera" if network == "generation" else SEGMENTER
    return {
        "tile": tile, "case": case, "dataset": "bci", "score": "2+", "network": network,
        "method": method, **values,
    }  # fmt: skip


def generated(tile, case="c", psnr_db=20.0, ssim=0.5):
    sums = np.ones(len(stain_quality.SUMS)).tolist()
    return row(
        "generation", tile, case, psnr_db=psnr_db, ssim=ssim, ssim_gaussian=0.5, stain_sums=sums
    )
