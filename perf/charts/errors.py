"""How far from fp64 on data that normalizations find hard, beside torch."""

from __future__ import annotations

from collections.abc import Sequence
from math import log10
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from perf.charts.canvas import FAINT, GREY, INK, PALE, VERMILION, Canvas, clean, headed, power, styles_of
from perf.findings import OUTPUTS, Record, ok
from perf.points import TITLE

WHO = ("triton_norm", "torch")
ROW, BETWEEN, ACROSS = 0.22, 0.75, 4  # inches, inches, panels
ROUNDED = "0.5 ulp: rounded once"
FAILED = "not computed"
ASIDE = 0.17
LEAST = 0.01  # ulp: what is less is not told apart


def errors(numerics: Sequence[Record], machine: str, path: Path) -> Path:
    """The largest error over all numbers of columns, in ulp, with a line down to the smallest: a panel an op and
    output, a band a data set, a row a dtype."""
    ops = list(dict.fromkeys(record["op"] for record in numerics))
    keys = [(op, output) for op in ops for output in OUTPUTS]
    rows = [
        (data, dtype)
        for data in dict.fromkeys(record["data"] for record in numerics)
        for dtype in dict.fromkeys(record["dtype"] for record in numerics if record["data"] == data)
    ]
    lines, across = -(-len(keys) // ACROSS) or 1, min(ACROSS, len(keys)) or 1
    title = "Error against fp64, in ulp of the output's type: the largest over the numbers of columns"
    columns = ", ".join(str(n) for n in dict.fromkeys(record["columns"] for record in numerics))
    foot = [
        f"columns: {columns}; a thin line goes down to the smallest error of them",
        f"left edge: less than {LEAST:g} ulp",
    ]
    foot += ["right edge: not finite", machine]
    canvas = Canvas(max(lines * (ROW * len(rows) + BETWEEN), 0.8), title, foot, [*WHO, ROUNDED, FAILED])
    if not keys:
        canvas.figure.text(0.5, 0.5, "Nothing was compared.", ha="center")
        return canvas.save(path)
    found = [r[output][who] for r in ok(numerics) for output in OUTPUTS for who in WHO]
    ends = LEAST, max([ulps for ulps in found if ulps] + [2.0]) * 1.5
    panels = canvas.figure.subplots(lines, across, squeeze=False, sharex=True)
    for number, ax in enumerate(panels.flat):
        if number >= len(keys):
            ax.set_axis_off()
            continue
        op, output = keys[number]
        _scale(ax, ends)
        _rows(ax, rows, number % across == 0)
        for place, (data, dtype) in enumerate(rows):
            mine = [r for r in numerics if (r["op"], r["data"], r["dtype"]) == (op, data, dtype)]
            _marks(ax, place, mine, output, ends)
        headed(ax, f"{TITLE[op]}, {output}")
        ax.set_xlabel("ulp", fontsize=9, color=INK)
    canvas.legend()
    return canvas.save(path)


def _edges(ends: tuple[float, float]) -> tuple[float, float]:
    """Where stands what is as good as exact, and what is not finite."""
    step = (ends[1] / ends[0]) ** 0.07
    return ends[0] / step, ends[1] * step


def _scale(ax: Axes, ends: tuple[float, float]) -> None:
    clean(ax, "x")
    ax.set_xscale("log")
    exact, infinite = _edges(ends)
    margin = ends[0] / exact
    ax.set_xlim(exact / margin, infinite * margin)
    for low, high in ((exact / margin, ends[0]), (ends[1], infinite * margin)):
        ax.axvspan(low, high, color=GREY, alpha=0.45, linewidth=0, zorder=0.5)
    ax.axvline(0.5, color=INK, linewidth=1.1, linestyle=(0, (5, 3)), label=ROUNDED, zorder=1)
    ax.xaxis.set_major_locator(FixedLocator([10.0**tens for tens in range(-1, int(log10(ends[1])) + 1, 3)]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(power))


def _rows(ax: Axes, rows: Sequence[tuple[str, str]], named: bool) -> None:
    """A label for each dtype, and before those of a data set its name; every other data set on a grey ground."""
    data = list(dict.fromkeys(name for name, _ in rows))
    for number, name in enumerate(data):
        places = [place for place, (of, _) in enumerate(rows) if of == name]
        if number % 2 == 0:
            ax.axhspan(places[0] - 0.5, places[-1] + 0.5, color=PALE, linewidth=0, zorder=0)
        if named:
            middle = (places[0] + places[-1]) / 2
            ax.annotate(
                name.replace(" that ", "\nthat ").replace(" as the ", "\nas the "), (0, middle), (-38, 0),
                xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", va="center", fontsize=9,
                color=INK,
            )  # fmt: skip
    ax.set_yticks(range(len(rows)), [dtype for _, dtype in rows] if named else [], fontsize=7.5)
    ax.tick_params(axis="y", length=0, labelcolor=FAINT)
    ax.set_ylim(len(rows) - 0.5, -0.5)


def _marks(ax: Axes, place: int, records: Sequence[Record], output: str, ends: tuple[float, float]) -> None:
    """One contender a little above the other, so that both are seen where they agree."""
    exact, infinite = _edges(ends)
    for number, (who, style) in enumerate(styles_of(WHO).items()):
        places = [
            infinite if ulps is None else ulps if ulps >= LEAST else exact
            for ulps in (record[output][who] for record in ok(records))
        ]
        y = place + (2 * number - 1) * ASIDE
        if places:
            ax.plot([min(places), max(places)], [y, y], color=style.colour, linewidth=1.0, alpha=0.7, zorder=2)
            ax.plot(
                max(places), y, style.marker, color=style.colour, markersize=5, markeredgecolor="white",
                markeredgewidth=0.5, label=who, zorder=3,
            )  # fmt: skip
    if len(ok(records)) < len(records):
        ax.plot(exact, place, "x", color=VERMILION, markersize=7, markeredgewidth=1.8, label=FAILED, zorder=4)
