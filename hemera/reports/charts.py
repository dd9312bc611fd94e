"""Charts as inline SVG: text that scales, prints and needs no script.

Colours are of Okabe and Ito's palette and never the only sign. Every chart has a title that
screen readers say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from hemera.reports.html import number

BLUE, ORANGE, VERMILLION, GREEN, SKY, PURPLE = (
    "#0072b2",
    "#e69f00",
    "#d55e00",
    "#009e73",
    "#56b4e9",
    "#cc79a7",
)
GRAY = "#b8bcc2"
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2")

Values = npt.NDArray[np.float64]
_Scale = Callable[[float], float]


def histogram(
    title: str,
    groups: Sequence[tuple[str, str, Values]],
    *,
    limits: Sequence[tuple[str, float]] = (),
    unit: str = "",
    bins: int = 40,
    span: tuple[float, float] | None = None,
) -> Markup:
    """Draw stacked bars of how often values occur.

    Args:
        title: what is measured.
        groups: (name, colour, values), from the bottom up; what is no number is left out.
        limits: (name, value) of vertical lines.
        unit: of the values.
        bins: number of bars.
        span: both ends of the axis; None: as the values are.
    """
    finite = [values[np.isfinite(values)] for _, _, values in groups]
    everything = np.concatenate(finite) if finite else np.zeros(0)
    if not everything.size:
        return _nothing(title, "no values")
    inside = [value for _, value in limits]
    # The few largest would press all others into one bar: they count in the last one.
    high = max([float(np.quantile(everything, 0.995)), *inside])
    low = min([float(everything.min()), *inside])
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    margin = 0.02 * (high - low)
    low, high = (low - margin if low else 0.0), high + margin
    if span is not None:
        low, high = span
    edges = np.linspace(low, high, bins + 1)
    heights = [np.histogram(np.clip(values, low, high), edges)[0] for values in finite]
    top = max(1, int(np.sum(heights, axis=0).max()))
    width, height, left, right, head, foot = 420, 190, 46, 12, 14, 40
    plot_w, plot_h = width - left - right, height - head - foot

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * plot_w

    parts = [_grid_y(top, left, head, plot_w, plot_h)]
    base = np.zeros(bins)
    for (_, colour, _), counts in zip(groups, heights, strict=True):
        path = []
        for k in np.flatnonzero(counts):
            y1 = head + plot_h * (1 - (base[k] + counts[k]) / top)
            tall = plot_h * counts[k] / top
            path.append(
                f"M{x(edges[k]) + 0.4:.1f} {y1:.1f}h{plot_w / bins - 0.8:.1f}v{tall:.1f}"
                f"h-{plot_w / bins - 0.8:.1f}z"
            )
        base += counts
        if path:
            parts.append(f'<path d="{"".join(path)}" fill="{colour}"/>')
    parts.append(_axis_x(low, high, x, height - foot, unit))
    for name, value in limits:
        at = x(value)
        anchor, shift = ("start", 4) if at < left + plot_w * 0.6 else ("end", -4)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{head - 8}" y2="{height - foot}" '
            f'class="limit"/><text x="{at + shift:.1f}" y="{head - 4}" text-anchor="{anchor}" '
            f'class="strong">{escape(name)}</text>'
        )
    over = int(np.count_nonzero(everything > high))
    note = f"; the last bar holds {number(over)} above {number(high)}" if over else ""
    return _svg(title + note, width, height, parts)


def bars(
    title: str,
    rows: Sequence[tuple[str, Sequence[tuple[str, str, float]], str]],
    *,
    share: bool = False,
    label_width: int = 190,
) -> Markup:
    """Draw horizontal stacked bars.

    Args:
        title: what is counted.
        rows: (label, parts as (name, colour, value), words behind the bar).
        share: True: every bar is as long as the others, its parts are shares.
        label_width: room for the labels.
    """
    if not rows:
        return _nothing(title, "nothing to count")
    width, step, thick = 860, 26, 17
    right = 210
    plot = width - label_width - right
    longest = max((sum(value for _, _, value in parts) for _, parts, _ in rows), default=0) or 1
    lines = []
    for place, (label, parts, words) in enumerate(rows):
        y = 4 + place * step
        total = (sum(value for _, _, value in parts) or 1) if share else longest
        lines.append(
            f'<text x="{label_width - 8}" y="{y + 13}" text-anchor="end">{escape(label)}</text>'
        )
        x = float(label_width)
        for name, colour, value in parts:
            wide = plot * value / total
            if wide > 0:
                lines.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{max(wide, 0.8):.1f}" height="{thick}" '
                    f'fill="{colour}"><title>{escape(name)}: {number(value)}</title></rect>'
                )
            x += wide
        lines.append(f'<text x="{x + 8:.1f}" y="{y + 13}">{escape(words)}</text>')
    return _svg(title, width, 8 + step * len(rows), lines)


def boxes(title: str, rows: Sequence[tuple[str, Values]], *, unit: str = "") -> Markup:
    """Draw horizontal boxes: median, quartiles, whiskers from the 5th to the 95th percentile."""
    kept = [(label, values[np.isfinite(values)]) for label, values in rows]
    kept = [(label, values) for label, values in kept if values.size]
    if not kept:
        return _nothing(title, "no values")
    spans = [np.percentile(values, (5, 25, 50, 75, 95)) for _, values in kept]
    low, high = 0.0, max(float(span[4]) for span in spans) or 1.0
    width, left, right, step = 640, 150, 90, 26
    plot = width - left - right
    foot = 8 + step * len(kept)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * plot

    lines = [_axis_x(low, high, x, foot, unit)]
    for place, ((label, values), span) in enumerate(zip(kept, spans, strict=True)):
        middle = 8 + place * step + 9
        p5, p25, p50, p75, p95 = (x(float(value)) for value in span)
        lines.append(
            f'<text x="{left - 10}" y="{middle + 4}" text-anchor="end">{escape(label)}</text>'
            f'<path d="M{p5:.1f} {middle}H{p25:.1f}M{p75:.1f} {middle}H{p95:.1f}'
            f'M{p5:.1f} {middle - 4}v8M{p95:.1f} {middle - 4}v8" class="axis"/>'
            f'<rect x="{p25:.1f}" y="{middle - 8}" width="{max(p75 - p25, 1):.1f}" height="16" '
            f'fill="{SKY}" stroke="{BLUE}"/>'
            f'<line x1="{p50:.1f}" x2="{p50:.1f}" y1="{middle - 8}" y2="{middle + 8}" '
            f'stroke="#111" stroke-width="2.5"/>'
            f'<text x="{width - right + 10}" y="{middle + 4}" class="quiet">n = '
            f"{number(values.size)}</text>"
        )
    return _svg(title, width, foot + 34, lines)


def curves(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    mark: tuple[str, float] | None = None,
) -> Markup:
    """Draw lines over the epochs; each is named at its end and has dashes of its own.

    Args:
        title: what is drawn.
        series: (epoch, value) of each line.
        mark: name and epoch of a vertical line.
    """
    drawn = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in series.items()
    }
    points = [point for line in drawn.values() for point in line]
    if not points:
        return _nothing(title, "no values")
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    if high - low < 1e-12:
        pad = 0.5 * abs(high) or 1.0
        low, high = low - pad, high + pad
    margin = 0.06 * (high - low)
    low, high = (low - margin if low < 0 or low > margin else 0.0), high + margin
    width, height, left, right, head, foot = 420, 230, 56, 54, 12, 38
    plot_w, plot_h = width - left - right, height - head - foot

    def x_of(value: float) -> float:
        return left + (value - x_low) / (x_high - x_low or 1) * plot_w

    def y_of(value: float) -> float:
        return head + plot_h * (1 - (value - low) / (high - low))

    parts = []
    for tick in ticks(low, high, 5):
        y = y_of(tick)
        parts.append(
            f'<line x1="{left}" x2="{left + plot_w}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
            f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    shown = [tick for tick in ticks(x_low, x_high, 6) if tick == int(tick)] or [x_low]
    for tick in shown:
        parts.append(
            f'<text x="{x_of(tick):.1f}" y="{height - foot + 17}" text-anchor="middle">'
            f"{number(tick)}</text>"
        )
    parts.append(
        f'<path d="M{left} {head}V{height - foot}H{left + plot_w}" class="axis"/>'
        f'<text x="{left + plot_w / 2:.1f}" y="{height - 4}" text-anchor="middle" class="quiet">'
        "epoch</text>"
    )
    if mark is not None and x_low < x_high and x_low <= mark[1] <= x_high:
        at = x_of(mark[1])
        side = ("end", -4) if mark[1] > (x_low + x_high) / 2 else ("start", 4)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{head}" y2="{height - foot}" class="limit"/>'
            f'<text x="{at + side[1]:.1f}" y="{head + 9}" text-anchor="{side[0]}" class="quiet">'
            f"{escape(mark[0])}</text>"
        )
    ends: list[float] = []
    for place, (name, line) in enumerate(drawn.items()):
        if not line:
            continue
        colour = SERIES[place % len(SERIES)]
        path = "L".join(f"{x_of(x):.1f} {y_of(y):.1f}" for x, y in line)
        dash = DASHES[place % len(DASHES)]
        end = y_of(line[-1][1])
        while any(abs(end - other) < 12 for other in ends):
            end += 12 if end < head + plot_h / 2 else -12
        ends.append(end)
        last_x, last_y = x_of(line[-1][0]), y_of(line[-1][1])
        parts.append(
            f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2" '
            f'stroke-dasharray="{dash}"/>'
            f'<circle cx="{last_x:.1f}" cy="{last_y:.1f}" r="2.6" fill="{colour}"/>'
            f'<text x="{last_x + 6:.1f}" y="{end + 4:.1f}" fill="{colour}" class="strong">'
            f"{escape(name)}</text>"
        )
    return _svg(title, width, height, parts)


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Return round numbers between two bounds, about so many."""
    span = high - low
    if span <= 0:
        return [low]
    rough = span / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _grid_y(top: int, left: int, head: int, plot_w: float, plot_h: float) -> str:
    lines = []
    for tick in ticks(0, top, 4):
        y = head + plot_h * (1 - tick / top)
        lines.append(
            f'<line x1="{left}" x2="{left + plot_w}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
        )
        if tick == int(tick):
            lines.append(
                f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>'
            )
    return "".join(lines)


def _axis_x(low: float, high: float, x: _Scale, y: float, unit: str) -> str:
    lines = [f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}" class="axis"/>']
    for tick in ticks(low, high, 6):
        lines.append(
            f'<text x="{x(tick):.1f}" y="{y + 15}" text-anchor="middle">{number(tick)}</text>'
        )
    if unit:
        lines.append(
            f'<text x="{(x(low) + x(high)) / 2:.1f}" y="{y + 31}" text-anchor="middle" '
            f'class="quiet">{escape(unit)}</text>'
        )
    return "".join(lines)


def _svg(title: str, width: int, height: int, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg class="chart{" wide" if width > 600 else ""}" role="img" '
        f'viewBox="0 0 {width} {height}" '
        f'style="max-width:{width}px" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _nothing(title: str, words: str) -> Markup:
    return Markup('<p class="quiet">{}: {}.</p>').format(title, words)
