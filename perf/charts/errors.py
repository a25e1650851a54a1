"""Draws how far results are from fp64 on data that normalizations find hard, and torch's distance."""

from __future__ import annotations

from collections.abc import Sequence
from math import log10

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from perf.charts.style import DASHED, GREY, INK, PALE, VERMILION, legend, panel, sheet, styles_of
from perf.findings import OURS, OUTPUTS, ulps_of
from perf.ops import TITLE
from perf.records import Numerics, ok

WHO = (OURS, "torch")
ROUNDED, FAILED = "0.5 ulp: rounded once", "not computed"
# Errors of fewer ulp stand at the left edge; those that are not finite at the right one.
LEAST_ULP = 0.01
ROW_INCHES = 0.2


def errors(numerics: Sequence[Numerics]) -> Figure:
    """Draws the largest error over all numbers of columns, with a line down to the smallest: a panel for each op and
    output, a row for each kind of data and dtype."""
    panels = [(op, output) for op in dict.fromkeys(r["op"] for r in numerics) for output in OUTPUTS]
    rows = list(dict.fromkeys((r["data"], r["dtype"]) for r in numerics))
    rows.sort(key=lambda row: list(dict.fromkeys(r["data"] for r in numerics)).index(row[0]))
    all_ulps = [ulps_of(r, output)[who] for r in ok(numerics) for output in OUTPUTS for who in WHO]
    top = max([ulps for ulps in all_ulps if ulps] + [2.0]) * 3
    lines = len(panels) // len(OUTPUTS)
    figure = sheet(lines * (ROW_INCHES * len(rows) + 0.7) + 0.4)
    axes = figure.subplots(lines, len(OUTPUTS), squeeze=False)
    for ax, (op, output) in zip(axes.flat, panels, strict=True):
        _scale(ax, top, f"{TITLE[op]}, {output}")
        for place, (data, dtype) in enumerate(rows):
            mine = [r for r in numerics if (r["op"], r["data"], r["dtype"]) == (op, data, dtype)]
            _marks(ax, place, mine, output, top)
        for place in range(len(rows)):
            if list(dict.fromkeys(data for data, _ in rows)).index(rows[place][0]) % 2 == 0:
                ax.axhspan(place - 0.5, place + 0.5, color=PALE, linewidth=0, zorder=0)
        ax.set_yticks(range(len(rows)), [f"{data}, {dtype}" for data, dtype in rows], fontsize=7.5)
        ax.set_ylim(len(rows) - 0.5, -0.5)
    legend(figure)
    return figure


def _scale(ax: Axes, top: float, title: str) -> None:
    panel(ax, title, "x")
    ax.set_xscale("log")
    ax.set_xlim(LEAST_ULP / 3, top * 3)
    for low, high in ((LEAST_ULP / 3, LEAST_ULP), (top, top * 3)):
        ax.axvspan(low, high, color=GREY, alpha=0.45, linewidth=0, zorder=0.5)
    ax.axvline(0.5, color=INK, linewidth=1.1, linestyle=DASHED, label=ROUNDED, zorder=1)
    ax.xaxis.set_major_locator(FixedLocator([10.0**tens for tens in range(-1, int(log10(top)) + 1, 2)]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1e5 else f"{value:.0e}"))
    ax.set_xlabel("ulp", fontsize=8.5)


def _marks(ax: Axes, place: int, records: Sequence[Numerics], output: str, top: float) -> None:
    """Draws one contender a little above the other, so that both are seen where they agree."""
    exact, infinite = LEAST_ULP / 3**0.5, top * 3**0.5
    for number, (who, style) in enumerate(styles_of(WHO).items()):
        ulps = [ulps_of(record, output)[who] for record in ok(records)]
        places = [infinite if each is None else each if each >= LEAST_ULP else exact for each in ulps]
        y = place + (2 * number - 1) * 0.17
        if places:
            ax.plot([min(places), max(places)], [y, y], color=style.colour, linewidth=1.0, alpha=0.7, zorder=2)
            ax.plot(max(places), y, style.marker, color=style.colour, markersize=5, label=who, zorder=3)
    if len(ok(records)) < len(records):
        ax.plot(exact, place, "x", color=VERMILION, markersize=7, label=FAILED, zorder=4)
