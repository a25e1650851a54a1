"""Draws how many times as fast as each rival triton_norm is, on the points that both were timed on."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from perf.charts.style import DASHED, INK, in_order, legend, panel, sheet, styles_of
from perf.findings import OURS, speedups
from perf.ops import TITLE
from perf.points import MODE_TITLE, PASSES
from perf.records import Timing, ok

TICKS = (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 4, 5, 7, 10, 20, 50)


def by_rival(records: Sequence[Timing]) -> tuple[list[str], dict[tuple[str, str, str], list[float]]]:
    """Returns the rivals in their order, and the speed-ups by op, pass and rival where there are any."""
    rivals = [who for who in in_order(r["contender"] for r in ok(records)) if not who.startswith(OURS)]
    of_pass = {
        (op, mode): [r for r in records if (r["op"], r["mode"]) == (op, mode)] for op in TITLE for mode in PASSES
    }
    ratios = {(*key, rival): speedups(mine, rival) for key, mine in of_pass.items() for rival in rivals}
    return rivals, {key: each for key, each in ratios.items() if each}


def over_rivals(records: Sequence[Timing]) -> Figure:
    """Draws geometric means: a panel for each pass, a group of bars for each op, a bar for each rival."""
    rivals, ratios_of = by_rival(records)
    styles = styles_of(rivals)
    ops, modes = ([each for each in known if any(each in key for key in ratios_of)] for known in (TITLE, PASSES))
    figure = sheet(0.9 + max(len(ops), 1) * (0.2 * len(rivals) + 0.15))
    axes = figure.subplots(1, max(len(modes), 1), squeeze=False, sharey=True, sharex=True)
    for ax, mode in zip(axes.flat, modes, strict=False):
        panel(ax, MODE_TITLE[mode], "x")
        for number, rival in enumerate(rivals):
            for line, op in enumerate(ops):
                if (op, mode, rival) in ratios_of:
                    ratios = ratios_of[op, mode, rival]
                    y, mean = line + 0.8 * ((number + 0.5) / len(rivals) - 0.5), geometric_mean(ratios)
                    colour = styles[rival].colour
                    ax.barh(y, mean - 1, left=1, height=0.7 / len(rivals), color=colour, label=f"over {rival}")
                    text = f"  {mean:.2f}× ({len(ratios)})"
                    ax.text(max(mean, 1), y, text, va="center", fontsize=8, color=INK)
        ax.axvline(1, color=INK, linewidth=1.1, linestyle=DASHED)
        ax.set_yticks(range(len(ops)), [TITLE[op] for op in ops])
        ax.set_ylim(max(len(ops), 1) - 0.5, -0.5)
        means = [geometric_mean(ratios) for ratios in ratios_of.values()]
        ax.set_xscale("log")
        ax.set_xlim(min([0.8, *means]) * 0.95, max([1.5, *means]) * 1.45)
        ax.set_xticks([tick for tick in TICKS if ax.get_xlim()[0] <= tick <= ax.get_xlim()[1]])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    legend(figure)
    return figure
