"""Templates, and the format of numbers on a page."""

import base64
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from hemera.config import STAGES
from hemera.config import base as options_base
from hemera.files.atomic import write_text

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = (Path(__file__).parent / "static" / "sortable.min.js",
           Path(__file__).parent / "static" / "page.js")  # fmt: skip
"""Of every page: sortable tables (sortable-tablesort 4.1.7 of npm), pictures in full size."""

DASH = "–"
"""Shown in place of a missing value: None or NaN."""


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits, large ones with thin spaces."""
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == int(value) or abs(value) >= 10**digits:
        return count(round(value))
    text = f"{value:.{digits}g}"
    if "e" in text and abs(value) >= 1e-6:
        text = f"{value:.{digits + 5}f}".rstrip("0")
    return text.replace("-", "−")


def fixed(value: float | None, digits: int = 3) -> str:
    """Return a number with so many digits behind the point, for columns that are compared."""
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{value:.{digits}f}".replace("-", "−")


def count(value: float | None) -> str:
    """Return an integer with thousands separated."""
    if value is None or math.isnan(value):
        return DASH
    return f"{int(value):,}".replace(",", "\u202f").replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction as percent; one between 0 and 1 is never shown as 0 or 100."""
    if value is None or math.isnan(value):
        return DASH
    least = 10.0**-digits
    shown = 100 * value
    if 0 < shown < least / 2:
        return f"<{least:.{digits}f} %"
    if 100 - least / 2 < shown < 100:
        return f">{100 - least:.{digits}f} %"
    return f"{shown:.{digits}f} %"


def plural(value: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{count(value)} {noun if value == 1 else noun + 's'}"


def write_page(path: Path, template: str, content: Mapping[str, Any]) -> None:
    """Fill a template and write the page in one step; all text in `content` is escaped."""
    write_text(path, _environment().get_template(template).render(content))


@functools.cache
def _environment() -> jinja2.Environment:
    # Kept, because a cohort has hundreds of pages and templates take longer to read than to fill.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "fixed": fixed,
        "count": count,
        "percent": percent,
        "json": json.dumps,
    }
    environment.tests["known"] = pd.notna
    script = "".join(path.read_text(encoding="utf-8") for path in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {
        "plural": plural,
        "DASH": DASH,
        "option_rows": _option_rows,
        "script": Markup(script),
        # Browsers run this script and no other.
        "script_hash": Markup(f"sha256-{digest}"),
    }
    return environment


def _option_rows(
    stage: str, values: Mapping[str, Any]
) -> list[tuple[options_base.Key, str, str | None]]:
    """Return each option of a stage: declaration, value, and default unless it is the value."""
    declared = options_base.keys(STAGES[stage])
    rows = []
    for key in (declared[name] for name in values if name in declared):
        value, default = json.dumps(values[key.name]), json.dumps(key.default)
        rows.append((key, value, None if value == default else default))
    return rows
