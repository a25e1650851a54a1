"""What matters, in one screen."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean, median

from perf import page
from perf.charts.canvas import STYLES, in_order, styles_of
from perf.findings import (
    NOT_TIMED,
    OUTPUTS,
    Findings,
    Record,
    access_bits,
    device_of,
    input_bytes,
    is_worse,
    ok,
    speedups,
    step_speedups,
    uncached,
)
from perf.page import Bar, Card
from perf.points import BOTH, MODE_TITLE, MODES, PASSES, TITLE
from perf.sections import shortfalls as falling
from perf.sections.drawing import Drawing
from perf.shortfalls import LARGE, NARROW, counted, shortfalls

MOST_NOTICES = 3
MOST_RIVALS = 3
OURS = "triton_norm"
SHORT_MODE = {"forward": "forward", "backward": "backward", BOTH: "both"}
BARE = "#0072B2"


def summary(drawing: Drawing) -> str:
    findings = drawing.findings
    run = chief(findings)
    timed = run is not None and bool(ok(run["records"]))
    cards = [] if run is None else _timing_cards(run)
    if not timed:
        cards += _traffic_cards(findings.traffic) + _code_cards(findings.resources)
    cards += _exactness_cards(findings.numerics) + _shortfall_cards(findings)
    picture = _speed_bars(run) if run is not None and timed else _traffic_bars(findings.traffic)
    return _notices(findings) + page.cards(cards) + picture


def chief(findings: Findings) -> Record | None:
    """The run that the summary is about: the one made here, else the newest."""
    if findings.timed_here:
        return findings.timed[0]
    return max(findings.timed, key=lambda run: str(run["environment"].get("date", "")), default=None)


def _notices(findings: Findings) -> str:
    notes = []
    if not findings.timed_here:
        why = NOT_TIMED if "GPU" not in findings.environment else "Nothing was timed for this report."
        notes.append(why + (" The timings below were read from files." if findings.timed else ""))
    if findings.interrupted:
        notes.append("The run was interrupted: this is the part that was finished.")
    notes += [f"The timed run stopped early: {run['stopped']}" for run in findings.timed if run.get("stopped")]
    failed = sum(record["status"] != "ok" for record in findings.traffic + findings.resources + findings.numerics)
    if failed:
        notes.append(f"{counted(failed, 'record')} of something that failed: see what falls short.")
    notes += findings.problems
    if len(notes) > MOST_NOTICES:
        hidden = len(notes) - MOST_NOTICES + 1
        notes = [*notes[: MOST_NOTICES - 1], f"{hidden} more notices: see what falls short."]
    return page.paragraph(notes[0], "notice") if len(notes) == 1 else page.bullets(notes, "notice")


def _timing_cards(run: Record) -> list[Card]:
    """Over everything that was timed: the bars below tell the ops apart."""
    records, device = run["records"], device_of(run)
    items = []
    copy = run.get("copy_gbps")
    if copy:
        items.append(
            Card("Copy bandwidth", [(f"{copy:,.0f}", "GB/s")], f"{device}, bytes read plus bytes written", "Speed")
        )
    for other in _rivals(records):
        by_mode = [(speedups([r for r in records if r["mode"] == mode], other), mode) for mode in PASSES]
        figures = [(f"{geometric_mean(ratios):.2f}×", SHORT_MODE[mode]) for ratios, mode in by_mode if ratios]
        if figures:
            points = counted(sum(len(ratios) for ratios, _ in by_mode), "point")
            name = "torch eager" if other == "torch" else other
            items.append(Card(f"Times as fast as {name}", figures, f"geometric means over {points}", "Speed"))
    items += _share_cards(records, copy)
    compared = step_speedups(run.get("steps", []))
    steps = [(f"{ratio:.2f}×", r["model"].partition(",")[0]) for r, over, ratio in compared if over == "torch"]
    note = "as fast with these norms as with torch's, eager"
    return items + ([Card("Training steps of models", steps, note, "Whole models")] if steps else [])


def _share_cards(records: Sequence[Record], copy: float | None) -> list[Card]:
    large = [r for r in ok(records) if r["contender"] == OURS and input_bytes(r) > LARGE]
    if not copy or not large:
        return []
    figures = []
    for mode in PASSES:
        shares = [r["gbps"] / copy for r in large if r["mode"] == mode]
        if shares:
            figures.append((f"{median(shares):.0%}", SHORT_MODE[mode]))
    note = f"the floor's bytes over time; median of {counted(len(large), 'point')} above {LARGE >> 20} MiB"
    return [Card("Of the copy bandwidth", figures, note, "Speed")]


def _rivals(records: Sequence[Record]) -> list[str]:
    """torch, and the few others that share most points with triton_norm, in the pictures' order."""
    shared = {who: len(speedups(records, who)) for who in dict.fromkeys(r["contender"] for r in ok(records))}
    others = [who for who in shared if who not in (OURS, "torch") and shared[who]]
    others = sorted(others, key=lambda who: (who not in STYLES, -shared[who]))[: MOST_RIVALS - 1]
    return ["torch"] * bool(shared.get("torch")) + in_order(others)


