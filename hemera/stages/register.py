"""Register the HER2 slide onto the H&E slide, with a certificate or the reason why not."""

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa

from hemera import tables
from hemera.config import RegisterOptions
from hemera.errors import RegistrationError, SlideError
from hemera.files.digests import check_content
from hemera.registration import deeperhistreg
from hemera.registration.attempts import certify_own, register_pair
from hemera.registration.displacement import none
from hemera.registration.displacement_files import write_displacement
from hemera.registration.verdict import FAIL, PASS
from hemera.sheet import read_sheet

log = logging.getLogger(__name__)


def run(
    *,
    sheet: Path,
    unit: str,
    images_table: Path,
    displacement: Path,
    certificate: Path,
    quality: Path,
    options: RegisterOptions,
) -> None:
    """Register one pair of whole slides.

    Where the sheet names a displacement, it is assessed and the engine does not run. A pair that
    cannot be registered has the verdict "fail" and its reason, and is not an error.

    Args:
        displacement: npz, from H&E to HER2 as the slides are stored, um; also of a failed
            registration, because a manual verdict may override it.
    """
    pair = read_sheet(sheet).pair(unit)
    described = tables.described(images_table)[unit]
    row: dict[str, Any] = dict.fromkeys(tables.CERTIFICATE.names)
    row |= {"pair": unit, "verdict": FAIL, "engine": "own", "attempts": [], "map": "none"}
    content_errors: tuple[type[Exception], ...] = (SlideError, RegistrationError)
    if pair.displacement is None:
        row |= {"engine": "deeperhistreg", "engine_version": deeperhistreg.version()}
        row["preset"] = options.preset
        # A RegistrationError of the engine is not about the pair.
        content_errors = (SlideError,)
    d, squares = none(), tables.QUALITY.empty_table()
    # A wrong stain is registered nevertheless: the sheet may override it, for stage tile.
    reasons = [found["reason"] for found in described.values() if found["verdict"] == "refuse"]
    row["reason"] = "; ".join(dict.fromkeys(reasons)) or None
    if row["reason"] is None:
        for stain, path in zip(tables.STAINS, pair.images, strict=True):
            check_content(path, described[stain]["content_digest"])
        try:
            if pair.displacement is None:
                folder = displacement.with_name(f".{displacement.stem}.engine")
                result, row["attempts"] = register_pair(pair, described, options, folder)
            else:
                result = certify_own(pair, pair.displacement, described, options)
        except content_errors as error:
            row["reason"] = str(error)
        else:
            d = result.displacement
            row |= result.row
            if result.local is not None:
                squares = pa.table(result.local.to_columns(unit))
    log.log(
        logging.INFO if row["verdict"] == PASS else logging.WARNING,
        "pair %s: %s%s", unit, row["verdict"], f" ({row['reason']})" if row["reason"] else "",
    )  # fmt: skip
    write_displacement(displacement, d)
    metadata = tables.provenance(options)
    tables.write(certificate, [row], tables.CERTIFICATE, metadata)
    tables.write(quality, squares, tables.QUALITY, metadata)
