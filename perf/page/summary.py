"""The page's first screen, and the list of what falls short."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean, median

from perf.charts.style import STYLES, in_order
from perf.findings import (
    LARGE_BYTES,
    NOT_TIMED,
    OURS,
    OUTPUTS,
    Findings,
    counted,
    device_of,
    input_bytes,
    is_worse,
    speedups,
    step_speedups,
    ulps_of,
)
from perf.page.blocks import Block, Bullets, Card, Cards, Fold, Heading, Paragraph
from perf.page.speed import speed_bars
from perf.points import BOTH, PASSES
from perf.records import Numerics, Run, Timing, ok
from perf.shortfalls import shortfalls as found_short

SHORTFALLS = "What falls short"
SHORT_MODE = {"forward": "forward", "backward": "backward", BOTH: "both"}
MOST_NOTICES, MOST_RIVALS, MOST_CAUSES = 3, 3, 8


def summary(findings: Findings) -> list[Block]:
    run = chief(findings)
    cards = [] if run is None else _timing_cards(run)
    cards += _exactness_cards(findings.numerics) + _shortfall_cards(findings)
    return [*_notices(findings), Cards(cards), *([] if run is None else speed_bars(run))]


def chief(findings: Findings) -> Run | None:
    """Returns the run that the summary is about: the one made here, else the newest."""
    if findings.timed_here:
        return findings.timed[0]
    return max(findings.timed, key=lambda run: run["environment"].get("date", ""), default=None)


def _notices(findings: Findings) -> list[Block]:
    notes = []
    if not findings.timed_here:
        why = NOT_TIMED if "GPU" not in findings.environment else "Nothing was timed for this report."
        notes.append(why + (" The timings below were read from files." if findings.timed else ""))
    if findings.interrupted:
        notes.append("The run was interrupted: this is the part that was finished.")
    notes += [f"The timed run stopped early: {run['stopped']}" for run in findings.timed if run.get("stopped")]
    failed = sum(record["status"] != "ok" for record in findings.static)
    if failed:
        notes.append(f"{counted(failed, 'record')} of something that failed: see what falls short.")
    notes += findings.problems
    if len(notes) > MOST_NOTICES:
        hidden = len(notes) - MOST_NOTICES + 1
        notes = [*notes[: MOST_NOTICES - 1], f"{hidden} more notices: see what falls short."]
    if len(notes) == 1:
        return [Paragraph(notes[0], "notice")]
    return [Bullets([(note, ()) for note in notes], "notice")] if notes else []


def _timing_cards(run: Run) -> list[Card]:
    records, copy = run["records"], run.get("copy_gbps")
    cards = []
    if copy:
        note = f"{device_of(run)}, bytes read plus bytes written"
        cards.append(Card("Copy bandwidth", [(f"{copy:,.0f}", "GB/s")], note, "Speed"))
    for other in _rivals(records):
        by_mode = [(mode, speedups([r for r in records if r["mode"] == mode], other)) for mode in PASSES]
        figures = [(f"{geometric_mean(ratios):.2f}×", SHORT_MODE[mode]) for mode, ratios in by_mode if ratios]
        points = counted(sum(len(ratios) for _, ratios in by_mode), "common point")
        name = "torch eager" if other == "torch" else other
        cards.append(Card(f"Times as fast as {name}", figures, f"geometric means over {points}", "Speed"))
    cards += _share_cards(records, copy)
    steps = [
        (f"{ratio:.2f}×", r["model"].partition(",")[0])
        for r, over, ratio in step_speedups(run["steps"])
        if over == "torch"
    ]
    note = "as fast with these norms as with torch's, eager"
    return cards + ([Card("Training steps of models", steps, note, "Whole models")] if steps else [])


def _share_cards(records: Sequence[Timing], copy: float | None) -> list[Card]:
    large = [r for r in ok(records) if r["contender"] == OURS and input_bytes(r) > LARGE_BYTES]
    if not copy or not large:
        return []
    by_mode = [(mode, [r["gbps"] / copy for r in large if r["mode"] == mode]) for mode in PASSES]
    figures = [(f"{median(shares):.0%}", SHORT_MODE[mode]) for mode, shares in by_mode if shares]
    note = f"the floor's bytes over time; median of {counted(len(large), 'point')} above {LARGE_BYTES >> 20} MiB"
    return [Card("Of the copy bandwidth", figures, note, "Speed")]


def _rivals(records: Sequence[Timing]) -> list[str]:
    """Returns torch, and the few others that share most points with triton_norm."""
    shared = {who: len(speedups(records, who)) for who in dict.fromkeys(r["contender"] for r in ok(records))}
    others = [who for who in shared if who not in (OURS, "torch") and shared[who]]
    others = sorted(others, key=lambda who: (who not in STYLES, -shared[who]))[: MOST_RIVALS - 1]
    return ["torch"] * bool(shared.get("torch")) + in_order(others)


def _exactness_cards(records: Sequence[Numerics]) -> list[Card]:
    compared = [ulps_of(r, output) for r in ok(records) for output in OUTPUTS]
    if not compared:
        return []
    no_worse = sum(not is_worse(ulps) for ulps in compared)
    figures = [(f"{no_worse} of {len(compared)}", "no further off than torch")]
    return [Card("Errors against fp64", figures, "y and dx on data that norms find hard", "Exactness")]


def _shortfall_cards(findings: Findings) -> list[Card]:
    causes_by_title = found_short(findings)
    count = sum(map(len, causes_by_title.values()))
    titles = ", ".join(title.partition(",")[0] for title in list(causes_by_title)[:3])
    note = (
        titles + (" and more" if len(causes_by_title) > 3 else "")
        if causes_by_title
        else "nothing that this report can see"
    )
    return [Card(SHORTFALLS, [(str(count), "cause, the worst first" if count == 1 else "causes, the worst first")],
                 note, SHORTFALLS)]  # fmt: skip


def shortfalls(findings: Findings) -> list[Block]:
    causes_by_title = found_short(findings)
    if not causes_by_title:
        return [Paragraph("Nothing that this report can see.")]
    blocks: list[Block] = [
        Paragraph("Held against the bars under Method, the worst first; a line opens to all inputs.", "soft")
    ]
    for title, causes in causes_by_title.items():
        items = [(cause.line, [case.line for case in cause.cases] if len(cause.cases) > 1 else []) for cause in causes]
        blocks += [Heading(f"{title}: {len(causes)}"), Bullets(items[:MOST_CAUSES])]
        if len(items) > MOST_CAUSES:
            rest = items[MOST_CAUSES:]
            blocks.append(Fold(counted(len(rest), "more cause"), [Bullets(rest)]))
    return blocks
