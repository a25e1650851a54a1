"""What is known without a clock: errors, bytes and machine code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from perf import charts, page
from perf.environment import machine
from perf.findings import (
    OUTPUTS,
    Record,
    access_bits,
    is_worse,
    lying,
    ok,
    ulps_text,
)
from perf.page import Cell, Entry
from perf.points import MODE_TITLE, TITLE
from perf.sections.drawing import Drawing
from perf.shortfalls import FEW_WARPS, MOVES_TOO_MUCH, NARROW, counted

EXACTNESS_NOTE = (
    "The largest error against fp64, in ulp of the output's type at the largest element of its exact row: 0.5 is a "
    "result rounded once. Marked where triton_norm is further off than torch on the same device."
)
TRAFFIC_NOTE = (
    "Bytes that the kernels load and store in one call, over the floor. What one program loads again in the same "
    "launch is told apart: programs wait for each other only where that is still in cache. The diamond counts each "
    "address once a direction: what reaches memory if whatever is read again is still in cache."
)
CODE_NOTE = (
    "Kernels compiled with the launch that this library chooses where nothing was measured yet, and disassembled. "
    "Loads and stores of global memory: how many instructions × bytes an access. Resident: warps that a "
    "multiprocessor holds at once, of those that it could."
)


def _failures(records: Sequence[Record], name: Callable[[Record], str]) -> str:
    failed = [f"{name(r)}: {r['status']}, {r['message']}" for r in records if r["status"] != "ok"]
    return page.details(f"{counted(len(failed), 'record')} without a result", page.bullets(failed)) if failed else ""


def _about(r: Record) -> list[Entry]:
    return [TITLE[r["op"]], MODE_TITLE[r["mode"]], r["dtype"], lying(r)]


def exactness(drawing: Drawing) -> str:
    findings = drawing.findings
    compared = ok(findings.numerics)
    if not compared:
        return ""
    foot = machine(findings.environment)
    draw = partial(charts.errors, findings.numerics, foot)
    html = [page.paragraph(EXACTNESS_NOTE), drawing.figure("errors", draw, "Largest errors against fp64.")]
    head = ["op", "dtype", "x", "columns"]
    head += [f"{output}: {who}, ulp" for output in OUTPUTS for who in ("triton_norm", "torch")]
    rows: list[list[Entry]] = []
    for r in compared:
        row: list[Entry] = [TITLE[r["op"]], r["dtype"], r["data"], str(r["columns"])]
        for output in OUTPUTS:
            worse = is_worse(r[output])
            row += [_ulps(r[output]["triton_norm"], worse), _ulps(r[output]["torch"])]
        rows.append(row)
    html.append(page.details("Every input", page.table(head, rows, words=3), note=counted(len(rows), "input")))
    html.append(_failures(findings.numerics, lambda r: f"{TITLE[r['op']]} {r['dtype']} on {r['data']}"))
    return "".join(html)


def _ulps(ulps: float | None, warn: bool = False) -> Cell:
    return Cell(ulps_text(ulps).removesuffix(" ulp"), warn)


def _mebi(count: int) -> str:
    return f"{count / 2**20:.3f}"


def traffic(drawing: Drawing) -> str:
    records = drawing.findings.traffic
    if not ok(records):
        return ""
    foot = machine(drawing.findings.environment)
    html = drawing.figure("traffic", partial(charts.traffic, records, foot), TRAFFIC_NOTE)
    head = [
        "op", "pass", "dtype", "shape", "launches", "floor", "x, residual, dy", "y, total, dx", "bits",
        "weights", "statistics", "partials", "again", "all", "÷ floor", "without again", "each once ÷ floor", "message",
    ]  # fmt: skip
    rows: list[list[Entry]] = []
    for r in records:
        row = _about(r)
        if r["status"] != "ok":
            message = Cell(f"{r['status']}: {r['message']}", warn=True)
            rows.append([*row, *[""] * (len(head) - len(row) - 1), message])
            continue
        parts = [charts.part_bytes(r, direction, groups) for direction, groups, _ in charts.PARTS.values()]
        row += [str(len(r["launches"])), _mebi(r["floor_bytes"]), *map(_mebi, parts), _mebi(r["total_bytes"])]
        ratios = [size / r["floor_bytes"] for size in (r["total_bytes"], r["total_bytes"] - r["again_bytes"])]
        row += [f"{ratios[0]:.3f}", Cell(f"{ratios[1]:.3f}", ratios[1] > MOVES_TOO_MUCH)]
        rows.append([*row, f"{r['footprint_bytes'] / r['floor_bytes']:.3f}"])
    table = page.table(head, rows, words=4, notes=1)
    return html + page.details("Every count, in MiB", table, note=counted(len(rows), "call"))


def _widths(counts: dict[Any, int]) -> str:
    ordered = sorted(((int(bits), count) for bits, count in counts.items()), reverse=True)
    return " ".join(f"{count}×{bits // 8}" for bits, count in ordered) or "none"


def machine_code(drawing: Drawing) -> str:
    records = drawing.findings.resources
    compiled = ok(records)
    if not compiled:
        return ""
    foot = machine(drawing.findings.environment)
    caption = "Registers, spills, bytes an access and resident warps, by kernel and GPU."
    draw = partial(charts.resources, records, foot)
    html = [page.paragraph(CODE_NOTE), drawing.figure("resources", draw, caption)]
    head = [
        "GPU", "kernel", "op", "pass", "dtype", "x", "loads", "stores", "warps", "registers", "spilled", "shared bytes",
        "instructions", "resident", "limited by",
    ]  # fmt: skip
    rows = [_code_row(r) for r in compiled]
    table = page.table(head, rows, words=6, notes=1)
    html.append(page.details("Every compiled kernel", table, note=counted(len(rows), "kernel")))
    html.append(_failures(records, lambda r: f"{TITLE[r['op']]} {r['mode']} {r['dtype']} {lying(r)} for {r['target']}"))
    return "".join(html)


def _code_row(r: Record) -> list[Entry]:
    resident = f"{r['resident_warps']}/{r['possible_warps']}"
    spilled = f"{r['spill_stores']}+{r['spill_loads']}" if r["spill_stores"] or r["spill_loads"] else "0"
    return [
        r["target"], r["kernel"].removesuffix("_kernel"), TITLE[r["op"]], MODE_TITLE[r["mode"]], r["dtype"], lying(r),
        Cell(_widths(r["loads"]), access_bits(r) < NARROW), _widths(r["stores"]), str(r["warps"]), str(r["registers"]),
        Cell(spilled, r["spill_stores"] > 0), f"{r['shared_bytes']:,}", f"{r['instructions']:,}",
        Cell(resident, r["resident_warps"] < FEW_WARPS * r["possible_warps"]), r["limited_by"],
    ]  # fmt: skip
