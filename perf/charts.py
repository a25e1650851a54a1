"""The pictures: light, legible in print, told apart by colour-blind readers (Okabe and Ito's colours)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from perf.findings import Record, lying, shape_text
from perf.points import ITEMSIZE, MODE_TITLE, TITLE, floor_of

INK, FAINT, GREY, GRID = "#222222", "#6B6B6B", "#CDCDCD", "#E3E3E3"
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442",
)  # fmt: skip
STYLE = {"triton_norm": (BLUE, "o"), "torch": (VERMILION, "s"), "torch.compile": (GREEN, "^")}
SPARE_STYLES = [(ORANGE, "D"), (PURPLE, "v"), (SKY, "P"), (INK, "X")]
DPI = 150
MANY_POINTS = 18
HEAD, LEGEND_LINE, FOOT = 0.72, 0.2, 0.34  # inches


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
    "tokens": Axis("more rows of 1024 columns", "rows", lambda r: r["shape"][0]),
    "batch": Axis("growing batch of 256 × 28 × 28", "size of x, MiB", _mebibytes),
    "networks": Axis("layers of networks", "", _mebibytes),
}
LAYOUT = {"contiguous": "channels first", "channels_last": "channels last"}


def _canvas(width: float, height: float, title: str, foot: str, head: float = HEAD) -> Figure:
    """A figure with a band for its title and legend above the panels, and one for a line about the machine below."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", rect=(0, FOOT / height, 0.995, 1 - (head + FOOT) / height))
    margin = 0.12 / width
    figure.text(margin, 1 - 0.1 / height, title, fontsize=13, color=INK, fontweight="bold", va="top")
    figure.text(margin, 0.1 / height, foot, fontsize=8, color=FAINT, va="bottom")
    return figure


def _legend(figure: Figure, lines: int = 1) -> None:
    handles: dict[str, Artist] = {}
    for ax in figure.axes:
        handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    place = (0.0, 1 - 0.36 / figure.get_figheight())
    figure.legend(
        list(handles.values()), list(handles), loc="upper left", bbox_to_anchor=place, ncols=-(-len(handles) // lines),
        frameon=False, fontsize=9.5, columnspacing=1.4, handlelength=1.6,
    )  # fmt: skip


def _clean(ax: Axes, grid_axis: str = "both") -> None:
    ax.grid(True, axis=grid_axis, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    ax.set_axisbelow(True)
    ax.tick_params(colors=INK, labelsize=9, length=3)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(FAINT)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


def short(value: float) -> str:
    """1024 as 1K, 262144 as 256K, 1000 as 1000."""
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}K" if value < 1 << 20 else f"{value / (1 << 20):g}M"
    return f"{value:.3g}" if value < 100 else f"{value:g}"


def _styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    spare = iter(SPARE_STYLES * len(names))
    return {name: STYLE.get(name) or next(spare) for name in names}


def _panel_keys(records: Sequence[Record]) -> list[tuple[str, str]]:
    keys = {(record["group"], record["layout"]) for record in records}
    return [(group, layout) for group in AXES for layout in LAYOUT if (group, layout) in keys]


def throughput(records: Sequence[Record], roof: float | None, machine: str, path: Path) -> Path:
    """GB/s against size for the contenders of one op, mode and dtype; a panel for every group of workloads."""
    op, mode, dtype = (records[0][name] for name in ("op", "mode", "dtype"))
    panels = {key: [r for r in records if (r["group"], r["layout"]) == key] for key in _panel_keys(records)}
    places, lines = _places([len({shape_text(r) for r in chosen}) for chosen in panels.values()])
    title = f"{TITLE[op]}, {MODE_TITLE[mode]}, {dtype}: bytes at the floor ({floor_of(op, mode).short}) ÷ time"
    named = dict.fromkeys(record["contender"] for record in records)
    names = list(dict.fromkeys(record["contender"] for record in records if record["status"] != "unsupported"))
    foot = f"{machine}   ·   median, band from the 20th to the 80th percentile, cold L2"
    foot += "".join(f"   ·   {name} has no such op" for name in named if name not in names)
    figure = _canvas(12.4, 3.4 * lines + HEAD + FOOT, title, foot)
    grid = figure.add_gridspec(lines, 2)
    top = 1.08 * max([record["gbps"] for record in records if record["status"] == "ok"] + [roof or 0.0, 1.0])
    for (line, columns), (key, chosen) in zip(places, panels.items(), strict=True):
        _throughput_panel(figure.add_subplot(grid[line, columns]), key, chosen, names, roof, top)
    _legend(figure)
    return _save(figure, path)


def _places(sizes: Sequence[int]) -> tuple[list[tuple[int, slice]], int]:
    """Line and columns of each panel, two to a line, or one that is alone or has many points; and how many lines."""
    places: list[tuple[int, slice]] = []
    line, column = 0, 0
    for size in sizes:
        width = 2 if size > MANY_POINTS or len(sizes) == 1 else 1
        if column + width > 2:
            line, column = line + 1, 0
        places.append((line, slice(column, column + width)))
        column += width
    return places, line + 1


def _throughput_panel(
    ax: Axes, key: tuple[str, str], records: Sequence[Record], names: Sequence[str], roof: float | None, top: float
) -> None:
    axis = AXES[key[0]]
    family_layout = f" · {LAYOUT[key[1]]}" if key[0] in ("batch", "networks") else ""
    _clean(ax)
    if key[0] in ("networks", "models"):
        places = _categories(ax, records)
    else:
        places = {shape_text(record): axis.value(record) for record in records}
        _logarithmic(ax, sorted(set(places.values())))
    for name, (colour, marker) in _styles(names).items():
        mine = sorted((r for r in records if r["contender"] == name), key=lambda r: places[shape_text(r)])
        _series(ax, name, colour, marker, mine, places, top, connect=key[0] not in ("networks", "models"))
    if roof:
        ax.axhline(roof, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), label=f"copy, {roof:.0f} GB/s")
    ax.set_ylim(0, top)
    ax.set_ylabel("GB/s", fontsize=9, color=INK)
    ax.set_xlabel(axis.label, fontsize=9, color=INK)
    ax.set_title(axis.title + family_layout, fontsize=10, color=INK, loc="left")


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
    return {text: float(place) for place, text in enumerate(ordered)}


