"""Bytes that the kernels ask for, over the fewest that must move."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from perf.charts.canvas import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    Canvas,
    clean,
    headed,
)
from perf.findings import Record, lying, ok
from perf.points import MODE_TITLE, PASSES, TITLE, floor_of

PARTS = {
    "x, residual, dy loaded": ("loaded", ("bulk",), BLUE),
    "y, total, dx stored": ("stored", ("bulk",), SKY),
    "bits": ("both", ("bits",), VERMILION),
    "weights and their gradients": ("both", ("parameters",), YELLOW),
    "statistics": ("both", ("statistics",), ORANGE),
    "partial sums": ("both", ("partials",), PURPLE),
    "loaded again by one program, from cache": ("again", ("bulk", "bits"), GREY),
}
EACH_ONCE, OF_TWO, FLOOR = "each address once", "floor of two launches", "floor"
BAR = 0.25  # inches


def traffic(records: Sequence[Record], machine: str, path: Path) -> Path:
    """Bytes that the kernels ask for over the floor, made up of what they are for; the footprint as a mark."""
    counted = ok(records)
    ops = [op for op in TITLE if any(record["op"] == op for record in counted)]
    modes = [mode for mode in PASSES if any(record["mode"] == mode for record in counted)]
    heights = [max(len(_of(counted, op, mode)) for mode in modes) for op in ops]
    foot = ["counted under Triton's interpreter, as launched on a GPU of 132 multiprocessors, nothing timed", machine]
    title = "Bytes that the kernels ask for, over the fewest that must move"
    height = BAR * sum(heights) + 0.62 * max(len(ops), 1)
    canvas = Canvas(height, title, foot, [*PARTS, EACH_ONCE, OF_TWO, FLOOR])
    if ops:
        ratios = [h + 0.6 for h in heights]
        panels = canvas.figure.subplots(len(ops), len(modes), squeeze=False, height_ratios=ratios)
        for column, mode in enumerate(modes):
            widest = max([r["total_bytes"] / r["floor_bytes"] for r in counted if r["mode"] == mode] + [1.0])
            for ax, op in zip(panels[:, column], ops, strict=True):
                _panel(ax, op, mode, _of(counted, op, mode))
                ax.set_xlim(0, 1.1 * widest)
            panels[-1, column].set_xlabel("bytes ÷ floor", fontsize=9, color=INK)
    canvas.legend()
    return canvas.save(path)


def _of(records: Sequence[Record], op: str, mode: str) -> list[Record]:
    return [record for record in records if (record["op"], record["mode"]) == (op, mode)]


def part_bytes(record: Record, direction: str, groups: Sequence[str]) -> int:
    again: int = sum(record["again"].get(group, 0) for group in groups)
    if direction == "again":
        return again
    directions = ("loaded", "stored") if direction == "both" else (direction,)
    moved: int = sum(record["bytes"][group][way] for group in groups for way in directions)
    return moved - again if "loaded" in directions else moved


def _panel(ax: Axes, op: str, mode: str, records: Sequence[Record]) -> None:
    clean(ax, "x")
    records = list(reversed(records))
    places = range(len(records))
    left = [0.0] * len(records)
    for label, (direction, groups, colour) in PARTS.items():
        widths = [part_bytes(record, direction, groups) / record["floor_bytes"] for record in records]
        ax.barh(places, widths, left=left, height=0.68, color=colour, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    footprint = [record["footprint_bytes"] / record["floor_bytes"] for record in records]
    ax.plot(footprint, places, "D", color="white", markeredgecolor=INK, markersize=4.5, label=EACH_ONCE)
    two = [(r["apart_floor_bytes"] / r["floor_bytes"], place) for r, place in zip(records, places, strict=True)]
    two = [(ratio, place) for ratio, place in two if ratio > 1 and len(records[place]["launches"]) > 1]
    if two:
        ax.plot(*zip(*two, strict=True), "|", color=INK, markersize=11, label=OF_TWO)
    ax.axvline(1.0, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), label=FLOOR)
    for place, total, once in zip(places, left, footprint, strict=True):
        ax.annotate(
            f"{total:.2f}", (max(total, once), place), (5, 0), textcoords="offset points", va="center", fontsize=8,
            color=INK,
        )  # fmt: skip
    ax.set_yticks(places, [f"{lying(record)} {record['dtype']}" for record in records], fontsize=8)
    ax.set_ylim(-0.6, len(records) - 0.4)
    headed(ax, f"{TITLE[op]}, {MODE_TITLE[mode]} (floor {floor_of(op, mode).short})")
