"""Charts as inline SVG, drawn by matplotlib: text stays text, equal values give equal bytes.

Colours are those of ``style.css`` (Okabe and Ito's palette).
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from hemera.dataset.statistics import Frame
from hemera.reports.html import TEMPLATES, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = dict(
    re.findall(r"--([a-z]+): (#[0-9a-f]{6})", (TEMPLATES / "style.css").read_text(encoding="utf-8"))
)
BLUE, ORANGE, VERMILLION, GREEN, SKY, PURPLE, BROWN, GRAY = (
    COLORS[name]
    for name in ("blue", "orange", "vermillion", "green", "sky", "purple", "brown", "gray")
)
LINES = tuple(
    zip((BLUE, VERMILLION, GREEN, PURPLE, ORANGE), ("-", "--", ":", "-.", (0, (4, 2))), strict=True)
)

WIDTH_PX = 420
ROW_PX = 36
_LEGEND_COLUMNS = 2

Values = npt.NDArray[np.float64]


def histogram(
    title: str,
    groups: Sequence[tuple[str, str, Values]],
    *,
    limits: Sequence[tuple[str, float]] = (),
    unit: str = "",
    bins: int = 40,
    span: tuple[float, float] | None = None,
) -> Markup:
    """Draw stacked histograms; values beyond the 99.5th percentile count in the last bin.

    Args:
        groups: (name, colour, values), from the bottom up; values that are not finite are left out.
        limits: (name, value) of vertical lines.
        span: both ends of the axis; None: from the values.
    """
    finite = [values[np.isfinite(values)] for _, _, values in groups]
    everything = np.concatenate(finite) if finite else np.zeros(0)
    if not everything.size:
        return _empty(title)
    if span is None:
        known = [value for _, value in limits]
        low = min([float(everything.min()), *known])
        high = max([float(np.quantile(everything, 0.995)), *known])
        margin = 0.02 * (high - low) or 0.5
        span = (low - margin if low else 0.0), high + margin
    edges = np.linspace(*span, bins + 1)
    axes = _axes(190, left=48, bottom=40, top=18)
    base = np.zeros(bins)
    for (_, color, _), values in zip(groups, finite, strict=True):
        top = base + np.histogram(np.clip(values, *span), edges)[0]
        axes.stairs(top, edges, baseline=base, fill=True, color=color, lw=0)
        base = top
    axes.set(xlim=span, ylim=(0, base.max() * 1.02), xlabel=unit)
    axes.grid(axis="y")
    for name, value in limits:
        left = value < (span[0] + span[1]) / 2
        axes.axvline(value, color=COLORS["ink"], ls="--", lw=1.5)
        axes.annotate(
            name, (value, 1), (4 if left else -4, 3), ha="left" if left else "right",
            xycoords=("data", "axes fraction"), textcoords="offset points",
        )  # fmt: skip
    return _svg(title, axes)


def bars(
    title: str,
    rows: Frame,
    colors: Mapping[str, str],
    texts: Sequence[str],
    *,
    relative: bool = False,
) -> Markup:
    """Draw horizontal stacked bars: one per row, labelled by the index, a part per column.

    Relative bars have the same length and show fractions; `texts` are beside the labels.
    """
    if not len(rows):
        return _empty(title)
    totals = rows.sum(axis=1)
    widths = rows.div(totals if relative else totals.max() or 1, axis="index")
    starts = widths.cumsum(axis=1) - widths
    axes = _rows(list(zip(rows.index, texts, strict=True)))
    for name, color in colors.items():
        axes.barh(range(len(rows)), widths[name], 0.36, left=starts[name], color=color, lw=0)
    axes.set(xlim=(0, 1))
    axes.axis("off")
    return _svg(title, axes)


def boxes(title: str, rows: Sequence[tuple[str, Values]], *, unit: str = "") -> Markup:
    """Draw horizontal boxes: median, quartiles, whiskers from the 5th to the 95th percentile."""
    kept = [(label, values[np.isfinite(values)]) for label, values in rows]
    kept = [(label, values) for label, values in kept if values.size]
    if not kept:
        return _empty(title)
    axes = _rows([(label, f"n = {number(len(values))}") for label, values in kept], bottom=40)
    names = ("whislo", "q1", "med", "q3", "whishi")
    axes.bxp(
        [
            dict(zip(names, np.percentile(values, (5, 25, 50, 75, 95)), strict=True))
            for _, values in kept
        ],
        positions=range(len(kept)),
        orientation="horizontal",
        widths=0.4,
        showfliers=False,
        patch_artist=True,
        manage_ticks=False,
        boxprops={"facecolor": SKY, "edgecolor": BLUE},
        medianprops={"color": COLORS["ink"], "lw": 2.5},
    )
    high = max(float(np.percentile(values, 95)) for _, values in kept) or 1.0
    axes.set(xlim=(0, high * 1.02), xlabel=unit)
    return _svg(title, axes)


def curves(title: str, series: Frame, kept: int | None) -> Markup:
    """Draw a line per column over the epochs, the index, and the epoch of the kept weights."""
    from matplotlib.ticker import MaxNLocator

    lines = {name: line[np.isfinite(line)] for name, line in series.items()}
    if not any(len(line) for line in lines.values()):
        return _empty(title)
    top = _legend_px(len(lines) + 1)
    axes = _axes(202 + top, left=56, bottom=40, top=top)
    for (name, line), (color, dashes) in zip(lines.items(), LINES, strict=False):
        # A single epoch is a short line.
        ends = (-0.5, 0.5) if len(line) == 1 else (0,)
        x = np.add.outer(line.index, ends).ravel()
        axes.plot(x, np.repeat(line, len(ends)), color=color, ls=dashes, label=name)
    axes.margins(x=0)
    low, high = axes.get_xlim()
    if kept is not None and low <= kept <= high:
        axes.axvline(kept, color=COLORS["quiet"], ls=":", lw=1, label="kept")
    axes.set(xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.grid(axis="y")
    _legend(axes)
    return _svg(title, axes)


def lines(
    title: str, series: Sequence[tuple[str, Values, Values]], *, labels: tuple[str, str]
) -> Markup:
    """Draw a line per (name, x, y), the last one gray: what the others are compared with."""
    top = _legend_px(len(series))
    axes = _axes(252 + top, left=56, bottom=40, top=top)
    styles = [*LINES[: len(series) - 1], (COLORS["quiet"], ":")]
    for (name, x, y), (color, dashes) in zip(series, styles, strict=False):
        axes.plot(x, y, color=color, ls=dashes, label=name)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.grid()
    _legend(axes)
    return _svg(title, axes)


def _legend_px(entries: int) -> int:
    """Return the height of the legend, px."""
    return 10 + 18 * -(-entries // _LEGEND_COLUMNS)


def _legend(axes: Axes) -> None:
    """Add the legend above the axes, in rows that are not wider than the chart."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=_LEGEND_COLUMNS, frameon=False,
        borderaxespad=0, borderpad=0.2, columnspacing=1.5,
    )  # fmt: skip