def _logarithmic(ax: Axes, values: Sequence[float]) -> None:
    ax.set_xscale("log", base=2)
    ticks = values if len(values) <= 7 else values[:: -(-len(values) // 7)]
    ax.set_xticks(ticks)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    ax.set_xlim(values[0] / 1.4, values[-1] * 1.4)


def _series(
    ax: Axes, name: str, colour: str, marker: str, records: Sequence[Record], places: dict[str, float], top: float,
    connect: bool,
) -> None:  # fmt: skip
    """One contender. A point that it failed is a cross on the x axis, not a gap."""
    ok = [record for record in records if record["status"] == "ok"]
    failed = [places[shape_text(r)] for r in records if r["status"] in ("wrong", "error")]
    x = [places[shape_text(record)] for record in ok]
    y = [record["gbps"] for record in ok]
    slow = [record["floor_bytes"] / record["p80_us"] / 1e3 for record in ok]
    fast = [record["floor_bytes"] / record["p20_us"] / 1e3 for record in ok]
    ours = name == "triton_norm"
    if connect:
        ax.plot(
            x, y, color=colour, marker=marker, markersize=5, linewidth=2.2 if ours else 1.5, label=name, zorder=4 - ours
        )
        ax.fill_between(x, slow, fast, color=colour, alpha=0.18, linewidth=0)
    else:
        spread = [[a - b for a, b in zip(y, slow, strict=True)], [b - a for a, b in zip(y, fast, strict=True)]]
        ax.errorbar(x, y, yerr=spread, color=colour, fmt=marker, markersize=5.5, elinewidth=1.2, label=name, zorder=3)
    if failed:
        ax.plot(
            failed, [0.02 * top] * len(failed), "x", color=colour, markersize=7, label=f"{name}: failed", clip_on=False
        )


PARTS = {
    "x, residual, dy loaded": ("loaded", ("bulk",), BLUE),
    "y, total, dx stored": ("stored", ("bulk",), SKY),
    "bits": ("both", ("bits",), VERMILION),
    "weights and their gradients": ("both", ("parameters",), YELLOW),
    "statistics": ("both", ("statistics",), ORANGE),
    "partial sums": ("both", ("partials",), PURPLE),
    "loaded again by one program, from cache": ("again", ("bulk", "bits"), GREY),
}


def traffic(records: Sequence[Record], machine: str, path: Path) -> Path:
    """Bytes that the kernels ask for over the floor, made up of what they are for; the footprint as a mark."""
    counted = [record for record in records if record["status"] == "ok"]
    ops = [op for op in TITLE if any(record["op"] == op for record in counted)]
    heights = [max(_rows_of(counted, op, mode) for mode in ("forward", "backward")) for op in ops]
    foot = f"counted under Triton's interpreter, as on 132 multiprocessors, nothing timed   ·   {machine}"
    title = "Bytes that the kernels ask for, over the fewest that must move"
    head = HEAD + LEGEND_LINE
    figure = _canvas(12.4, 0.25 * sum(heights) + 0.62 * len(ops) + head + FOOT, title, foot, head)
    panels = figure.subplots(len(ops), 2, squeeze=False, height_ratios=[h + 0.6 for h in heights])
    for column, mode in enumerate(("forward", "backward")):
        widest = max([r["total_bytes"] / r["floor_bytes"] for r in counted if r["mode"] == mode] + [1.0])
        for ax, op in zip(panels[:, column], ops, strict=True):
            _traffic_panel(ax, op, mode, [r for r in counted if (r["op"], r["mode"]) == (op, mode)])
            ax.set_xlim(0, 1.1 * widest)
        panels[-1, column].set_xlabel("bytes ÷ floor", fontsize=9, color=INK)
    _legend(figure, lines=2)
    return _save(figure, path)


def _rows_of(records: Sequence[Record], op: str, mode: str) -> int:
    return sum((record["op"], record["mode"]) == (op, mode) for record in records)


def part_bytes(record: Record, direction: str, groups: Sequence[str]) -> int:
    again: int = sum(record["again"].get(group, 0) for group in groups)
    if direction == "again":
        return again
    directions = ("loaded", "stored") if direction == "both" else (direction,)
    moved: int = sum(record["bytes"][group][way] for group in groups for way in directions)
    return moved - again if "loaded" in directions else moved


def _traffic_panel(ax: Axes, op: str, mode: str, records: Sequence[Record]) -> None:
    _clean(ax, "x")
    records = list(reversed(records))
    places = range(len(records))
    left = [0.0] * len(records)
    for label, (direction, groups, colour) in PARTS.items():
        widths = [part_bytes(record, direction, groups) / record["floor_bytes"] for record in records]
        ax.barh(places, widths, left=left, height=0.68, color=colour, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    footprint = [record["footprint_bytes"] / record["floor_bytes"] for record in records]
    ax.plot(footprint, places, "D", color="white", markeredgecolor=INK, markersize=4.5, label="each address once")
    two = [(r["apart_floor_bytes"] / r["floor_bytes"], place) for r, place in zip(records, places, strict=True)]
    two = [(ratio, place) for ratio, place in two if ratio > 1 and len(records[place]["launches"]) > 1]
    if two:
        ax.plot(*zip(*two, strict=True), "|", color=INK, markersize=11, label="floor of two launches")
    ax.axvline(1.0, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), label="floor")
    for place, total in zip(places, left, strict=True):
        ax.annotate(
            f"{total:.2f}", (total, place), (5, 0), textcoords="offset points", va="center", fontsize=8, color=INK
        )
    ax.set_yticks(places, [f"{lying(record)} {record['dtype']}" for record in records], fontsize=8)
    ax.set_ylim(-0.6, len(records) - 0.4)
    ax.set_title(f"{TITLE[op]}, {mode} (floor {floor_of(op, mode).short})", fontsize=10, color=INK, loc="left")
