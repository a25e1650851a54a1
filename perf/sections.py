"""The page's parts, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from perf import charts, page
from perf.environment import machine
from perf.findings import (
    NOT_TIMED,
    OUTPUTS,
    Findings,
    Record,
    access_bits,
    is_worse,
    lying,
    ok,
    shape_text,
    shortfalls,
    speedups,
    split,
    ulps_text,
)
from perf.page import Cell, Entry
from perf.points import BULK, FLOORS, MODE_TITLE, MODES, TITLE, floor_of


def html(findings: Findings, out: Path) -> str:
    """The page; its pictures are drawn into `out`."""
    named = [
        ("Speed", _timing_section(findings, out)),
        ("Traffic", _traffic_section(findings, out)),
        ("Machine code", _resources_section(findings)),
        ("Exactness", _exactness_section(findings)),
        ("What falls short", page.bullets(shortfalls(findings))),
        ("What is normalized", _anatomy_section(findings, out)),
        ("Method", _method_section()),
        ("Environment", _environment_section(findings)),
    ]
    return page.page("triton_norm: performance", machine(findings.environment), _summary(findings), named)


def _summary(findings: Findings) -> str:
    notes = []
    if not findings.timed_here:
        notes.append(NOT_TIMED + (" The timings below were read from files." if findings.timed else ""))
    if findings.interrupted:
        notes.append("The run was interrupted: this is the part that was finished.")
    notes += findings.problems
    failed = sum(record["status"] != "ok" for record in findings.traffic + findings.resources + findings.numerics)
    if failed:
        notes.append(f"{failed} records are of something that failed: see what falls short.")
    notes += [f"The timed run stopped early: {run['stopped']}" for run in findings.timed if run.get("stopped")]
    html = "".join(page.paragraph(note, "notice") for note in notes)
    items = [card for run in findings.timed for card in _timing_cards(run)]
    items += (
        _traffic_cards(findings.traffic) + _resource_cards(findings.resources) + _exactness_cards(findings.numerics)
    )
    return html + page.cards(items)


def _timing_cards(run: Record) -> list[tuple[str, str]]:
    device = run["environment"].get("GPU", "unknown GPU")
    items = [(f"{run['copy_gbps']:.0f} GB/s", f"copy bandwidth, {device}")] if run.get("copy_gbps") else []
    for op in TITLE:
        for mode in MODES:
            records = [r for r in run["records"] if (r["op"], r["mode"]) == (op, mode)]
            faster = speedups(records, "torch")
            if faster:
                text = f"{TITLE[op]} {mode} against torch eager: geometric mean of {len(faster)} points, {device}"
                items.append((f"{geometric_mean(faster):.2f}×", text))
    return items


def _traffic_cards(records: Sequence[Record]) -> list[tuple[str, str]]:
    items = []
    for (op, mode), floor in FLOORS.items():
        mine = [record for record in ok(records) if (record["op"], record["mode"]) == (op, mode)]
        if mine:
            large = sorted((r["bulk_bytes"] - r["again"]["bulk"]) / r["bulk_floor_bytes"] for r in mine)
            everything = max((r["total_bytes"] - r["again_bytes"]) / r["floor_bytes"] for r in mine)
            again = max(r["again_bytes"] / r["floor_bytes"] for r in mine)
            span = f"{large[0]:.2f}×" if large[-1] - large[0] < 0.005 else f"{large[0]:.2f} to {large[-1]:.2f}×"
            names = ", ".join(name for name in (*floor.reads, *floor.writes) if name in BULK)
            text = f"{TITLE[op]} {mode}: bytes of {names} over {floor.short}; with all else at most {everything:.2f}×"
            text += f"; up to {again:.2f}× again from cache" if again else ""
            items.append((span, text))
    return items


def _resource_cards(records: Sequence[Record]) -> list[tuple[str, str]]:
    compiled = ok(records)
    if not compiled:
        return []
    targets = list(dict.fromkeys(record["target"] for record in compiled))
    spilling = sum(record["spill_stores"] > 0 for record in compiled)
    return [
        (str(len(compiled)), f"kernels compiled for {', '.join(targets)}, exactly as they would be launched"),
        (str(spilling), "of them spill registers to memory"),
    ]


def _timing_section(findings: Findings, out: Path) -> str:
    html = []
    for number, run in enumerate(findings.timed):
        foot = machine(run["environment"])
        for op, mode, dtype, records in split(run["records"]):
            if not ok(records):
                continue
            picture = out / f"throughput-{number}-{op}-{mode}-{dtype}.png"
            charts.throughput(records, run.get("copy_gbps"), foot, picture)
            html.append(
                page.figure(picture, f"{TITLE[op]}, {MODE_TITLE[mode]}, {dtype}. {floor_of(op, mode).text}. {foot}")
            )
        html.append(page.details(f"Every timed point, {foot}", _timing_table(run)))
        contenders = [f"{name}: {status}" for name, status in run.get("contenders", {}).items()]
        html.append(page.paragraph("Contenders: " + ", ".join(contenders), "soft") if contenders else "")
    return "".join(html)


def _timing_table(run: Record) -> str:
    head = [
        "op", "mode", "dtype", "shape", "layout", "source", "contender", "status", "µs", "20 %", "80 %",
        "host µs", "GB/s", "of copy", "error"
    ]  # fmt: skip
    rows: list[list[Entry]] = []
    for r in run["records"]:
        row: list[Entry] = [
            r["op"],
            r["mode"],
            r["dtype"],
            shape_text(r),
            r["layout"],
            r["source"],
            r["contender"],
        ]
        row.append(
            Cell(
                r["status"] if not r["message"] else f"{r['status']}: {r['message']}", r["status"] in ("wrong", "error")
            )
        )
        if r["status"] == "ok":
            share = f"{r['gbps'] / run['copy_gbps']:.0%}" if run.get("copy_gbps") else ""
            row += [f"{r[name]:.1f}" for name in ("median_us", "p20_us", "p80_us", "host_us")]
            row += [f"{r['gbps']:.0f}", share, f"{max(r['errors'].values()):.1e}"]
        else:
            row += [""] * 7
        rows.append(row)
    return page.table(head, rows, text_columns=8)


def _mebi(count: int) -> str:
    return f"{count / 2**20:.3f}"


def _traffic_section(findings: Findings, out: Path) -> str:
    if not ok(findings.traffic):
        return ""
    picture = charts.traffic(findings.traffic, machine(findings.environment), out / "traffic.png")
    caption = (
        "Bytes that the kernels load and store in one call, over the floor. What one program loads again in the same "
        "launch is told apart: programs wait for each other only where that is still in cache. The diamond counts each "
        "address once a direction: what reaches memory if whatever is read again is still in cache."
    )
    head = [
        "op", "mode", "dtype", "shape", "layout", "launches", "floor MiB", "x, residual, dy", "y, total, dx", "bits",
        "weights", "statistics", "partials", "again", "all", "÷ floor", "without again", "each once ÷ floor"
    ]  # fmt: skip
    rows: list[list[Entry]] = []
    for r in findings.traffic:
        row: list[Entry] = [r["op"], r["mode"], r["dtype"], shape_text(r), r["layout"]]
        if r["status"] != "ok":
            rows.append([*row, Cell(f"{r['status']}: {r['message']}", warn=True)])
            continue
        parts = [charts.part_bytes(r, direction, groups) for direction, groups, _ in charts.PARTS.values()]
        row += [str(len(r["launches"])), _mebi(r["floor_bytes"]), *map(_mebi, parts), _mebi(r["total_bytes"])]
        ratios = [size / r["floor_bytes"] for size in (r["total_bytes"], r["total_bytes"] - r["again_bytes"])]
        row += [f"{ratios[0]:.3f}", Cell(f"{ratios[1]:.3f}", ratios[1] > 1.25)]
        rows.append([*row, f"{r['footprint_bytes'] / r['floor_bytes']:.3f}"])
    return page.figure(picture, caption) + page.details("Every count, in MiB", page.table(head, rows, text_columns=5))


def _widths(counts: dict[Any, int]) -> str:
    ordered = sorted(((int(bits), count) for bits, count in counts.items()), reverse=True)
    return " ".join(f"{count}×{bits // 8}" for bits, count in ordered) or "none"


def _resources_section(findings: Findings) -> str:
    compiled = ok(findings.resources)
    if not compiled:
        return ""
    text = (
        "Kernels compiled with the launch that this library chooses where nothing was measured yet, and disassembled. "
        "Loads and stores of global memory: how many instructions × bytes an access."
    )
    html = [page.paragraph(text)]
    for target in dict.fromkeys(record["target"] for record in compiled):
        rows = [_resource_row(r) for r in compiled if r["target"] == target]
        head = [
            "kernel", "in", "x", "loads", "stores", "warps", "registers", "spilled", "shared B", "instructions",
            "resident", "limit",
        ]  # fmt: skip
        html.append(page.details(f"{target}: {len(rows)} kernels", page.table(head, rows, 3), target == "sm_90"))
    return "".join(html)


def _resource_row(r: Record) -> list[Entry]:
    resident = f"{r['resident_warps']}/{r['possible_warps']}"
    spilled = f"{r['spill_stores']}+{r['spill_loads']}" if r["spill_stores"] or r["spill_loads"] else "0"
    return [
        r["kernel"].removesuffix("_kernel"), f"{TITLE[r['op']]}, {r['mode']}", f"{lying(r)} {r['dtype']}",
        Cell(_widths(r["loads"]), access_bits(r) < 64), _widths(r["stores"]), str(r["warps"]), str(r["registers"]),
        Cell(spilled, r["spill_stores"] > 0), str(r["shared_bytes"]), str(r["instructions"]),
        Cell(resident, r["resident_warps"] < 0.25 * r["possible_warps"]), r["limited_by"],
    ]  # fmt: skip


def _exactness_cards(records: Sequence[Record]) -> list[tuple[str, str]]:
    compared = [r[output] for r in ok(records) for output in OUTPUTS]
    if not compared:
        return []
    no_worse = sum(not is_worse(ulps) for ulps in compared)
    return [(f"{no_worse} of {len(compared)}", "results on hard data that are no further from fp64 than torch's")]


def _exactness_section(findings: Findings) -> str:
    compared = ok(findings.numerics)
    if not compared:
        return ""
    text = (
        "The largest error against fp64, in ulp of the output's type at the largest element of its exact row: 0.5 is a "
        "result rounded once. Marked where triton_norm is further off than torch on the same device."
    )
    html = [page.paragraph(text)]
    head = ["dtype", "x", "columns", *(f"{output}: {who}" for output in OUTPUTS for who in ("triton_norm", "torch"))]
    for op in dict.fromkeys(r["op"] for r in compared):
        rows: list[list[Entry]] = []
        for r in compared:
            if r["op"] == op:
                errors = [
                    Cell(ulps_text(ulps), who == "triton_norm" and is_worse(r[output]))
                    for output in OUTPUTS
                    for who, ulps in r[output].items()
                ]
                rows.append([r["dtype"], r["data"], str(r["columns"]), *errors])
        html.append(page.details(f"{TITLE[op]}: {len(rows)} inputs", page.table(head, rows, text_columns=2)))
    return "".join(html)


def _anatomy_section(findings: Findings, out: Path) -> str:
    try:
        from perf import anatomy

        picture = anatomy.draw(out / "anatomy.png")
    except Exception as error:
        findings.problems.append(f"the picture of the norms could not be drawn: {type(error).__name__}: {error}")
        return ""
    return page.figure(
        picture, "In each panel the coloured elements share one mean and one variance; every other group has its own."
    )


METHOD = (
    "GB/s is the floor's bytes over the median time, by the one formula below for every contender: one that moves more "
    "bytes is slower, not busier. The roof is a device-to-device copy of 1 GiB in the same run, bytes read plus bytes "
    "written.",
    "Each call is timed by CUDA events on the device alone: it starts with an L2 that holds none of its tensors, "
    "queued behind enough other work that the host is never waited for. The host's time for a call is recorded apart. "
    "Contenders take turns, call by call; compiling and searching happen before. A backward pass is timed after a "
    "fresh forward pass that is not.",
    "No contender is timed on a point before all that it computes agrees with torch's own function in fp64. One that "
    "does not, or that fails, is recorded with its message.",
    "Traffic is counted address by address while Triton's interpreter runs the kernels on a part of the input, with "
    "the launches that a GPU of 132 multiprocessors has for all of it; masked lanes count nothing. Counts of one turn "
    "of rows and of two, of one block of channels and of two, and of two and three programs that share a block, give "
    "what each more adds, and so the bytes of all of them. Time under the interpreter means nothing and is not "
    "recorded.",
    "Machine code is what Triton compiles for a GPU that is not there, from the very arguments of a launch; occupancy "
    "follows from registers, shared memory and threads.",
)


def _method_section() -> str:
    rows: list[list[Entry]] = [
        [TITLE[op], mode, floor.short, floor.text.partition(": ")[2]] for (op, mode), floor in FLOORS.items()
    ]
    head = ["op", "mode", "floor", "bytes that must move"]
    return "".join(map(page.paragraph, METHOD)) + page.table(head, rows, text_columns=4)


def _environment_section(findings: Findings) -> str:
    def shown(title: str, environment: dict[str, str]) -> str:
        rows: list[list[Entry]] = [[name, value] for name, value in environment.items()]
        return f"<h3>{title}</h3>" + page.table(("what", "value"), rows, text_columns=2)

    html = [shown("This report", findings.environment)]
    html += [
        shown("Timed run", run["environment"]) for run in findings.timed if run["environment"] != findings.environment
    ]
    return "".join(html)
