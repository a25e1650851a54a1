"""Achieved GFLOP/s against arithmetic intensity, under the measured copy bandwidth and the peak of fp32."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from perf.charts.canvas import FAINT, GREY, GRID, INK, WIDTH, Canvas, Style, clean, headed, in_order, styles_of
from perf.findings import Record, lying, ok
from perf.points import MODE_TITLE, PASSES, TITLE

PANEL, LABELS = 4.3, 1.75  # inches, of a dtype's panel and of the names above its columns
LEADER = {"arrowstyle": "-", "color": GREY, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0, "relpos": (0.5, 0)}
NARROW = 0.24  # of the width, for the whole roofline beside the part that matters
DECADES = tuple(10.0**e for e in range(-3, 8))
TICKS = tuple(m * decade for decade in DECADES for m in (1, 2, 5))
FINE_TICKS = tuple(m * decade for decade in DECADES for m in (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8))

Columns = dict[tuple[str, str], list[Record]]  # by op and pass, what was timed at one input


def roofline(
    records: Sequence[Record], roof_gbps: float | None, peak_gflops: float | None, machine: str, path: Path
) -> Path:
    """For each dtype the part of the roofline where norms are: a column of marks for each op and pass at its largest
    input, and beside it, where the peak is known, the whole."""
    timed = [record for record in ok(records) if record["flops"]]
    names = in_order(record["contender"] for record in records)
    styles = styles_of(names)
    dtypes = list(dict.fromkeys(record["dtype"] for record in timed))
    title = "Roofline: GFLOP/s achieved against operations a byte that must move, each op at its largest input"
    foot = ["intensity: operations ÷ bytes at the floor", "of the largest inputs the one that most were timed on"]
    foot += ["columns closer than a mark's width are set side by side"]
    foot += [f"copy bandwidth measured, {roof_gbps:,.0f} GB/s" if roof_gbps else "copy bandwidth not measured"]
    foot += [f"peak of fp32 {peak_gflops / 1e3:,.1f} TFLOP/s" if peak_gflops else "peak of fp32 not known", machine]
    canvas = Canvas(max(len(dtypes) * (PANEL + LABELS), 0.8), title, foot, names)
    whole = NARROW if roof_gbps and peak_gflops else 0.0
    if dtypes:
        grid = canvas.figure.add_gridspec(len(dtypes), 2 if whole else 1, width_ratios=_ratios(whole))
        for line, dtype in enumerate(dtypes):
            columns = _columns([record for record in timed if record["dtype"] == dtype])
            _line(canvas, grid, line, dtype, columns, styles, (roof_gbps, peak_gflops))
        marks = {n: Line2D([], [], color=s.colour, marker=s.marker, ls="", ms=7 * s.size) for n, s in styles.items()}
        canvas.legend(dict(marks))
    else:
        canvas.figure.text(0.5, 0.5, "Nothing was timed.", ha="center")
    return canvas.save(path)


def _ratios(whole: float) -> list[float]:
    return [1 - whole, whole] if whole else [1.0]


def _columns(records: Sequence[Record]) -> Columns:
    """At the largest input; of several that are as large within a tenth, the one that most were timed on."""
    columns: Columns = {}
    for op in TITLE:
        for mode in PASSES:
            inputs: dict[str, list[Record]] = {}
            for record in records:
                if (record["op"], record["mode"]) == (op, mode):
                    inputs.setdefault(lying(record), []).append(record)
            if inputs:
                largest = max(found[0]["floor_bytes"] for found in inputs.values())
                large = [found for found in inputs.values() if found[0]["floor_bytes"] > 0.9 * largest]
                columns[op, mode] = max(large, key=len)
    return columns


def _intensity(record: Record) -> float:
    return float(record["flops"] / record["floor_bytes"])


def _gflops(record: Record) -> float:
    return float(record["flops"] / record["median_us"] / 1e3)


def _line(
    canvas: Canvas, grid: GridSpec, line: int, dtype: str, columns: Columns, styles: dict[str, Style],
    roofs: tuple[float | None, float | None],
) -> None:  # fmt: skip
    """The panels of one dtype."""
    roof, peak = roofs
    ax = canvas.figure.add_subplot(grid[line, 0])
    values = {key: _intensity(found[0]) for key, found in columns.items()}
    low, high = min(values.values()) / 1.15, max(values.values()) * 1.15
    if high / low < 4:
        low, high = low / (4 * low / high) ** 0.5, high * (4 * low / high) ** 0.5
    rates = [_gflops(record) for found in columns.values() for record in found]
    top = max([*rates, min(roof * high, peak or roof * high) if roof else 0.0]) * 1.2
    box = low, high, min(rates) / 1.4, top
    _zoomed(ax, columns, styles, box, roofs, (1 - NARROW if roof and peak else 1.0) * WIDTH - 1.0)
    ax.set_title(dtype, fontsize=11, color=INK, loc="left", fontweight="bold", pad=LABELS * 72 - 16)
    ax.set_xlabel("FLOP a byte", fontsize=9, color=INK)
    ax.set_ylabel("GFLOP/s", fontsize=9, color=INK)
    if roof and peak:
        _whole(canvas.figure.add_subplot(grid[line, 1]), columns, styles, box, roof, peak)


def _zoomed(
    ax: Axes, columns: Columns, styles: dict[str, Style], box: tuple[float, float, float, float],
    roofs: tuple[float | None, float | None], width: float,
) -> None:  # fmt: skip
    low, high = box[:2]
    _logarithmic(ax, box)
    ax.grid(False, axis="x")
    _roofs(ax, low, high, *roofs)
    ordered = sorted(columns, key=lambda key: _intensity(columns[key][0]))
    span = high / low
    values = [_intensity(columns[key][0]) for key in ordered]
    marks = _apart([width * _log(value / low, span) for value in values], 0.15, width)
    labels = _apart(marks, 0.34, width)
    for key, mark, label in zip(ordered, marks, labels, strict=True):
        x = low * span ** (mark / width)
        ax.axvline(x, color=GRID, linewidth=0.8, zorder=0)
        for record in columns[key]:
            style = styles[record["contender"]]
            front = 5 if record["contender"] == "triton_norm" else 4
            ax.plot(
                x, _gflops(record), style.marker, color=style.colour, markersize=7 * style.size,
                markeredgecolor="white", markeredgewidth=0.6, zorder=front,
            )  # fmt: skip
        ax.annotate(
            f"{TITLE[key[0]]}\n{MODE_TITLE[key[1]]}", (mark / width, 1), (label / width, 1.06),
            xycoords="axes fraction", textcoords="axes fraction", rotation=90, ha="center", va="bottom", fontsize=7.5,
            color=INK, linespacing=1.05, multialignment="left", arrowprops=LEADER,
        )  # fmt: skip


def _log(ratio: float, base: float) -> float:
    return log(ratio) / log(base)


def _apart(places: Sequence[float], least: float, width: float) -> list[float]:
    """The same in order, moved as little as leaves `least` between two; all within the width where they fit."""
    moved = list(places)
    for _ in range(200):
        for left in range(len(moved) - 1):
            overlap = least - (moved[left + 1] - moved[left])
            if overlap > 1e-9:
                moved[left] -= overlap / 2
                moved[left + 1] += overlap / 2
        moved = [min(max(place, least / 2), width - least / 2) for place in moved]
    return moved


def _logarithmic(ax: Axes, box: tuple[float, float, float, float]) -> None:
    clean(ax)
    ax.set(xscale="log", yscale="log", xlim=box[:2], ylim=box[2:])
    for axis, (start, end) in ((ax.xaxis, box[:2]), (ax.yaxis, box[2:])):
        finest = [[t for t in ticks if start <= t <= end] for ticks in (FINE_TICKS, TICKS, DECADES)]
        axis.set_major_locator(FixedLocator(next((t for t in finest if len(t) < 10), finest[-1])))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:.0e}"))


def _roofs(ax: Axes, low: float, high: float, roof: float | None, peak: float | None) -> None:
    if roof:
        end = min(high, peak / roof) if peak else high
        ax.plot([low, end], [roof * low, roof * end], color=INK, linewidth=1.4, linestyle=(0, (5, 3)), zorder=2)
        if end < high:
            ax.plot([end, high], [roof * end, roof * end], color=INK, linewidth=1.4, zorder=2)


def _whole(
    ax: Axes, columns: Columns, styles: dict[str, Style], box: tuple[float, float, float, float], roof: float,
    peak: float,
) -> None:  # fmt: skip
    """Slope and peak, and where in it the other panel is."""
    low, high = box[0] / 2, max(4 * peak / roof, 4 * box[1])
    _logarithmic(ax, (low, high, box[2] / 2, 2.5 * peak))
    _roofs(ax, low, high, roof, peak)
    ax.add_patch(
        Rectangle((box[0], box[2]), box[1] - box[0], box[3] - box[2], facecolor=GRID, edgecolor=FAINT, zorder=1)
    )
    for found in columns.values():
        for record in found:
            ax.plot(_intensity(record), _gflops(record), ".", color=styles[record["contender"]].colour, markersize=3)
    ax.text(high / 1.1, peak * 1.08, f"{peak / 1e3:,.1f} TFLOP/s", fontsize=8, color=INK, ha="right", va="bottom")
    ridge = f"copy and peak meet\nat {peak / roof:.1f} FLOP a byte"
    ax.annotate(
        ridge, (peak / roof, peak), (0.97, 0.55), textcoords="axes fraction", fontsize=8, color=FAINT, ha="right",
        arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.8},
    )  # fmt: skip
    headed(ax, "the whole, grey: the part at the left")
    ax.set_xlabel("FLOP a byte", fontsize=9, color=INK)
