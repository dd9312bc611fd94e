"""What papers and repositories report, to stand beside what is measured here."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure that a source reports, and how far ours may be held against it.

    `values` are as the source prints them: PSNR in dB, SSIM and FID of a generator (empty: not
    reported), or precision, recall, F1 and IoU of a segmentation.
    """

    method: str
    values: tuple[str, ...]
    source: str
    comparable: str


_RERUN = "third-party report"
_VP_GAN = "no: other images and sizes; its FID is not on the usual scale"

PAPERS = {
    "generation": (
        Figure(
            "HEMERA GenerationNet",
            ("21.669", ".355", ""),
            "the paper",
            "1,000 BCI tiles of 512 px, which ones is not said",
        ),
        Figure(
            "Pyramid Pix2pix",
            ("21.160", ".477", ""),
            "its README; quoted by HEMERA as reference",
            "no: all of BCI, another generator; not reached by reruns",
        ),
        Figure(
            "Pyramid Pix2pix, rerun at 1024 px",
            ("18.659", ".4771", ""),
            _RERUN,
            "no: whole images of 1024 px",
        ),
        Figure(
            "Pyramid Pix2pix, rerun by its default test",
            ("18.064", ".3674", ""),
            _RERUN,
            "no: shrunk to 320 px and cropped to 256",
        ),
        Figure("PSPStain", ("18.622", ".4498", ""), "its paper", "no: whole images of 1024 px"),
        Figure("PSPStain, rerun", ("19.308", ".4553", ""), _RERUN, "no: whole images of 1024 px"),
        Figure(
            "BCIStainer, submitted",
            ("22.929", ".5585", ""),
            "its repository",
            "no: averages over turned inputs, which blurs and raises both",
        ),
        Figure(
            "BCIStainer, its best",
            ("23.394", ".5833", ""),
            "its repository",
            "no: averages over turned inputs, which blurs and raises both",
        ),
        Figure(
            "BCIStainer, input not turned",
            ("22.812", ".5273", ""),
            "its repository",
            "no: other images and sizes",
        ),
        Figure("VP-GAN", ("22.16", ".47", "346.37"), "its paper", _VP_GAN),
        Figure(
            "Pyramid Pix2pix, by VP-GAN's authors",
            ("21.15", ".43", "516.75"),
            "VP-GAN's paper",
            _VP_GAN,
        ),
        Figure(
            "pix2pix, by VP-GAN's authors", ("20.74", ".44", "472.6"), "VP-GAN's paper", _VP_GAN
        ),
        Figure("ASP, on MIST", ("14.54", ".216", "66.0"), _RERUN, "no: 1,000 tiles of MIST"),
        Figure("PSPStain, on MIST", ("14.32", ".198", "46.9"), _RERUN, "no: 1,000 tiles of MIST"),
        Figure(
            "Pyramid Pix2pix, on MIST",
            ("15.15", ".218", "110.9"),
            _RERUN,
            "no: 1,000 tiles of MIST",
        ),
    ),
    "segmentation": (
        Figure(
            "HEMERA SegmentationNet",
            (".771", ".513", ".631", ".487"),
            "the paper",
            "2,000 tiles, which ones is not said; its four numbers cannot be of one aggregation",
        ),
    ),
}
"""By network."""
