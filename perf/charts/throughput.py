"""GB/s against size, counted at the floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from perf.charts.canvas import GRID, INK, Canvas, Style, clean, headed, in_order, short, styles_of
from perf.findings import Record, ok, shape_text
from perf.points import ITEMSIZE, MODE_TITLE, TITLE, floor_of

MANY_POINTS = 18
MANY_CONTENDERS = 4
CATEGORIES = ("networks", "models")  # groups that are laid side by side, not along a scale
PANEL, SMALL = 3.4, 2.6  # inches
FAILED = "failed (in its contender's colour)"


@dataclass(frozen=True)
class Axis:
    """How a group of workloads is laid along x."""

    title: str
    label: str
    value: Callable[[Record], float]


def _mebibytes(record: Record) -> float:
    size = ITEMSIZE[record["dtype"]]
    for extent in record["shape"]:
        size *= extent
    return size / 2**20


AXES = {
    "columns": Axis("same number of elements, longer rows", "columns", lambda r: r["shape"][-1]),
    "models": Axis("hidden sizes of models", "columns", lambda r: r["shape"][-1]),
    "tokens": Axis("more rows", "rows", lambda r: r["shape"][0]),
    "batch": Axis("growing batch of 256 × 28 × 28", "size of x, MiB", _mebibytes),
    "networks": Axis("layers of networks", "", _mebibytes),
}
LAYOUT = {"contiguous": "channels first", "channels_last": "channels last"}


@dataclass(frozen=True)
class _Scale:
    """What all panels of a picture share."""

    styles: dict[str, Style]
    roof: float | None
    top: float


Key = tuple[str, str, int]  # group, layout, and of more and more rows the columns


def _key(record: Record) -> Key:
    return record["group"], record["layout"], record["shape"][-1] if record["group"] == "tokens" else 0


def _panels(records: Sequence[Record]) -> dict[Key, list[Record]]:
    groups, layouts = list(AXES), list(LAYOUT)
    keys = sorted({_key(r) for r in records}, key=lambda key: (groups.index(key[0]), layouts.index(key[1]), key[2]))
    return {key: [record for record in records if _key(record) == key] for key in keys}


def _width(key: Key, panels: dict[Key, list[Record]]) -> int:
    """In quarters of a line: all of it for many points or a panel that is alone, one for each of many row lengths."""
    if len(panels) == 1 or len({shape_text(record) for record in panels[key]}) > MANY_POINTS:
        return 4
    return 1 if sum(group == "tokens" for group, _, _ in panels) > 2 and key[0] == "tokens" else 2


def throughput(records: Sequence[Record], roof: float | None, machine: str, path: Path) -> Path:
    """GB/s against size for the contenders of one op, mode and dtype; a panel for every group of workloads."""
    op, mode, dtype = (records[0][name] for name in ("op", "mode", "dtype"))
    panels = _panels(records)
    places, heights = _places([_width(key, panels) for key in panels])
    title = f"{TITLE[op]}, {MODE_TITLE[mode]}, {dtype}: bytes at the floor ({floor_of(op, mode).short}) ÷ time"
    names = in_order(record["contender"] for record in records if record["status"] != "unsupported")
    without = [name for name in in_order(record["contender"] for record in records) if name not in names]
    foot = ["median, band or bar from the 20th to the 80th percentile, cold L2", machine]
    foot += [f"without such an op: {', '.join(without)}"] if without else []
    named = [*names, f"copy, {roof or 0:.0f} GB/s", FAILED]
    canvas = Canvas(sum(heights), title, foot, named)
    grid = canvas.figure.add_gridspec(len(heights), 4, height_ratios=heights)
    top = 1.08 * max([record["gbps"] for record in ok(records)] + [roof or 0.0, 1.0])
    scale = _Scale(styles_of(names), roof, top)
    for (line, columns), (key, chosen) in zip(places, panels.items(), strict=True):
        _panel(canvas.figure.add_subplot(grid[line, columns]), key, chosen, scale)
    canvas.legend()
    return canvas.save(path)


def _places(widths: Sequence[int]) -> tuple[list[tuple[int, slice]], list[float]]:
    """Line and columns of each panel, a line holding panels of one width; and the lines' heights."""
    places: list[tuple[int, slice]] = []
    heights: list[float] = []
    column, last = 4, 0
    for width in widths:
        if column + width > 4 or width != last:
            column, last = 0, width
            heights.append(SMALL if width == 1 else PANEL)
        places.append((len(heights) - 1, slice(column, column + width)))
        column += width
    return places, heights


