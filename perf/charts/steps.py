"""A whole model's training step, and how much of it the norms take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from perf.charts.canvas import (
    FAINT,
    INK,
    VERMILION,
    WIDTH,
    Canvas,
    clean,
    fitting,
    headed,
    in_order,
    microseconds,
    styles_of,
    text_width,
    tinted,
)
from perf.findings import Record, ok

BAR, BETWEEN = 0.27, 0.78  # inches, of a bar and beside the bars of a panel
BARS = 6.6  # inches, about what the longest bar has
TEXT = 8.5
WITHOUT, NORMS, WHOLE = "everything but the norms", "the norms", "not told apart"


def steps(steps: Sequence[Record], machine: str, path: Path) -> Path:
    """Step times as bars: a panel a model and dtype, a bar a contender, what is left without the norms told apart."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in steps:
        groups.setdefault((record["model"], record["dtype"], record.get("source", "")), []).append(record)
    title = "Time of one step of a whole model, µs, and the share of it that the norms take"
    foot = ["whiskers from the 20th to the 80th percentile", "share: what the step lacks once the norms are left out"]
    heights = [BAR * len({r["contender"] for r in group}) + BETWEEN for group in groups.values()]
    canvas = Canvas(max(sum(heights), 0.8), title, [*foot, machine], [WITHOUT, NORMS, WHOLE, "20 % to 80 %"])
    if groups:
        panels = canvas.figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
        for ax, ((model, dtype, source), group) in zip(panels, groups.items(), strict=True):
            norms = next((r["norms"] for r in group if r.get("norms")), None)
            about = [f"{model}, {dtype}", source, f"{norms} norms" if norms else ""]
            _panel(ax, group)
            headed(ax, fitting("   ·   ".join(part for part in about if part), 10, WIDTH - 2.6))
        panels[-1].set_xlabel("µs", fontsize=9, color=INK)
        canvas.legend(
            {
                WITHOUT: Patch(facecolor=tinted(FAINT, 0.35), edgecolor=FAINT),
                NORMS: Patch(facecolor=FAINT, edgecolor=FAINT),
                WHOLE: Patch(facecolor="white", edgecolor=FAINT, hatch="////"),
                "20 % to 80 %": Line2D([], [], color=INK, linewidth=1.2, marker="|", markersize=7),
            }
        )
    else:
        canvas.figure.text(0.5, 0.5, "No step was timed.", ha="center")
    return canvas.save(path)


def _panel(ax: Axes, records: Sequence[Record]) -> None:
    clean(ax, "x")
    names = in_order(record["contender"] for record in records)
    colours = {name: style.colour for name, style in styles_of(names).items()}
    longest = max([max(r["p80_us"], r["median_us"]) for r in ok(records)] + [0.0])
    by_name = {record["contender"]: record for record in records}
    for y, name in enumerate(names):
        record = by_name[name]
        if record["status"] == "ok":
            _bar(ax, y, record, colours[name], longest)
        else:
            message = f": {record['message']}" if record.get("message") else ""
            colour = VERMILION if record["status"] in ("error", "wrong") else FAINT
            text = fitting(f"× {record['status']}{message}", TEXT, BARS)
            ax.annotate(
                text, (0, y), (4, 0), textcoords="offset points", va="center", fontsize=TEXT, color=colour,
                parse_math=False,
            )  # fmt: skip
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(0, 1.3 * longest or 1)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    if not longest:
        ax.set_xticks([])


def _bar(ax: Axes, y: float, record: Record, colour: str, longest: float) -> None:
    """The share is written before the norms' part, or behind the bar where there is no room."""
    total, without = record["median_us"], record["without_norms_us"]
    behind = microseconds(total)
    if without is None:
        ax.barh(y, total, height=0.72, facecolor="white", edgecolor=colour, hatch="////", linewidth=0.8)
    else:
        drawn, share = min(without, total), f"norms {1 - without / total:.0%}".replace("-", "−")
        ax.barh(y, drawn, height=0.72, facecolor=tinted(colour, 0.35), edgecolor=colour, linewidth=0.8)
        ax.barh(y, total - drawn, left=drawn, height=0.72, facecolor=colour, edgecolor=colour, linewidth=0.8)
        if (min(drawn, record["p20_us"]) / longest) * BARS > text_width(share, TEXT) + 0.2:
            at = min(drawn, record["p20_us"])
            ax.annotate(
                share, (at, y), (-5, 0), textcoords="offset points", ha="right", va="center", fontsize=TEXT, color=INK
            )
        else:
            behind += f"   {share}"
    ax.plot([record["p20_us"], record["p80_us"]], [y, y], color=INK, linewidth=1.2, marker="|", markersize=7)
    at = max(total, record["p80_us"])
    ax.annotate(behind, (at, y), (7, 0), textcoords="offset points", va="center", fontsize=TEXT, color=INK)
