"""Draws how many times as fast as each rival triton_norm is, on the points that both were timed on."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from perf.charts.forms import has_clusters
from perf.charts.style import DASHED, INK, in_order, legend, panel, sheet, styles_of
from perf.findings import OURS, blocks_of, counted, pairs, passes
from perf.ops import TITLE
from perf.points import MODE_TITLE, PASSES
from perf.records import Timing, ok

TICKS = (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 4, 5, 7, 10, 20, 50)


Compared = list[tuple[Timing, float]]
"""Records of ours, and how many times as fast each is as a rival."""


def by_rival(records: Sequence[Timing]) -> tuple[list[str], dict[tuple[str, str, str], Compared]]:
    """Returns the rivals in their order, and the speed-ups by op, pass and rival where there are any."""
    rivals = [who for who in in_order(r["contender"] for r in ok(records)) if not who.startswith(OURS)]
    compared = {(op, mode, rival): pairs(mine, rival) for op, mode, mine in passes(records) for rival in rivals}
    return rivals, {key: each for key, each in compared.items() if each}


def mean_of(compared: Compared) -> float:
    return geometric_mean([ratio for _, ratio in compared])


def mean_text(compared: Compared) -> str:
    """Returns the mean, and in brackets the number of points and, if any, of those of ours that were clusters."""
    n_clusters = sum(blocks_of(record) > 1 for record, _ in compared)
    clusters = f", {counted(n_clusters, 'cluster')}" if n_clusters else ""
    return f"{mean_of(compared):.2f}× ({len(compared)}{clusters})"


def over_rivals(records: Sequence[Timing]) -> Figure:
    """Draws geometric means: a panel for each pass, a group of bars for each op, a bar for each rival."""
    rivals, compared_by = by_rival(records)
    styles = styles_of(rivals)
    ops, modes = ([each for each in known if any(each in key for key in compared_by)] for known in (TITLE, PASSES))
    figure = sheet(0.9 + max(len(ops), 1) * (0.2 * len(rivals) + 0.15))
    axes = figure.subplots(1, max(len(modes), 1), squeeze=False, sharey=True, sharex=True)
    for ax, mode in zip(axes.flat, modes, strict=False):
        panel(ax, MODE_TITLE[mode], "x")
        for number, rival in enumerate(rivals):
            for line, op in enumerate(ops):
                if (op, mode, rival) in compared_by:
                    compared = compared_by[op, mode, rival]
                    y, mean = line + 0.8 * ((number + 0.5) / len(rivals) - 0.5), mean_of(compared)
                    colour = styles[rival].colour
                    ax.barh(y, mean - 1, left=1, height=0.7 / len(rivals), color=colour, label=f"over {rival}")
                    ax.text(max(mean, 1), y, f"  {mean_text(compared)}", va="center", fontsize=8, color=INK)
        ax.axvline(1, color=INK, linewidth=1.1, linestyle=DASHED)
        ax.set_yticks(range(len(ops)), [TITLE[op] for op in ops])
        ax.set_ylim(max(len(ops), 1) - 0.5, -0.5)
        means = [mean_of(compared) for compared in compared_by.values()]
        ax.set_xscale("log")
        ax.set_xlim(min([0.8, *means]) * 0.95, max([1.5, *means]) * (1.9 if has_clusters(records) else 1.45))
        ax.set_xticks([tick for tick in TICKS if ax.get_xlim()[0] <= tick <= ax.get_xlim()[1]])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    legend(figure)
    return figure
