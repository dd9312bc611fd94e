"""A pair of slides and the map between them, as registered by the workflow."""

import dataclasses
import logging
from pathlib import Path

from hemera import tables
from hemera.errors import RegistrationError
from hemera.files import layout
from hemera.imaging.slide import open_slide
from hemera.registration import displacement as fields
from hemera.registration.displacement import Displacement, Points
from hemera.registration.displacement_files import read_displacement
from hemera.registration.verdict import FAIL, REVIEW, effective_verdict
from hemera.sheet import Pair

log = logging.getLogger(__name__)

INVERSE_TOLERANCE_PX = 0.005
"""Largest error of an inverted point, mapped to HER2 again."""


@dataclasses.dataclass(frozen=True)
class PairSlide:
    """One slide of a pair: (width, height) and um per pixel of level 0."""

    path: Path
    size_px: tuple[int, int]
    mpp: float

    @property
    def size_um(self) -> tuple[float, float]:
        """Width and height."""
        return self.size_px[0] * self.mpp, self.size_px[1] * self.mpp


@dataclasses.dataclass(frozen=True, eq=False)
class RegisteredPair:
    """A pair with the map from H&E to HER2."""

    name: str
    he: PairSlide
    her2: PairSlide
    displacement: Displacement

    def ends(self, to: str) -> tuple[PairSlide, PairSlide]:
        """Return the slide that points come from and the one they go to, `he` or `her2`."""
        return (self.he, self.her2) if to == "her2" else (self.her2, self.he)

    def transform_um(self, points_um: Points, to: str) -> Points:
        """Map points (N, 2) to the slide `to`, `he` or `her2`, um; NaN where there is none."""
        if to == "her2":
            return fields.map_points(self.displacement, points_um)
        tolerance_um = INVERSE_TOLERANCE_PX * self.her2.mpp
        return fields.inverse_points(self.displacement, points_um, tolerance_um=tolerance_um)

    def transform_px(self, points_px: Points, to: str) -> Points:
        """Return the corresponding points in level-0 pixels; see `transform_um`."""
        source, target = self.ends(to)
        return self.transform_um(points_px * source.mpp, to) / target.mpp


def load_pair(pair: Pair, results: Path, *, allow_failed: bool = False) -> RegisteredPair:
    """Open the slides of a pair and read the map between them from the folder of results.

    Raises:
        RegistrationError: when there is no map, or its verdict forbids its use.
    """
    with (
        open_slide(pair.he, mpp=pair.he_mpp, mpp_column="he_mpp") as he_slide,
        open_slide(pair.her2_image, mpp=pair.her2_mpp, mpp_column="her2_mpp") as her2_slide,
    ):
        he = PairSlide(pair.he, he_slide.size_px, he_slide.mpp)
        her2 = PairSlide(pair.her2_image, her2_slide.size_px, her2_slide.mpp)
    # A user's displacement is read from the output of register, which assessed it.
    path = layout.path(layout.DISPLACEMENT, results, unit=pair.pair)
    certificate = layout.path(layout.CERTIFICATE, results, unit=pair.pair)
    row = None
    if not pair.registered:
        if not (path.is_file() and certificate.is_file()):
            raise RegistrationError(
                f"pair {pair.pair}: not registered yet; run `snakemake --cores all {certificate}`"
            )
        (row,) = tables.read(certificate, tables.CERTIFICATE, ("verdict", "reason")).to_pylist()
    verdict, refusal = effective_verdict(pair, row)
    if refusal is not None and not allow_failed:
        raise RegistrationError(
            f"pair {pair.pair}: {refusal}; inspect it in the report, then set verdict to accept in "
            "the sheet; warp and export spatialdata have --allow-failed-registration too"
        )
    if pair.registered:
        field = fields.of_registered(
            he.size_px, he.mpp, her2.size_px, her2.mpp, mirror=pair.mirrored
        )
        return RegisteredPair(pair.pair, he, her2, field)
    field = read_displacement(path)
    reason = (row or {}).get("reason") or "no reason given"
    if field.empty:
        raise RegistrationError(
            f"pair {pair.pair}: registration gave no map ({reason}); give displacement in the sheet"
        )
    if verdict in (REVIEW, FAIL):
        log.warning("pair %s: registration: %s: %s", pair.pair, verdict, reason)
    return RegisteredPair(pair.pair, he, her2, field)
