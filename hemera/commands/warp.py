"""Transfer points, annotations, labels or a slide between the slides of a pair."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import Parameter

from hemera.commands import ConfigFile, Positive, Quality, Workers, check_new
from hemera.config import load_file
from hemera.sheet import read_sheet

if TYPE_CHECKING:
    from hemera.registration.registered_pair import RegisteredPair

To = Literal["he", "her2"]


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class Registered:
    """The pair.

    Args:
        pair: its name in the sheet.
        configfile: configuration that names the sheet.
        results: directory of results, in which register has written.
        allow_failed_registration: use the registration even where its verdict is fail or refuse.
    """

    pair: str
    configfile: ConfigFile = Path("config.yaml")
    results: Path = Path("results")
    allow_failed_registration: bool = False


def points(source: Path, output: Path, /, *, to: To, registered: Registered) -> None:
    """Transform a table of points, pixels of level 0, to the other slide.

    A point without a corresponding point gets empty cells.

    Args:
        source: CSV with the columns X and Y; other columns are kept.
        output: CSV, new.
        to: the slide of the output; the source belongs to the other.
    """
    from hemera.registration import transfer

    transfer.transform_points(source, output, _load(registered, output), to)


def annotations(
    source: Path, output: Path, /, *, to: To, registered: Registered, tolerance_px: Positive = 0.1
) -> None:
    """Transform annotations or cells of QuPath to the other slide; their properties are kept.

    Args:
        source: GeoJSON in pixels of level 0.
        output: GeoJSON, new.
        to: the slide of the output; the source belongs to the other.
        tolerance_px: how far an edge may deviate from its curve, pixels of the other slide.
    """
    from hemera.registration import transfer

    pair = _load(registered, output)
    transfer.transform_annotations(source, output, pair, to, tolerance_px=tolerance_px)


def labels(
    source: Path, output: Path, /, *, to: To, registered: Registered, mpp: Positive | None = None
) -> None:
    """Transform a label image to the other slide: the nearest label, 0 without label.

    It covers its slide from edge to edge, at any resolution; so does the result.

    Args:
        source: PNG or TIFF, one channel of 8, 16 or 32 bits.
        output: TIFF, new.
        to: the slide of the output; the source belongs to the other.
        mpp: resolution of the result, um per pixel; by default that of the source.
    """
    from hemera.registration import transfer

    transfer.transform_labels(source, output, _load(registered, output), to, mpp=mpp)


def slide(
    output: Path,
    /,
    *,
    registered: Registered,
    mpp: Positive | None = None,
    quality: Quality = 90,
    workers: Workers = 2,
) -> None:
    """Write HER2 on the grid of H&E, as a pyramidal OME-TIFF for viewers.

    Args:
        output: TIFF, new, best named NAME.ome.tif.
        mpp: resolution of the result, um per pixel; by default that of H&E.
        quality: quality of JPEG.
        workers: threads.
    """
    from hemera.registration import transfer

    pair = _load(registered, output)
    transfer.write_warped_slide(output, pair, mpp=mpp, quality=quality, workers=workers)


def _load(registered: Registered, output: Path) -> "RegisteredPair":
    from hemera.registration.registered_pair import load_pair

    check_new(output)
    cohort = load_file(registered.configfile).cohort
    pair = read_sheet(Path(cohort.sheet)).pair(registered.pair)
    allow_failed = registered.allow_failed_registration
    return load_pair(pair, registered.results, allow_failed=allow_failed)
