"""Lower bounds on the time of each op on GPUs that are not here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from perf.charts.canvas import BLUE, GRID, INK, ORANGE, PURPLE, Canvas, clean, headed, microseconds, power
from perf.findings import Record, lying, ok
from perf.points import MODE_TITLE, PASSES, TITLE

ROW, SECTION, HEADER = 0.18, 0.3, 0.75  # inches; a section's heading takes the place of lines
TEXT = 7.5
LIMITS = {"memory bandwidth": (BLUE, ""), "occupancy": (ORANGE, "////"), "latency": (PURPLE, "....")}
MEANING = {
    "memory bandwidth": "by the memory's peak bandwidth",
    "occupancy": "by the loads that resident programs have in flight",
    "latency": "by the latency of one load",
}


def bounds(bounds: Sequence[Record], machine: str, path: Path) -> Path:
    """A panel a GPU, a line an op, pass and input: the time below which no call can be, by what it is limited."""
    computed = ok(bounds)
    gpus = list(dict.fromkeys(record["gpu"] for record in computed))
    lines, headings = _lines(computed)
    title = "Lower bound on time, µs: computed, never measured"
    foot = [
        "lower bound on time, computed from bytes counted and kernels compiled, never measured: no call is faster,"
        " how much slower each is remains unknown",
        "cold caches at the start; what is written may still be in cache at the end",
        machine,
    ]
    without = len({_line(record) for record in bounds} - {_line(record) for record in computed})
    foot += [f"{without} inputs without a bound: not both counted and compiled"] if without else []
    height = ROW * (len(lines) + SECTION / ROW * len(headings)) + HEADER if lines else 0.8
    canvas = Canvas(height, title, foot, [MEANING[limit] for limit in LIMITS])
    if lines:
        panels = canvas.figure.subplots(1, len(gpus), squeeze=False, sharex=True, sharey=True)[0]
        for ax, gpu in zip(panels, gpus, strict=True):
            _panel(ax, [r for r in computed if r["gpu"] == gpu], lines)
            headed(ax, gpu)
            ax.set_xlabel("bound, µs", fontsize=9, color=INK)
        _names(panels[0], lines, headings)
        times = [record["bound_us"] for record in computed]
        _scale(panels[0], min(times), max(times), len(gpus))
        canvas.legend({MEANING[n]: Patch(facecolor=c, hatch=h, edgecolor="white") for n, (c, h) in LIMITS.items()})
    else:
        canvas.figure.text(0.5, 0.5, "No bound could be computed.", ha="center")
    return canvas.save(path)


def _line(record: Record) -> tuple[str, str, str]:
    return record["op"], record["mode"], f"{lying(record)} {record['dtype']}"


def _lines(records: Sequence[Record]) -> tuple[dict[tuple[str, str, str], float], dict[str, float]]:
    """Where each line and each heading is, in lines from above."""
    known = dict.fromkeys(_line(record) for record in records)
    lines: dict[tuple[str, str, str], float] = {}
    headings: dict[str, float] = {}
    y = 0.0
    for op in TITLE:
        for mode in PASSES:
            mine = [line for line in known if line[:2] == (op, mode)]
            if mine:
                headings[f"{TITLE[op]}, {MODE_TITLE[mode]}"] = y + SECTION / ROW - 1.1
                y += SECTION / ROW
            for line in mine:
                lines[line] = y
                y += 1
    return lines, headings


def _names(ax: Axes, lines: dict[tuple[str, str, str], float], headings: dict[str, float]) -> None:
    ax.set_yticks(list(lines.values()), [text for _, _, text in lines], fontsize=TEXT)
    ax.set_ylim(max(lines.values()) + 0.7, -0.7)
    for text, y in headings.items():
        ax.annotate(
            text, (0, y), (-5, 0), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
            va="center", fontsize=8.5, fontweight="bold", color=INK,
        )  # fmt: skip


def _scale(ax: Axes, low: float, high: float, panels: int) -> None:
    """Logarithmic, with room for what is written beside the longest bar."""
    ax.set_xscale("log")
    left = low / 2
    ax.set_xlim(left, high * (high / left) ** (0.14 * panels))
    ax.xaxis.set_major_locator(LogLocator(numticks=5))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(power))


def _panel(ax: Axes, records: Sequence[Record], lines: dict[tuple[str, str, str], float]) -> None:
    clean(ax, "")
    ax.grid(True, axis="x", color=GRID, linewidth=0.8)
    ax.tick_params(axis="y", length=0)
    for limit, (colour, hatch) in LIMITS.items():
        mine = [record for record in records if record["limited_by"] == limit]
        places = [lines[_line(record)] for record in mine]
        times = [record["bound_us"] for record in mine]
        ax.barh(places, times, height=0.72, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
        for y, time in zip(places, times, strict=True):
            text = "≥ " + microseconds(time).removesuffix(" µs")
            ax.annotate(text, (time, y), (3, 0), textcoords="offset points", va="center", fontsize=TEXT, color=INK)
