"""A picture of which elements each norm reduces over, in [B, C, H, W] and in [B, T, D]."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Polygon
from numpy.typing import NDArray

Point = tuple[float, float]
Index = tuple[int, ...]

# Okabe and Ito's blue and vermilion: told apart by colour-blind readers.
BATCH, LAYER = "#0072B2", "#D55E00"
INK, LINE, PAPER = "#222222", "#8A8A8A", "#F6F6F6"


@dataclass(frozen=True)
class Panel:
    """One norm on one shape: the axes that it reduces over, and one element, whose group is drawn filled."""

    norm: str
    layout: str
    letters: str
    shape: Index
    reduced: Index
    chosen: Index
    each: str
    colour: str

    @property
    def kept(self) -> Index:
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.reduced)

    def group(self) -> NDArray[np.bool_]:
        """The elements of x that share the mean of the element `chosen`."""
        mask = np.zeros(self.shape, dtype=bool)
        mask[tuple(slice(None) if axis in self.reduced else i for axis, i in enumerate(self.chosen))] = True
        return mask


IMAGES, SEQUENCES = (2, 3, 4, 4), (2, 4, 6)
PANELS = (
    Panel("BatchNorm2d(C)", "x: [B, C, H, W]", "BCHW", IMAGES, (0, 2, 3), (0, 1, 0, 0), "channel", BATCH),
    Panel("LayerNorm([C, H, W])", "x: [B, C, H, W]", "BCHW", IMAGES, (1, 2, 3), (0, 0, 0, 0), "sample", LAYER),
    Panel("BatchNorm1d(D)", "x: [B, T, D], passed as [B, D, T]", "BTD", SEQUENCES, (0, 1), (0, 0, 2), "feature", BATCH),
    Panel("LayerNorm(D)", "x: [B, T, D]", "BTD", SEQUENCES, (2,), (0, 1, 0), "row (b, t)", LAYER),
)


def draw(path: str | Path) -> Path:
    """Draw the picture into `path`, a PNG, and return the path."""
    figure = Figure(figsize=(11.0, 6.9), facecolor="white")
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.015, right=0.985, bottom=0.01, top=0.985, wspace=0.08, hspace=0.06)
    for panel, ax in zip(PANELS, figure.subplots(2, 2).flat, strict=True):
        _draw_panel(ax, panel)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def _draw_panel(ax: Axes, panel: Panel) -> None:
    ax.set(xlim=(0, 10.6), ylim=(-5.65, 0.7), aspect="equal")
    ax.axis("off")
    ax.text(0, 0.4, panel.norm, fontsize=14, fontweight="bold", color=panel.colour, va="center")
    ax.text(10.6, 0.4, panel.layout, fontsize=12, color=INK, va="center", ha="right")
    ax.plot((0, 10.6), (0, 0), color=panel.colour, linewidth=1.2)
    (_draw_images if len(panel.shape) == 4 else _draw_sequences)(ax, panel)
    _arrow(ax, (0.45, -1.2), (0.45, -4.9), "B", (-0.27, 0))
    _draw_means(ax, panel)


def _draw_images(ax: Axes, panel: Panel) -> None:
    """Each sample a row of channel sheets; H runs down, W recedes."""
    _, channels, height, width = panel.shape
    mask = panel.group()

    def corner(b: int, c: int, h: int, w: int) -> Point:
        return 1.55 + 1.75 * c + 0.32 * w, -1.35 - 2.45 * b - 0.36 * h + 0.20 * w

    for b, c, h, w in np.ndindex(panel.shape):
        cell = (corner(b, c, h, w), corner(b, c, h, w + 1), corner(b, c, h + 1, w + 1), corner(b, c, h + 1, w))
        _cell(ax, cell, panel.colour if mask[b, c, h, w] else PAPER)
    left, bottom = corner(0, 0, 0, 0), corner(0, 0, height, 0)
    _arrow(ax, (left[0] - 0.16, left[1]), (bottom[0] - 0.16, bottom[1]), "H", (-0.25, 0))
    far = corner(0, 0, 0, width)
    _arrow(ax, (left[0] - 0.08, left[1] + 0.13), (far[0] - 0.08, far[1] + 0.13), "W", (-0.12, 0.24))
    first, last = corner(1, 0, height, 2), corner(1, channels - 1, height, 2)
    _arrow(ax, (first[0], first[1] - 0.6), (last[0], last[1] - 0.6), "C", (0, -0.28))


def _draw_sequences(ax: Axes, panel: Panel) -> None:
    """Each sample a matrix; T runs down, D to the right."""
    _, length, features = panel.shape
    mask = panel.group()

    def corner(b: int, t: int, d: int) -> Point:
        return 1.55 + 0.78 * d, -1.0 - 2.45 * b - 0.47 * t

    for b, t, d in np.ndindex(panel.shape):
        cell = (corner(b, t, d), corner(b, t, d + 1), corner(b, t + 1, d + 1), corner(b, t + 1, d))
        _cell(ax, cell, panel.colour if mask[b, t, d] else PAPER)
    left, bottom = corner(0, 0, 0), corner(0, length, 0)
    _arrow(ax, (left[0] - 0.16, left[1]), (bottom[0] - 0.16, bottom[1]), "T", (-0.25, 0))
    right = corner(0, 0, features)
    _arrow(ax, (left[0], left[1] + 0.16), (right[0], right[1] + 0.16), "D", (0, 0.27))


def _draw_means(ax: Axes, panel: Panel) -> None:
    """The tensor of means to the right of x, with the mean of the filled group filled."""
    kept = [panel.shape[axis] for axis in panel.kept]
    chosen = [panel.chosen[axis] for axis in panel.kept]
    if len(kept) == 1:
        # B runs down, as it does in x; every other axis to the right.
        kept, chosen = ([*kept, 1], [*chosen, 0]) if panel.kept == (0,) else ([1, *kept], [0, *chosen])
    (rows, columns), (row, column) = kept, chosen
    size, centre = 0.42, 8.85
    left, top = centre - columns * size / 2, -2.85 + rows * size / 2
    for r, c in np.ndindex(rows, columns):
        x, y = left + c * size, top - r * size
        filled = (r, c) == (row, column)
        _cell(ax, ((x, y), (x + size, y), (x + size, y - size), (x, y - size)), panel.colour if filled else PAPER)
    letters = [panel.letters[axis] for axis in panel.kept]
    _write(ax, (centre, -1.95), f"mean over {', '.join(panel.letters[i] for i in panel.reduced)}", 11.5)
    _write(ax, (centre, -3.8), f"{'·'.join(letters)} means", 13, weight="bold")
    _write(ax, (centre, -4.25), f"one for each {panel.each}", 10.5)
    ax.add_patch(_arrow_patch((6.75, -2.85), (7.6, -2.85), panel.colour, 2.2))


def _cell(ax: Axes, corners: tuple[Point, ...], colour: str) -> None:
    ax.add_patch(Polygon(corners, facecolor=colour, edgecolor=LINE if colour == PAPER else INK, linewidth=0.7))


def _arrow(ax: Axes, start: Point, end: Point, letter: str, shift: Point) -> None:
    ax.add_patch(_arrow_patch(start, end, INK, 1.0))
    _write(ax, ((start[0] + end[0]) / 2 + shift[0], (start[1] + end[1]) / 2 + shift[1]), letter, 11.5)


def _arrow_patch(start: Point, end: Point, colour: str, width: float) -> FancyArrowPatch:
    return FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=9 + 3 * width, color=colour, linewidth=width, shrinkA=0, shrinkB=0
    )


def _write(ax: Axes, at: Point, text: str, size: float, weight: str = "normal") -> None:
    ax.text(*at, text, fontsize=size, fontweight=weight, color=INK, ha="center", va="center")
