"""Templates, and the format of numbers on a page."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from hemera.files.atomic import write_text

TEMPLATES = Path(__file__).parent / "templates"

DASH = "–"
"""Shown in place of a missing value."""


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits, large ones with thin spaces."""
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e15:
        return count(int(value))
    if abs(value) >= 10**digits:
        return count(round(value))
    text = f"{value:.{digits}g}"
    if "e" in text and abs(value) >= 1e-6:
        text = f"{value:.{digits + 5}f}".rstrip("0")
    return text.replace("-", "−")


def fixed(value: float | None, digits: int = 3) -> str:
    """Return a number with so many digits behind the point, for columns that are compared."""
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return number(value)
    return f"{value:.{digits}f}".replace("-", "−")


def count(value: int | None) -> str:
    """Return an integer with thousands separated."""
    if value is None:
        return DASH
    return f"{value:,}".replace(",", "\u202f").replace("-", "−")


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


def plural(value: int, one: str, many: str | None = None) -> str:
    """Return a count with its noun."""
    return f"{count(value)} {one if value == 1 else many or one + 's'}"


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
    }
    environment.globals |= {"plural": plural, "DASH": DASH}
    return environment
