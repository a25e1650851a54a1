"""Holds the styles of all pictures: legible in print, told apart by colour-blind readers (Okabe and Ito's colours)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT, GRID, PALE = "#222222", "#6B6B6B", "#E3E3E3", "#F4F4F4"
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#CDCDCD",
)  # fmt: skip
WIDTH_INCHES, DPI = 12.0, 110
DASHED = (0, (5, 3))
# WebP has at most 16383 pixels a side.
MOST_INCHES = 16383 // DPI


@dataclass(frozen=True)
class Style:
    """Looks of one contender in every picture; `size` makes a marker look as large as a circle."""

    colour: str
    marker: str
    size: float = 1.0


# Compiled contenders have their maker's hue: blues are ours, greens torch.compile's.
STYLES = {
    "triton_norm": Style(BLUE, "o"),
    "triton_norm, compiled": Style(SKY, "h", 1.1),
    "triton_norm, compiled, kernels forced": Style("#1F2F6B", "8"),
    "torch": Style(VERMILION, "s"),
    "torch.compile": Style(GREEN, "^"),
    "torch.compile, max-autotune": Style("#00573F", "v"),
    "Liger-Kernel": Style(ORANGE, "D", 0.9),
    "QuACK": Style(PURPLE, "P", 1.2),
    "flash-linear-attention": Style("#7F3F00", "<"),
    "mamba-ssm": Style("#882255", "p", 1.15),
    "apex": Style(INK, "X", 1.15),
    "FlagGems": Style("#8A8A8A", "*", 1.75),
}
SPARE_STYLES = (Style("#332288", ">"), Style("#999933", "d"))


def styles_of(names: Sequence[str]) -> dict[str, Style]:
    spare = iter(SPARE_STYLES * len(names))
    return {name: STYLES.get(name) or next(spare) for name in names}


def in_order(names: Iterable[str]) -> list[str]:
    """Returns each name once, those that have a style of their own first, in the styles' order."""
    distinct = list(dict.fromkeys(names))
    return sorted(distinct, key=lambda name: list(STYLES).index(name) if name in STYLES else len(STYLES))


def sheet(height_inches: float) -> Figure:
    return Figure(figsize=(WIDTH_INCHES, min(height_inches, MOST_INCHES)), layout="constrained", facecolor="white")


def legend(figure: Figure) -> None:
    """Puts one legend above the panels, for the labels of all of them."""
    handles: dict[str, Any] = {}
    for ax in figure.axes:
        handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    handles = {name: handles[name] for name in in_order(handles)}
    columns = 5 if max(map(len, handles), default=0) < 30 else 3
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=columns, frameon=False, fontsize=9)


def panel(ax: Axes, title: str, grid_axis: str = "both") -> None:
    ax.grid(True, axis=grid_axis, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    ax.set_axisbelow(True)
    ax.tick_params(colors=INK, labelsize=8.5, length=3)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(FAINT)
    ax.set_title(title, fontsize=10, color=INK, loc="left")


def encoded(figure: Figure, kind: str = "webp") -> bytes:
    """Returns the picture's file, "webp", which is a third as long, or "png"."""
    file = BytesIO()
    figure.savefig(file, dpi=DPI, format=kind, pil_kwargs={"lossless": True} if kind == "webp" else {})
    return file.getvalue()


def short(value: float) -> str:
    """Returns 1024 as 1K, 262144 as 256K, 1000 as 1000."""
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}K" if value < 1 << 20 else f"{value / (1 << 20):g}M"
    return f"{value:.3g}" if value < 100 else f"{value:g}"