def _speed_bars(run: Record) -> str:
    """Of each op and pass, how many times faster than torch eager triton_norm and its rivals are."""
    records = run["records"]
    rivals = [who for who in _rivals(records) if who != "torch"]
    colours = {who: style.colour for who, style in styles_of([OURS, *rivals]).items()}
    rows = []
    for op in TITLE:
        cells = [_means([r for r in records if (r["op"], r["mode"]) == (op, mode)], colours) for mode in PASSES]
        rows.append((TITLE[op], cells))
    used = [place for place in range(len(PASSES)) if any(cells[place] for _, cells in rows)]
    kept = [(name, [cells[place] for place in used]) for name, cells in rows if any(cells)]
    if not kept:
        return ""
    note = (
        f"Geometric means of torch's time over the other's, on the points that both were timed on. {device_of(run)}. "
        "Single points, other contenders and spreads are under Speed."
    )
    columns = [MODE_TITLE[PASSES[place]] for place in used]
    title = "Times as fast as torch eager (dashed line)"
    return page.bars(title, note, columns, kept, list(colours.items()))


def _means(records: Sequence[Record], colours: dict[str, str]) -> list[Bar]:
    bars = []
    for who, colour in colours.items():
        ratios = speedups(records, "torch", who)
        if ratios:
            mean = geometric_mean(ratios)
            bars.append(Bar(mean, mean, colour, f"{mean:.2f}×"))
    return bars


def _traffic_bars(records: Sequence[Record]) -> str:
    rows = []
    for op in TITLE:
        cells = []
        for mode in MODES:
            ratios = [uncached(r) for r in ok(records) if (r["op"], r["mode"]) == (op, mode)]
            bar = Bar(min(ratios), max(ratios), BARE, page.span_text(min(ratios), max(ratios))) if ratios else None
            cells.append([bar] if bar else [])
        if any(cells):
            rows.append((TITLE[op], cells))
    if not rows:
        return ""
    note = (
        "Counted, not timed: bytes that the kernels load and store over the fewest that must move (dashed line), from "
        "the best to the worst shape. Weights count once, and what a program loads again from cache does not count."
    )
    return page.bars("Bytes moved, in times the floor", note, [MODE_TITLE[mode] for mode in MODES], rows)


def _traffic_cards(records: Sequence[Record]) -> list[Card]:
    counts = ok(records)
    figures = []
    for mode in MODES:
        ratios = [uncached(r) for r in counts if r["mode"] == mode]
        if ratios:
            figures.append((f"{geometric_mean(ratios):.2f}×", MODE_TITLE[mode]))
    note = f"geometric means over {counted(len(counts), 'call')}, without what is read again from cache"
    return [Card("Bytes moved ÷ fewest", figures, note, "Traffic")] if figures else []


def _code_cards(records: Sequence[Record]) -> list[Card]:
    compiled = ok(records)
    if not compiled:
        return []
    targets = ", ".join(dict.fromkeys(record["target"] for record in compiled))
    spilling = sum(record["spill_stores"] > 0 for record in compiled)
    narrow = sum(access_bits(record) < NARROW for record in compiled)
    figures = [(str(spilling), "spill registers"), (str(narrow), "move under 8 bytes")]
    return [Card(f"Of {len(compiled)} compiled kernels", figures, f"as launched on {targets}", "Machine code")]


def _exactness_cards(records: Sequence[Record]) -> list[Card]:
    compared = [r[output] for r in ok(records) for output in OUTPUTS]
    if not compared:
        return []
    no_worse = sum(not is_worse(ulps) for ulps in compared)
    figures = [(f"{no_worse} of {len(compared)}", "no further off than torch")]
    return [Card("Errors against fp64", figures, "y and dx on data that norms find hard", "Exactness")]


def _shortfall_cards(findings: Findings) -> list[Card]:
    found = shortfalls(findings)
    lines = sum(map(len, found.values()))
    titles = ", ".join(title.partition(",")[0] for title in list(found)[:3])
    note = titles + (" and more" if len(found) > 3 else "") if found else "nothing that this report can see"
    return [
        Card(falling.TITLE, [(str(lines), "line" if lines == 1 else "lines, the worst first")], note, falling.TITLE)
    ]
