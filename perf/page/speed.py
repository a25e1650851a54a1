"""The page's sections of timings: single calls, and training steps of whole models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import geometric_mean
from typing import Any

from perf import charts
from perf.charts.style import in_order, styles_of
from perf.environment import machine
from perf.findings import (
    OURS,
    STATUS_TEXT,
    Findings,
    columns_of,
    counted,
    device_of,
    forms_text,
    layout_text,
    pairs,
    speedups,
    split,
    step_speedups,
)
from perf.ops import TITLE
from perf.page.blocks import Bar, Bars, Block, Cell, Fold, Heading, Paragraph, Table, picture, table_of
from perf.points import MODE_TITLE, PASSES, floor_of
from perf.records import FAILURES, Outcome, Run, Step, Timing, ok
from perf.shortfalls import is_short

PALE = "#B9CFE0"
SPEED_NOTE = (
    "GB/s are the bytes of the floor over the median time, for every contender by the same formula; the roof is a copy "
    "of device memory in the same run. A speed-up compares two contenders on the points that both were timed on."
)
SHARES_NOTE = (
    "Bytes that must move over time, as a share of the copy bandwidth, by op, pass and type: a faint mark for each "
    "point, and a large one for the median of those contenders that were timed on all points that triton_norm was."
)
STEPS_NOTE = (
    "One training step: forward, loss, backward and optimizer. The norms' share is the step's time less that of the "
    "same step with nothing in the norms' places."
)


def speed(findings: Findings) -> list[Block]:
    blocks: list[Block] = [Paragraph(SPEED_NOTE)] if findings.timed else []
    for run in findings.timed:
        if len(findings.timed) > 1:
            blocks.append(Heading(machine(run["environment"])))
        copy = run.get("copy_gbps")
        if not ok(run["records"]):
            blocks.append(Paragraph(f"No call was timed in this run on {device_of(run)}."))
        elif copy:
            draw = partial(charts.shares, run["records"], copy)
            blocks += picture(findings, "the shares of the copy bandwidth", draw, SHARES_NOTE)
        blocks += _throughput(findings, run)
        means = _means_table(run)
        blocks.append(Fold("Every contender's speed-up over torch eager", [means], counted(len(means.rows), "mean")))
        blocks.append(Fold("Every timed point", [_timed_table(run)], counted(len(run["records"]), "record")))
    return blocks


def _throughput(findings: Findings, run: Run) -> list[Block]:
    """Returns a picture for each op, pass and type, folded by op."""
    pictures: dict[str, list[Block]] = {}
    for op, mode, dtype, records in split(run["records"]):
        if ok(records):
            name = f"{TITLE[op]}, {MODE_TITLE[mode]}, {dtype}"
            caption = f"{name}. {floor_of(op, mode).text}. Bars from the 20th to the 80th percentile, cold L2."
            has_op = {r["contender"] for r in records if r["status"] != "unsupported"}
            without = {r["contender"] for r in records} - has_op
            caption += f" Without such an op: {', '.join(sorted(without))}." if without else ""
            draw = partial(charts.throughput, records, run.get("copy_gbps"))
            pictures.setdefault(op, []).extend(picture(findings, name, draw, caption))
    return [
        Fold(f"{TITLE[op]}: GB/s by size", drawn, opened=place == 0)
        for place, (op, drawn) in enumerate(pictures.items())
    ]


def _means_table(run: Run) -> Table:
    rows: list[dict[str, Any]] = []
    for op, mode, dtype, records in split(run["records"]):
        for who in in_order(r["contender"] for r in records):
            ratios = speedups(records, "torch", who)
            if ratios and who != "torch":
                identity = {"op": TITLE[op], "pass": MODE_TITLE[mode], "dtype": dtype, "contender": who}
                means = {"geometric mean": geometric_mean(ratios), "least": min(ratios), "most": max(ratios)}
                rows.append(identity | means | {"points": len(ratios)})
    return table_of(rows, words=4)


def _timed_table(run: Run) -> Table:
    copy, tells_forms = run.get("copy_gbps"), any("launches" in r for r in run["records"])
    over_torch: dict[int, float] = {}
    for who in dict.fromkeys(r["contender"] for r in run["records"]):
        over_torch |= {id(record): ratio for record, ratio in pairs(run["records"], "torch", who)}

    def row(r: Timing) -> dict[str, Any]:
        share = f"{r['gbps'] / copy:.0%}" if copy and "gbps" in r else ""
        ratio = over_torch.get(id(r))
        slow = ratio is not None and ratio < 1 and r["contender"] == OURS
        return {
            **columns_of(r),
            "source": r["source"],
            "contender": r["contender"],
            "status": _status(r),
            **({"form": forms_text(r)} if tells_forms else {}),
            "µs": r.get("median_us"),
            "GB/s": r.get("gbps"),
            "of copy": Cell(share, is_short(r, copy)),
            "× torch": Cell("" if ratio is None else f"{ratio:.2f}", slow),
            **_spread(r),
            "error": f"{max(r['errors'].values()):.1e}" if r.get("errors") else "",
            "message": r["message"],
        }

    return table_of([row(r) for r in run["records"]], words=8 if tells_forms else 7, notes=1)


def _spread(record: Timing | Step) -> dict[str, Any]:
    return {"20 %": record.get("p20_us"), "80 %": record.get("p80_us"), "host µs": record.get("host_us")}


def _status(record: Outcome) -> Cell:
    return Cell(STATUS_TEXT.get(record["status"], record["status"]), record["status"] in FAILURES)


MOST_OPS = 8
"""The first screen has bars of at most this many ops."""


def speed_bars(run: Run) -> list[Block]:
    """Returns how many times as fast as each rival ours is, on the points that both were timed on."""
    rivals, compared_by = charts.by_rival(run["records"])
    if not compared_by:
        return []
    colours = {who: style.colour for who, style in styles_of(rivals).items()}
    modes = [mode for mode in PASSES if any(mode in key for key in compared_by)]

    def bars(op: str, mode: str) -> list[Bar]:
        compared = {who: compared_by[op, mode, who] for who in rivals if (op, mode, who) in compared_by}
        return [Bar([(charts.mean_of(c), colours[who])], charts.mean_text(c)) for who, c in compared.items()]

    timed = [op for op in TITLE if any(op in key for key in compared_by)]
    rows = [(TITLE[op], [bars(op, mode) for mode in modes]) for op in timed[:MOST_OPS]]
    note = (
        "Geometric means of a rival's time over ours, each bar on the points that both were timed on; their number in "
        f"brackets. {device_of(run)}. Single points{' and other ops' * (len(timed) > MOST_OPS)} are under Speed."
    )
    legend = [(f"over {'torch eager' if who == 'torch' else who}", colour) for who, colour in colours.items()]
    title = "triton_norm: times as fast as each rival (dashed line: as fast)"
    return [Bars(title, note, [MODE_TITLE[mode] for mode in modes], rows, legend)]


def steps(findings: Findings) -> list[Block]:
    blocks: list[Block] = [Paragraph(STEPS_NOTE)]
    for run in findings.timed:
        if run["steps"]:
            blocks += [*_step_bars(run["steps"]), _steps_table(run["steps"])]
    return blocks if len(blocks) > 1 else []


def _step_bars(records: Sequence[Step]) -> list[Block]:
    """Returns a row for each model and contender: the step without its norms, and in a darker colour the norms."""
    timed = ok(records)
    rows = []
    for r in sorted(timed, key=lambda r: (r["model"], r["dtype"])):
        total, without = r["median_us"], r.get("without_norms_us")
        colour = styles_of([r["contender"]])[r["contender"]].colour
        norms = total - without if without is not None and without < total else 0.0
        text = f"{total:,.0f} µs" + (f", norms {norms / total:.0%}" if without is not None else "")
        parts = [(total - norms, PALE if without is not None else colour), (norms, colour)]
        rows.append((f"{r['model']}, {r['dtype']}: {r['contender']}", [[Bar(parts, text)]]))
    note = "Pale: the step with nothing in the norms' places; in the contender's colour: the norms."
    return [Bars("Time of a training step", note, ["µs"], rows, mark=None)] if rows else []


def _steps_table(records: Sequence[Step]) -> Table:
    ratios = {id(record): (ratio, over) for record, over, ratio in step_speedups(records)}

    def row(r: Step) -> dict[str, Any]:
        ratio, over = ratios.get(id(r), (None, ""))
        without = r.get("without_norms_us")
        return {
            "model": r["model"],
            "training": r["source"],
            "dtype": r["dtype"],
            "contender": r["contender"],
            "status": _status(r),
            "step µs": r.get("median_us"),
            "speed-up": Cell(f"{ratio:.3f}× {over}", ratio < 1) if ratio else "",
            "without norms": without,
            "norms' share": f"{1 - without / r['median_us']:.0%}" if without is not None else "",
            "norms": r.get("norms"),
            **_spread(r),
            "message": r["message"],
        }

    return table_of([row(r) for r in records], words=5, notes=1)


def kernels_table(run: Run) -> Table | None:
    """Returns the kernels that each contender ran, by profiler name; shapes that ran the same are one row."""
    groups: dict[tuple[str, ...], list[Timing]] = {}
    for r in run["records"]:
        if r.get("kernels"):
            key = (TITLE[r["op"]], MODE_TITLE[r["mode"]], r["dtype"], r["contender"], *r["kernels"])
            groups.setdefault(key, []).append(r)
    rows = []
    for (op, mode, dtype, contender, *kernels), members in groups.items():
        more = f" and {counted(len(members) - 1, 'other')}" if len(members) > 1 else ""
        names = "; ".join(f"{kernels.count(name)} × {name}" if kernels.count(name) > 1 else name
                          for name in dict.fromkeys(kernels))  # fmt: skip
        texts = (op, mode, dtype, layout_text(members[0]) + more, contender, str(len(kernels)), names)
        rows.append([Cell(text) for text in texts])
    head = ("op", "pass", "dtype", "shape", "contender", "kernels", "names, in order of their first launch")
    return Table(head, rows, words=5, notes=1) if rows else None
