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
    """One slide of a pair."""

    path: Path
    size_px: tuple[int, int]
    """(width, height) of level 0."""
    mpp: float
    """Um per pixel of level 0."""

    @property
    def size_um(self) -> tuple[float, float]:
        """Width and height."""
        return self.size_px[0] * self.mpp, self.size_px[1] * self.mpp


@dataclasses.dataclass(frozen=True, eq=False)
class RegisteredPair:
    """A pair with the map between its slides."""

    name: str
    he: PairSlide
    her2: PairSlide
    displacement: Displacement
    """From H&E to HER2."""

    def ends(self, to: str) -> tuple[PairSlide, PairSlide]:
        """Return the slide that points come from and the one they go to, `he` or `her2`."""
        return (self.he, self.her2) if to == "her2" else (self.her2, self.he)

    def transform_um(self, points_um: Points, to: str) -> Points:
        """Return the corresponding points (N, 2) on the other slide, um; NaN where there is none.

        Args:
            points_um: (x, y) on the slide that is not `to`.
            to: `he` or `her2`.
        """
        if to == "her2":
            return fields.map_points(self.displacement, points_um)
        tolerance_um = INVERSE_TOLERANCE_PX * self.her2.mpp
        return fields.inverse_points(self.displacement, points_um, tolerance_um=tolerance_um)

    def transform_px(self, points_px: Points, to: str) -> Points:
        """Return the corresponding points in level-0 pixels; see `transform_um`."""
        source, target = self.ends(to)
        return self.transform_um(points_px * source.mpp, to) / target.mpp


def load_pair(pair: Pair, results: Path, *, allow_failed: bool = False) -> RegisteredPair:
    """Open the slides of a pair and read the map between them.

    Args:
        pair: of the sheet.
        results: folder of results, where register has written.
        allow_failed: use the map regardless of its verdict.

    Raises:
        SlideError: when a slide cannot be opened.
        RegistrationError: when there is no map, or its verdict forbids its use.
    """
    found = []
    for stain, path, mpp in (("he", pair.he, pair.he_mpp), ("her2", pair.her2, pair.her2_mpp)):
        with open_slide(path, mpp=mpp, mpp_column=f"{stain}_mpp") as slide:
            found.append(PairSlide(path, slide.size_px, slide.mpp))
    he, her2 = found
    # A user's displacement is read from the output of register, which assessed it.
    path, certificate = (
        layout.path(pattern, results, unit=pair.pair)
        for pattern in (layout.DISPLACEMENT, layout.CERTIFICATE)
    )
    row = None if pair.registered else _certificate(pair, path, certificate)
    verdict, refusal = effective_verdict(pair, row)
    if refusal is not None and not allow_failed:
        raise RegistrationError(
            f"pair {pair.pair}: {refusal}; inspect it in the report, then set verdict to accept in "
            "the sheet, or give --allow-failed-registration"
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


def _certificate(pair: Pair, path: Path, certificate: Path) -> dict[str, str | None] | None:
    """Return the pair's row of its certificate."""
    for file in (path, certificate):
        if not file.is_file():
            raise RegistrationError(
                f"pair {pair.pair}: not registered yet, there is no {file}; run "
                f"`snakemake --cores all {certificate}`"
            )
    rows = tables.read(certificate, tables.CERTIFICATE, ("pair", "verdict", "reason")).to_pylist()
    return next((row for row in rows if row["pair"] == pair.pair), None)
