"""Draws the bandwidth of single calls: GB/s against size, and shares of the copy bandwidth by op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from perf.charts import forms
from perf.charts.style import DASHED, GRID, INK, Style, in_order, legend, panel, sheet, short, styles_of
from perf.findings import OURS, input_bytes, shape_text, split
from perf.ops import TITLE
from perf.points import MODE_TITLE, STRIDED
from perf.records import FAILURES, Timing, ok

FAILED = "failed (in its contender's colour)"
CATEGORIES = ("networks", "layers", "models", "heads")
"""Groups of workloads that stand side by side, not along a scale."""


@dataclass(frozen=True)
class Axis:
    """Lays a group of workloads along x."""

    title: str
    label: str
    value: Callable[[Timing], float]


def _mebibytes(record: Timing) -> float:
    return input_bytes(record) / 2**20


AXES = {
    "columns": Axis("same number of elements, longer rows", "columns", lambda r: r["shape"][-1]),
    "models": Axis("hidden sizes of models", "columns", lambda r: r["shape"][-1]),
    "heads": Axis("q and k of fused projections, strided", "tokens × heads × columns", _mebibytes),
    "tokens": Axis("more rows", "rows", lambda r: r["shape"][0]),
    "batch": Axis("growing batch of 256 × 28 × 28", "size of x, MiB", _mebibytes),
    "layers": Axis("layers of models", "shape of x", _mebibytes),
    "networks": Axis("layers of networks", "", _mebibytes),
}
LAYOUT = {"contiguous": "channels first", "channels_last": "channels last", STRIDED: "strided"}

# Sizes of marks in typographic points: in GB/s against size, and faint ones in shares of the copy bandwidth.
MARK_POINTS, FAINT_POINTS = 5.5, 3.5

Key = tuple[str, str, int]
"""Group, layout, and where rows grow in number the columns."""


@dataclass(frozen=True)
class _Scale:
    """Styles, roof and height that all panels of a picture share; `forms`: those of launches are marked."""

    styles: dict[str, Style]
    roof: float | None
    top: float
    forms: bool


def _key(record: Timing) -> Key:
    return record["group"], record["layout"], record["shape"][-1] if record["group"] == "tokens" else 0


def throughput(records: Sequence[Timing], roof: float | None) -> Figure:
    """Draws GB/s against size for the contenders of one op, mode and dtype; a panel for every group of workloads."""
    groups, layouts = list(AXES), list(LAYOUT)
    keys = sorted({_key(r) for r in records}, key=lambda key: (groups.index(key[0]), layouts.index(key[1]), key[2]))
    names = in_order(record["contender"] for record in records if record["status"] != "unsupported")
    top = 1.08 * max([r["gbps"] for r in ok(records)] + [roof or 0.0, 1.0])
    scale = _Scale(styles_of(names), roof, top, forms.has_clusters(records))
    across = min(len(keys), 2 if len(keys) <= 6 else 4)
    lines = -(-len(keys) // across)
    figure = sheet(3.3 * lines + 0.3)
    axes = figure.subplots(lines, across, squeeze=False)
    for ax, key in zip(axes.flat, keys, strict=False):
        _panel(ax, key, [record for record in records if _key(record) == key], scale)
    for ax in axes.flat[len(keys) :]:
        ax.set_axis_off()
    legend(figure)
    return figure


def _panel(ax: Axes, key: Key, records: Sequence[Timing], scale: _Scale) -> None:
    axis, connected = AXES[key[0]], key[0] not in CATEGORIES
    more = f" · {LAYOUT[key[1]]}" if key[0] in ("batch", "networks") else f" of {key[2]} columns" if key[2] else ""
    panel(ax, axis.title + more)
    places = _logarithmic(ax, records, axis) if connected else _categories(ax, records, axis)
    for number, (name, style) in enumerate(scale.styles.items()):
        aside = 0.0 if connected else 0.7 * ((number + 0.5) / len(scale.styles) - 0.5)
        mine = sorted((r for r in records if r["contender"] == name), key=lambda r: places[shape_text(r)])
        placed = [(places[shape_text(r)] + aside, r) for r in mine]
        _series(ax, name, style, placed, connected)
        if scale.forms:
            forms.mark(ax, [(x, r["gbps"], r) for x, r in placed if r["status"] == "ok"], MARK_POINTS, numbers=True)
        failed = [places[shape_text(r)] + aside for r in mine if r["status"] in FAILURES]
        if failed:
            feet = [(0.025 + 0.05 * number) * scale.top] * len(failed)
            ax.plot(failed, feet, "x", color=style.colour, label=FAILED, clip_on=False, zorder=5)
    if scale.roof:
        ax.axhline(scale.roof, color=INK, linewidth=1.2, linestyle=DASHED, label=f"copy, {scale.roof:.0f} GB/s")
    ax.set_ylim(0, scale.top)
    ax.set_ylabel("GB/s", fontsize=8.5)
    ax.set_xlabel(axis.label, fontsize=8.5)


def _categories(ax: Axes, records: Sequence[Timing], axis: Axis) -> dict[str, float]:
    distinct = {shape_text(record): record for record in records}
    ordered = sorted(distinct, key=lambda text: (axis.value(distinct[text]), text))
    labels = [str(distinct[t]["shape"][-1]) if distinct[t]["group"] == "models" else t for t in ordered]
    crowded = sum(map(len, labels)) > 60
    ax.set_xticks(range(len(labels)), labels, rotation=90 if crowded else 0, fontsize=6.5 if crowded else 8)
    ax.set_xlim(-0.6, len(ordered) - 0.4)
    ax.grid(False, axis="x")
    for place in range(1, len(ordered)):
        ax.axvline(place - 0.5, color=GRID, linewidth=0.8, zorder=0)
    return {text: float(place) for place, text in enumerate(ordered)}


def _logarithmic(ax: Axes, records: Sequence[Timing], axis: Axis) -> dict[str, float]:
    places = {shape_text(record): axis.value(record) for record in records}
    values = sorted(set(places.values()))
    ax.set_xscale("log", base=2)
    ax.set_xticks(values[:: -(-len(values) // 7)])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    ax.set_xlim(values[0] / 1.4, values[-1] * 1.4)
    return places


def _series(ax: Axes, name: str, style: Style, placed: Sequence[tuple[float, Timing]], connected: bool) -> None:
    """Draws the points of a contender that were timed, with bars from the 20th to the 80th percentile."""
    timed = [(x, r) for x, r in placed if r["status"] == "ok"]
    y = [r["gbps"] for _, r in timed]
    slow = [r["gbps"] - r["floor_bytes"] / r["p80_us"] / 1e3 for _, r in timed]
    fast = [r["floor_bytes"] / r["p20_us"] / 1e3 - r["gbps"] for _, r in timed]
    front = 4 if name == "triton_norm" else 3
    ax.errorbar(
        [x for x, _ in timed], y, yerr=[slow, fast], color=style.colour, marker=style.marker, label=name, zorder=front,
        markersize=MARK_POINTS * style.size, markeredgecolor="white", markeredgewidth=0.5, elinewidth=1.1,
        linewidth=(2.0 if front == 4 else 1.2) if connected else 0,
    )  # fmt: skip


def shares(records: Sequence[Timing], copy_gbps: float) -> Figure:
    """Draws the floor's bytes over time as a share of the copy bandwidth: a line for each op, pass and dtype, a faint
    mark for each point of a contender, and a large one for the median of those that were timed on as many as ours."""
    timed = ok(records)
    lines = list(split(timed))
    styles = styles_of(in_order(r["contender"] for r in timed))
    figure = sheet(max(0.16 * len(styles), 0.3) * len(lines) + 0.9)
    ax = figure.subplots()
    panel(ax, "", "x")
    marked = forms.has_clusters(timed)
    for line, (_, _, _, of_line) in enumerate(lines):
        for number, (name, style) in enumerate(styles.items()):
            y = line + 0.75 * ((number + 0.5) / len(styles) - 0.5)
            mine = [r for r in of_line if r["contender"] == name]
            if mine:
                x = [r["gbps"] / copy_gbps for r in mine]
                whole = len(mine) >= sum(r["contender"] == OURS for r in of_line)
                look = {"color": style.colour}
                ax.plot(x, [y] * len(x), style.marker, alpha=0.35, markersize=FAINT_POINTS * style.size, **look)  # type: ignore[arg-type]
                if marked:
                    forms.mark(ax, [(r["gbps"] / copy_gbps, y, r) for r in mine], FAINT_POINTS, numbers=False)
                if whole:
                    ax.plot(median(x), y, style.marker, markersize=7 * style.size, **look)  # type: ignore[arg-type]
    for name, style in styles.items():
        ax.plot([], [], style.marker, markersize=7 * style.size, color=style.colour, label=name)
    for line in range(len(lines) - 1):
        ax.axhline(line + 0.5, color=GRID, linewidth=0.8, zorder=0)
    ax.axvline(1, color=INK, linewidth=1.2, linestyle=DASHED, label=f"copy, {copy_gbps:,.0f} GB/s")
    ax.set_yticks(range(len(lines)), [f"{TITLE[op]}, {MODE_TITLE[mode]}, {dtype}" for op, mode, dtype, _ in lines])
    ax.set_ylim(max(len(lines), 1) - 0.5, -0.5)
    ax.set_xlim(0, None)
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.set_xlabel("bytes that must move ÷ time, of the copy bandwidth", fontsize=8.5)
    legend(figure)
    return figure