def _rows(texts: Sequence[tuple[str, str]], bottom: int = 4) -> Axes:
    """Return axes with a row per pair of texts, which are above it; row k is at y = k."""
    axes = _axes(ROW_PX * len(texts) + bottom, left=6, bottom=bottom, top=0)
    for place, (label, words) in enumerate(texts):
        axes.text(0, place - 0.3, label, transform=axes.get_yaxis_transform())
        axes.text(1, place - 0.3, words, transform=axes.get_yaxis_transform(), ha="right")
    axes.set(ylim=(len(texts) - 0.7, -0.7), yticks=[])
    axes.spines["left"].set_visible(False)
    return axes


def _axes(height_px: int, *, left: int, bottom: int, top: int) -> Axes:
    """Return axes of a chart of the common width, their margins in pixels."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    right = 10
    size = WIDTH_PX, height_px
    axes = Figure(figsize=(size[0] / 72, size[1] / 72)).add_axes(
        (
            left / size[0],
            bottom / size[1],
            (size[0] - left - right) / size[0],
            (size[1] - top - bottom) / size[1],
        )
    )
    for axis, count in ((axes.xaxis, 6), (axes.yaxis, 5)):
        axis.set_major_locator(MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(round(value, 12))))
        # The marks of ticks would be symbols that are defined once and referred to.
        axis.set_tick_params(bottom=False, left=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return axes


def _svg(title: str, axes: Axes) -> Markup:
    """Return the figure of the axes as SVG for a page: without header, fonts and identifiers."""
    import matplotlib
    from matplotlib.text import Text

    figure = axes.get_figure(root=True)
    assert figure is not None
    for artist in figure.findobj():
        # A clip path would be an identifier on the page; none is needed.
        artist.set_clip_on(False)
        if isinstance(artist, Text):
            artist.set(fontsize=12, parse_math=False)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hemera"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    body = file.getvalue().partition("</defs>")[2].rpartition("</svg>")[0]
    body = re.sub(r' id="[\w.]+"|font-family: [^;"]*; ?', "", body).replace("\n", " ")
    width, height = figure.get_size_inches() * 72
    return Markup(
        f'<svg class="chart" role="img" viewBox="0 0 {width:g} {height:g}" '
        'xmlns="http://www.w3.org/2000/svg"><title>{}</title>{}</svg>'
    ).format(title, Markup(body))


def _empty(title: str) -> Markup:
    return Markup('<p class="quiet">{}: no values.</p>').format(title)
