"""How many times faster than torch eager, as geometric means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from perf import findings
from perf.charts.canvas import FAINT, INK, Canvas, clean, headed, in_order, styles_of, tinted
from perf.findings import Record
from perf.points import MODE_TITLE, PASSES, TITLE

BASE = "torch"
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
BAR, BETWEEN = 0.155, 0.62  # inches, of a bar and beside the bars of a panel
HATCHES = ("", "////", "....", "xxxx")
TINTS = (1.0, 0.45, 0.7, 0.3)

Mean = tuple[float, int]


def _means(records: Sequence[Record], names: Sequence[str], dtypes: Sequence[str]) -> dict[tuple[str, str], Mean]:
    """By contender and dtype, where it and torch were timed on the same points: the mean, and of how many."""
    found = {}
    for name in names:
        for dtype in dtypes:
            ratios = findings.speedups([r for r in records if r["dtype"] == dtype], BASE, name)
            if ratios:
                found[name, dtype] = geometric_mean(ratios), len(ratios)
    return found


def speedups(records: Sequence[Record], machine: str, path: Path) -> Path:
    """Geometric means of torch eager's time over each contender's: a line of panels an op, a column a pass, a bar a
    contender and dtype."""
    names = [name for name in in_order(record["contender"] for record in records) if name != BASE]
    dtypes = list(dict.fromkeys(record["dtype"] for record in records))
    cells = {
        (op, mode): _means([r for r in records if (r["op"], r["mode"]) == (op, mode)], names, dtypes)
        for op in TITLE
        for mode in PASSES
    }
    ops = [op for op in TITLE if any(cells[op, mode] for mode in PASSES)]
    modes = [mode for mode in PASSES if any(cells[op, mode] for op in TITLE)]
    present = {op: [n for n in names if any(n == m for mode in modes for m, _ in cells[op, mode])] for op in ops}
    title = "Speed-up over torch eager: its time ÷ the contender's, geometric mean (of how many points)"
    foot = ["only points that both were timed on", f"dotted line: as fast as {BASE}", machine]
    ever = {name for shown in present.values() for name in shown}
    absent = [name for name in names if name not in ever]
    foot += [f"nothing to compare: {', '.join(absent)}"] if absent else []
    heights = [BAR * len(dtypes) * len(present[op]) + BETWEEN for op in ops]
    canvas = Canvas(max(sum(heights), 0.8), title, foot, dtypes)
    if ops:
        every = [mean for cell in cells.values() for mean, _ in cell.values()]
        panels = canvas.figure.subplots(len(ops), len(modes), squeeze=False, height_ratios=heights, sharex=True)
        for line, op in enumerate(ops):
            for column, mode in enumerate(modes):
                ax = panels[line, column]
                _panel(ax, present[op], dtypes, cells[op, mode], column == 0)
                headed(ax, f"{TITLE[op]}, {MODE_TITLE[mode]}", 9.5)
        _scale(panels[0, 0], min([*every, 1.0]), max([*every, 1.0]), len(modes))
        canvas.legend({d: _patch(FAINT, i) for i, d in enumerate(dtypes)})
    else:
        canvas.figure.text(0.5, 0.5, f"No point was timed with both {BASE} and another contender.", ha="center")
    return canvas.save(path)


def _patch(colour: str, number: int) -> Patch:
    """How the dtype of that number is drawn."""
    return Patch(facecolor=tinted(colour, TINTS[number]), edgecolor=colour, hatch=HATCHES[number], linewidth=0.6)


def _scale(ax: Axes, low: float, high: float, columns: int) -> None:
    """Logarithmic, with room at the right for what is written beside the longest bar."""
    ax.set_xscale("log")
    room = {1: 0.1, 2: 0.22, 3: 0.42}[columns]
    left, right = min(low / 1.15, 0.85), high * 1.05
    ax.set_xlim(left, right * (right / left) ** room)
    ax.set_xticks([tick for tick in TICKS if left <= tick <= right])
    if len(ax.get_xticks()) < 2:
        ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))


def _panel(
    ax: Axes, names: Sequence[str], dtypes: Sequence[str], means: dict[tuple[str, str], Mean], named: bool
) -> None:
    """Bars from 1 to the mean; the value stands right of the bar or, of a slower one, right of the line."""
    clean(ax, "x")
    styles = styles_of(names)
    thick = 0.86 / len(dtypes)
    for row, name in enumerate(names):
        for number, dtype in enumerate(dtypes):
            y = row + (number - (len(dtypes) - 1) / 2) * thick
            if (name, dtype) not in means:
                ax.annotate("·", (1, y), (5, 0), textcoords="offset points", va="center", fontsize=7.5, color=FAINT)
                continue
            mean, count = means[name, dtype]
            colour = styles[name].colour
            ax.barh(
                y, mean - 1, left=1, height=0.84 * thick, facecolor=tinted(colour, TINTS[number]), edgecolor=colour,
                hatch=HATCHES[number], linewidth=0.6,
            )  # fmt: skip
            ax.annotate(
                f"{mean:.2f}× ({count})", (max(mean, 1), y), (4, 0), textcoords="offset points", va="center",
                fontsize=7.5, color=INK,
            )  # fmt: skip
    ax.axvline(1, color=INK, linewidth=1.1, linestyle=":")
    ax.set_yticks(range(len(names)), names if named else [], fontsize=8.5)
    ax.set_ylim(len(names) - 0.4, -0.6)
