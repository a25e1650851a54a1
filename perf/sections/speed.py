"""What was timed on a GPU: single calls, and training steps of whole models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import geometric_mean
from typing import Any

from perf import charts, page
from perf.environment import machine
from perf.findings import Record, device_of, lying, ok, pairs, speedups, split, step_speedups
from perf.page import Cell, Entry
from perf.points import MODE_TITLE, TITLE, floor_of
from perf.sections.drawing import Drawing
from perf.shortfalls import counted, short_of

FAILED = ("wrong", "error")
SPEED_NOTE = (
    "Speed-ups are torch eager's time over the contender's, on the points that both were timed on. GB/s are the bytes "
    "of the floor over the median time, for every contender by the same formula; the roof is a copy of device memory "
    "in the same run."
)
STEPS_NOTE = (
    "One training step: forward, loss, backward and optimizer. What the norms cost is the step's time less that of the "
    "same step with nothing in the norms' places."
)


def speed(drawing: Drawing) -> str:
    html = [page.paragraph(SPEED_NOTE)] if drawing.findings.timed else []
    for number, run in enumerate(drawing.findings.timed):
        if len(drawing.findings.timed) > 1:
            html.append(page.heading(machine(run["environment"])))
        html += [_overview(drawing, number, run), *_throughput(drawing, number, run)]
        table = _table(run)
        html.append(page.details("Every timed point", table, note=counted(len(run["records"]), "record")))
    return "".join(html)


def _overview(drawing: Drawing, number: int, run: Record) -> str:
    if not ok(run["records"]):
        return page.paragraph(f"No call was timed in this run on {device_of(run)}.")
    records, foot = run["records"], machine(run["environment"])
    copy = run.get("copy_gbps")
    caption = "How many times as fast as torch eager, by op, pass and type."
    html = drawing.figure(f"speedups-{number}", partial(charts.speedups, records, foot), caption)
    if copy:
        caption = "Roofline: arithmetic a second against operations a byte, below what memory and arithmetic allow."
        draw = partial(charts.roofline, records, copy, run.get("peak_gflops"), foot)
        html += drawing.figure(f"roofline-{number}", draw, caption)
    return html


def _throughput(drawing: Drawing, number: int, run: Record) -> list[str]:
    """A figure for each op, pass and type, folded by op."""
    foot = machine(run["environment"])
    figures: dict[str, list[str]] = {}
    for op, mode, dtype, records in split(run["records"]):
        if ok(records):
            caption = f"{TITLE[op]}, {MODE_TITLE[mode]}, {dtype}. {floor_of(op, mode).text}."
            name = f"throughput-{number}-{op}-{mode}-{dtype}"
            draw = partial(charts.throughput, records, run.get("copy_gbps"), foot)
            figures.setdefault(op, []).append(drawing.figure(name, draw, caption))
    html: list[str] = []
    for op, drawn in figures.items():
        title = f"{TITLE[op]}: GB/s by size"
        note = _means([r for r in run["records"] if r["op"] == op])
        html.append(page.details(title, "".join(drawn), opened=not html, note=note))
    return html


def _means(records: Sequence[Record]) -> str:
    """Geometric means over torch, by type and pass."""
    found: dict[str, list[str]] = {}
    for _, mode, dtype, mine in split(records):
        ratios = speedups(mine, "torch")
        if ratios:
            found.setdefault(dtype, []).append(f"{MODE_TITLE[mode]} {geometric_mean(ratios):.2f}×")
    means = "; ".join(f"{dtype} {', '.join(listed)}" for dtype, listed in found.items())
    return f"as fast as torch eager: {means}" if means else ""


def _table(run: Record) -> str:
    head = [
        "op", "pass", "dtype", "shape", "source", "contender", "status", "µs", "GB/s", "of copy", "× torch", "20 %",
        "80 %", "host µs", "error", "message",
    ]  # fmt: skip
    over_torch: dict[int, float] = {}
    for who in dict.fromkeys(r["contender"] for r in run["records"]):
        over_torch |= {id(record): ratio for record, ratio in pairs(run["records"], "torch", who)}
    rows = [_timed_row(r, run.get("copy_gbps"), over_torch.get(id(r))) for r in run["records"]]
    return page.table(head, rows, words=7, notes=1)


def _timed_row(r: Record, copy_gbps: float | None, over_torch: float | None) -> list[Entry]:
    row: list[Entry] = [TITLE[r["op"]], MODE_TITLE[r["mode"]], r["dtype"], lying(r), r["source"], r["contender"]]
    row.append(Cell(r["status"], r["status"] in FAILED))
    if r["status"] == "ok":
        share = f"{r['gbps'] / copy_gbps:.0%}" if copy_gbps else ""
        row += [f"{r['median_us']:,.1f}", f"{r['gbps']:,.0f}", Cell(share, short_of(r, copy_gbps) is not None)]
        slow = over_torch is not None and over_torch < 1 and r["contender"] == "triton_norm"
        row.append(Cell("" if over_torch is None else f"{over_torch:.2f}", slow))
        row += [f"{r[name]:,.1f}" for name in ("p20_us", "p80_us", "host_us")]
    else:
        row += [""] * 7
    error = max(r["errors"].values()) if r.get("errors") else None
    return [*row, "" if error is None else f"{error:.1e}", r["message"]]


def steps(drawing: Drawing) -> str:
    html = []
    for number, run in enumerate(drawing.findings.timed):
        records: list[Record] = run.get("steps", [])
        if not records:
            continue
        foot = machine(run["environment"])
        if ok(records):
            draw = partial(charts.steps, records, foot)
            html.append(drawing.figure(f"steps-{number}", draw, "Training steps of whole models."))
        html.append(_steps_table(records))
    return page.paragraph(STEPS_NOTE) + "".join(html) if html else ""


def _steps_table(records: Sequence[Record]) -> str:
    head = [
        "model", "training", "dtype", "contender", "status", "step µs", "speed-up", "without norms", "norms' share",
        "norms", "20 %", "80 %", "host µs", "message",
    ]  # fmt: skip
    ratios = {id(record): (ratio, over) for record, over, ratio in step_speedups(records)}
    rows: list[list[Entry]] = []
    for r in records:
        row: list[Entry] = [r["model"], r.get("source", ""), r["dtype"], r["contender"]]
        row += [Cell(r["status"], r["status"] in FAILED), _microseconds(r, "median_us")]
        ratio, over = ratios.get(id(r), (None, ""))
        row.append("" if ratio is None else Cell(f"{ratio:.3f}× {over}", ratio < 1))
        row.append(_microseconds(r, "without_norms_us"))
        timed = r["status"] == "ok" and r.get("without_norms_us") is not None
        row += [f"{1 - r['without_norms_us'] / r['median_us']:.0%}" if timed else "", str(r.get("norms", ""))]
        row += [_microseconds(r, name) for name in ("p20_us", "p80_us", "host_us")]
        rows.append([*row, r.get("message", "")])
    return page.table(head, rows, words=5, notes=1)


def _microseconds(record: Record, name: str) -> str:
    value = record.get(name)
    return f"{value:,.0f}" if record["status"] == "ok" and value is not None else ""


def kernels_table(run: Record) -> str:
    """What each contender ran, by profiler name; shapes that ran the same are one row."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for r in run["records"]:
        if r.get("kernels"):
            key = (r["op"], r["mode"], r["dtype"], r["contender"], tuple(r["kernels"]))
            groups.setdefault(key, []).append(r)
    rows: list[list[Entry]] = []
    for (op, mode, dtype, contender, kernels), members in groups.items():
        more = f" and {counted(len(members) - 1, 'other')}" if len(members) > 1 else ""
        shape = f"{lying(members[0])}{more}"
        rows.append([TITLE[op], MODE_TITLE[mode], dtype, shape, contender, str(len(kernels)), _in_turn(kernels)])
    head = ["op", "pass", "dtype", "shape", "contender", "kernels", "names, in order"]
    return page.table(head, rows, words=5, notes=1) if rows else ""


def _in_turn(names: Sequence[str]) -> str:
    """Each name once for as often as it comes in a row."""
    runs: list[tuple[str, int]] = []
    for name in names:
        if runs and runs[-1][0] == name:
            runs[-1] = (name, runs[-1][1] + 1)
        else:
            runs.append((name, 1))
    return "; ".join(name if times == 1 else f"{times} × {name}" for name, times in runs)
