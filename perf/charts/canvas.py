"""What all pictures share: light, legible in print, told apart by colour-blind readers (Okabe and Ito's colours)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from math import log10
from pathlib import Path
from textwrap import shorten

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from PIL import Image

INK, FAINT, GREY, GRID, PALE = "#222222", "#6B6B6B", "#CDCDCD", "#E3E3E3", "#F4F4F4"
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442",
)  # fmt: skip


@dataclass(frozen=True)
class Style:
    """Of one contender, in every picture the same."""

    colour: str
    marker: str
    size: float = 1.0  # that makes it look as large as a circle


# What is compiled has its maker's hue and marker's kind: a circle of blues, triangles of greens.
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
    "apex": Style(INK, "X", 1.15),
    "FlagGems": Style("#8A8A8A", "*", 1.75),
}
SPARE_STYLES = (Style("#882255", "p"), Style("#332288", ">"), Style("#999933", "d"))
DPI, COLOURS = 150, 256
DOT = "   ·   "
HINTED = 1.03  # a text in pixels is a little wider than its outline
WIDTH = 12.4  # inches, as all heights
HEAD, LEGEND_LINE, FOOT_LINE, EDGE = 0.72, 0.2, 0.16, 0.12
LEGEND_SIZE, TITLE_SIZE, FOOT_SIZE = 9.5, 13, 8
LEGEND_ENTRY = 0.53  # beside its text


def styles_of(names: Sequence[str]) -> dict[str, Style]:
    spare = iter(SPARE_STYLES * len(names))
    return {name: STYLES.get(name) or next(spare) for name in names}


def in_order(names: Iterable[str]) -> list[str]:
    """Those that have a style of their own first, in the styles' order."""
    found = list(dict.fromkeys(names))
    return sorted(found, key=lambda name: list(STYLES).index(name) if name in STYLES else len(STYLES))


@lru_cache(4096)
def text_width(text: str, size: float) -> float:
    """In inches."""
    if not text:
        return 0.0
    return float(TextPath((0, 0), text.replace("$", r"\$"), size=size).get_extents().width) * HINTED / 72


@lru_cache(1024)
def fitting(text: str, size: float, width: float) -> str:
    """Its beginning, as much as `width` inches hold."""
    whole = text_width(text, size)
    if whole <= width:
        return text
    length = int(1.1 * len(text) * width / whole)
    while length > 12 and text_width(shorten(text, length, placeholder=" …"), size) > width:
        length -= 2
    return shorten(text, max(length, 12), placeholder=" …")


def _lines(parts: Sequence[str], size: float, extra: float) -> list[list[str]]:
    """As many parts on a line as the width has room for."""
    lines: list[list[str]] = [[]]
    left = WIDTH - 2 * EDGE
    for part in parts:
        width = text_width(part, size) + extra
        if width > left and lines[-1]:
            lines.append([])
            left = WIDTH - 2 * EDGE
        lines[-1].append(part)
        left -= width
    return lines


class Canvas:
    """A figure with a band for its title and legend above the panels, and one for what is known of it below.

    `named`: what the legend will hold, for which room is left; `foot`: parts that are set apart by dots.
    """

    def __init__(self, height: float, title: str, foot: Sequence[str], named: Sequence[str] = ()) -> None:
        parts = [part.strip() for part in DOT.join(foot).split(DOT.strip()) if part.strip()]
        below = [DOT.join(line) for line in _lines(parts, FOOT_SIZE, 0.32)]
        self._named = list(named)
        self._columns = min(map(len, self._legend_lines(named))) if named else 0
        legend_lines = -(-len(named) // self._columns) if named else 0
        head, foot_height = HEAD - LEGEND_LINE + legend_lines * LEGEND_LINE, 0.18 + FOOT_LINE * len(below)
        total = height + head + foot_height
        self.figure = Figure(figsize=(WIDTH, total), facecolor="white")
        FigureCanvasAgg(self.figure)
        band = (0, foot_height / total, 0.995, 1 - (head + foot_height) / total)
        self.figure.set_layout_engine("constrained", rect=band)
        at = EDGE / WIDTH
        self.figure.text(at, 1 - 0.1 / total, title, fontsize=TITLE_SIZE, color=INK, fontweight="bold", va="top")
        self.figure.text(at, 0.08 / total, "\n".join(below), fontsize=FOOT_SIZE, color=FAINT, va="bottom")

    @staticmethod
    def _legend_lines(named: Sequence[str]) -> list[list[str]]:
        """Lines of equally many entries, whose columns are as wide as their widest."""
        for columns in range(len(named), 0, -1):
            widths = [max(text_width(name, LEGEND_SIZE) for name in named[i::columns]) for i in range(columns)]
            if sum(widths) + columns * LEGEND_ENTRY < WIDTH - 2 * EDGE:
                return [list(named[:columns])]
        return [list(named[:1])]

    def legend(self, handles: dict[str, Artist] | None = None) -> None:
        """Of what the panels have labels for, in the order that it was named, or of `handles`."""
        if handles is None:
            handles = {}
            for ax in self.figure.axes:
                handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
            handles = {name: handles[name] for name in self._named if name in handles}
        if not handles:
            return
        rows = -(-len(handles) // (self._columns or len(handles)))
        columns = -(-len(handles) // rows)
        # matplotlib fills columns first; lines are read first.
        ordered = [name for column in range(columns) for name in list(handles)[column::columns]]
        self.figure.legend(
            [handles[name] for name in ordered], ordered, loc="upper left", ncols=columns,
            bbox_to_anchor=(0.0, 1 - 0.36 / self.figure.get_figheight()), frameon=False, fontsize=LEGEND_SIZE,
            columnspacing=1.4, handlelength=1.6,
        )  # fmt: skip

    def save(self, path: Path) -> Path:
        """With so few colours that it is a third as long, which the page and the repository hold many of."""
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = BytesIO()
        self.figure.savefig(drawn, dpi=DPI)
        few = Image.open(drawn).convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(path, dpi=(DPI, DPI))
        return path


def clean(ax: Axes, grid_axis: str = "both") -> None:
    if grid_axis:
        ax.grid(True, axis=grid_axis, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    ax.set_axisbelow(True)
    ax.tick_params(colors=INK, labelsize=9, length=3)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(FAINT)


def headed(ax: Axes, text: str, size: float = 10) -> None:
    ax.set_title(text, fontsize=size, color=INK, loc="left")


def tinted(colour: str, share: float) -> str:
    """The colour mixed with white."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 - share * (255 - part)):02X}" for part in parts)


def short(value: float) -> str:
    """1024 as 1K, 262144 as 256K, 1000 as 1000."""
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}K" if value < 1 << 20 else f"{value / (1 << 20):g}M"
    return f"{value:.3g}" if value < 100 else f"{value:g}"


def power(value: float, _: int = 0) -> str:
    """A power of ten on an axis."""
    return f"{value:g}" if value < 1e5 else f"1e{round(log10(value))}"


def microseconds(value: float) -> str:
    return f"{value:.2f} µs" if value < 10 else f"{value:.1f} µs" if value < 100 else f"{value:,.0f} µs"
