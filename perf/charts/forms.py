"""Marks the launches of the library's own points in pictures of which some points were clusters."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from perf.charts.style import INK
from perf.findings import blocks_of, reads_twice
from perf.records import Timing, ok

CLUSTER, NUMBERED, TWICE = "cluster of blocks", "cluster, number of blocks", "two launches"
# Sizes of the marks around a point over its own, and of the digits above, in typographic points.
RING, BOX, DIGITS_POINTS = 1.8, 1.7, 6.5


def has_clusters(records: Sequence[Timing]) -> bool:
    """Decides whether any point was launched as a cluster. Only the library's own records tell of launches."""
    return any(blocks_of(record) > 1 for record in ok(records))


def mark(ax: Axes, points: Sequence[tuple[float, float, Timing]], size: float, numbers: bool) -> None:
    """Draws a ring around each point that was a cluster, and a box around each that took two launches.

    Args:
        points: x and y, and the record.
        size: of the points' own marks, in typographic points.
        numbers: the number of a cluster's blocks stands above its ring.
    """
    rings = [point for point in points if blocks_of(point[-1]) > 1]
    boxes = [point for point in points if reads_twice(point[-1])]
    marks = ("o", RING, rings, NUMBERED if numbers else CLUSTER), ("s", BOX, boxes, TWICE)
    for marker, scale, marked, label in marks:
        if marked:
            ax.plot(
                [x for x, _, _ in marked], [y for _, y, _ in marked], marker, markersize=scale * size, label=label,
                color=INK, fillstyle="none", markeredgewidth=0.7, zorder=5 if numbers else 2,
            )  # fmt: skip
    for x, y, record in rings if numbers else ():
        ax.annotate(
            str(blocks_of(record)), (x, y), (0, RING * size / 2 + 1), textcoords="offset points", ha="center",
            fontsize=DIGITS_POINTS, color=INK, zorder=6, path_effects=[withStroke(linewidth=1.5, foreground="white")],
        )  # fmt: skip