def _panel(ax: Axes, key: Key, records: Sequence[Record], scale: _Scale) -> None:
    axis = AXES[key[0]]
    more = f" · {LAYOUT[key[1]]}" if key[0] in ("batch", "networks") else f" of {key[2]} columns" if key[2] else ""
    clean(ax)
    if key[0] in CATEGORIES:
        places = _categories(ax, records)
    else:
        places = {shape_text(record): axis.value(record) for record in records}
        _logarithmic(ax, sorted(set(places.values())), small=bool(key[2]))
    many = len(scale.styles) > MANY_CONTENDERS
    for number, (name, style) in enumerate(scale.styles.items()):
        mine = sorted((r for r in records if r["contender"] == name), key=lambda r: places[shape_text(r)])
        aside = 0.7 * ((number + 0.5) / len(scale.styles) - 0.5) if many and key[0] in CATEGORIES else 0.0
        _series(ax, name, style, mine, {text: x + aside for text, x in places.items()}, key[0] not in CATEGORIES, many)
    _crosses(ax, records, places, scale)
    if scale.roof:
        label = f"copy, {scale.roof:.0f} GB/s"
        ax.axhline(scale.roof, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), label=label)
    ax.set_ylim(0, scale.top)
    ax.set_ylabel("GB/s", fontsize=9, color=INK)
    ax.set_xlabel(axis.label, fontsize=9, color=INK)
    headed(ax, axis.title + more)


def _categories(ax: Axes, records: Sequence[Record]) -> dict[str, float]:
    value = AXES[records[0]["group"]].value
    distinct = {shape_text(record): record for record in records}
    ordered = sorted(distinct, key=lambda text: (value(distinct[text]), text))
    ax.set_xticks(range(len(ordered)))
    labels = [str(distinct[t]["shape"][-1]) if distinct[t]["group"] == "models" else t for t in ordered]
    crowded = sum(map(len, labels)) > 60
    ax.set_xticklabels(
        labels, rotation=55 if crowded else 0, ha="right" if crowded else "center", rotation_mode="anchor"
    )
    ax.tick_params(axis="x", labelsize=8 if len(labels) <= MANY_POINTS else 6.5)
    ax.set_xlim(-0.6, len(ordered) - 0.4)
    ax.grid(False, axis="x")
    for place in range(1, len(ordered)):
        ax.axvline(place - 0.5, color=GRID, linewidth=0.8, zorder=0)
    return {text: float(place) for place, text in enumerate(ordered)}


def _logarithmic(ax: Axes, values: Sequence[float], small: bool) -> None:
    ax.set_xscale("log", base=2)
    most = 5 if small else 7
    ticks = values if len(values) <= most else values[:: -(-len(values) // most)]
    ax.set_xticks(ticks)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    ax.set_xlim(values[0] / 1.4, values[-1] * 1.4)


def _series(
    ax: Axes, name: str, style: Style, records: Sequence[Record], places: dict[str, float], connect: bool, many: bool
) -> None:
    """One contender's points that were timed."""
    timed = ok(records)
    x = [places[shape_text(record)] for record in timed]
    y = [record["gbps"] for record in timed]
    slow = [record["floor_bytes"] / record["p80_us"] / 1e3 for record in timed]
    fast = [record["floor_bytes"] / record["p20_us"] / 1e3 for record in timed]
    front = 4 if name == "triton_norm" else 3
    if connect:
        width = 2.2 if front == 4 else 1.1 if many else 1.5
        ax.plot(
            x, y, color=style.colour, marker=style.marker, markersize=6 * style.size, markeredgecolor="white",
            markeredgewidth=0.5, linewidth=width, label=name, zorder=front,
        )  # fmt: skip
        ax.fill_between(x, slow, fast, color=style.colour, alpha=0.1 if many else 0.18, linewidth=0)
    else:
        spread = [[a - b for a, b in zip(y, slow, strict=True)], [b - a for a, b in zip(y, fast, strict=True)]]
        ax.errorbar(
            x, y, yerr=spread, color=style.colour, fmt=style.marker, markersize=5.5 * style.size,
            markeredgecolor="white", markeredgewidth=0.5, elinewidth=1.2, label=name, zorder=front,
        )  # fmt: skip


def _crosses(ax: Axes, records: Sequence[Record], places: dict[str, float], scale: _Scale) -> None:
    """A point that a contender failed is a cross at the foot, one above the other, not a gap."""
    heights: dict[float, int] = {}
    label = FAILED
    for record in records:
        if record["status"] not in ("wrong", "error") or record["contender"] not in scale.styles:
            continue
        x = places[shape_text(record)]
        height = (0.025 + 0.05 * heights.get(x, 0)) * scale.top
        heights[x] = heights.get(x, 0) + 1
        colour = scale.styles[record["contender"]].colour
        (mark,) = ax.plot(x, height, "x", color=colour, markersize=6, markeredgewidth=1.6, label=label, clip_on=False)
        label = "_again"
        mark.set_zorder(5)
