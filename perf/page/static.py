"""The page's sections that need no clock: errors, bytes and machine code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from perf import charts
from perf.charts.style import BLUE, GREY, ORANGE, PURPLE, SKY, VERMILION, YELLOW
from perf.findings import (
    OURS,
    OUTPUTS,
    Findings,
    access_bits,
    blocks_of,
    columns_of,
    counted,
    form_text,
    is_worse,
    layout_text,
    ulps_of,
    ulps_text,
    uncached,
)
from perf.ops import FAMILY, TITLE
from perf.page.blocks import Bar, Bars, Block, Bullets, Cell, Fold, Paragraph, Table, picture, table_of
from perf.points import MODE_TITLE, MODES
from perf.records import Numerics, Outcome, Resources, Traffic, ok
from perf.shortfalls import FEW_WARPS, MOST_BYTES_OVER_FLOOR, NARROW_BITS

EXACTNESS_NOTE = (
    "The largest error against fp64, in ulp of the output's type at the largest element of its exact row: 0.5 is a "
    "result rounded once. Marked where triton_norm is further off than torch on the same device."
)
ERRORS_CAPTION = (
    "The largest errors over all numbers of columns, with a thin line down to the smallest. Left edge: less than 0.01 "
    "ulp. Right edge: not finite."
)
TRAFFIC_NOTE = (
    "Bytes that the kernels load and store in one call, over the floor (dashed line), counted on slices of large "
    "inputs and of a GPU. A program loads bytes again in the same launch only where they are still in cache."
)
CODE_NOTE = (
    "Kernels compiled with the launch that this library chooses where nothing was measured yet, and disassembled: "
    "registers a thread · bytes of the widest access to global memory, and of the narrowest to x, y and their like "
    "where that is less · warps that a multiprocessor holds at once, of those that it could (darker ground: more) · "
    "blocks of a cluster, if programs are clusters · stores and loads of spilled registers. Marked where one of them "
    "falls short."
)
PARTS = {
    "x, residual, dy loaded": ("loaded", ("bulk",), BLUE),
    "y, total, dx stored": ("stored", ("bulk",), SKY),
    "bits": ("both", ("bits",), VERMILION),
    "weights, modulations and their gradients": ("both", ("parameters",), YELLOW),
    "statistics": ("both", ("statistics",), ORANGE),
    "partial sums": ("both", ("partials",), PURPLE),
    "loaded again by one program, from cache": ("again", ("bulk", "bits"), GREY),
}


def _failures(records: Sequence[Any], name: Callable[[Any], str]) -> list[Block]:
    failed: list[Outcome] = [r for r in records if r["status"] != "ok"]
    lines = [(f"{name(r)}: {r['status']}, {r['message']}", ()) for r in failed]
    return [Fold(f"{counted(len(lines), 'record')} without a result", [Bullets(lines)])] if lines else []


def exactness(findings: Findings) -> list[Block]:
    compared = ok(findings.numerics)
    if not compared:
        return []

    def row(r: Numerics) -> dict[str, Any]:
        identity = {"op": TITLE[r["op"]], "dtype": r["dtype"], "x": r["data"], "columns": str(r["columns"])}
        for output in OUTPUTS:
            for who, ulps in ulps_of(r, output).items():
                worse = who == OURS and is_worse(ulps_of(r, output))
                identity[f"{output}: {who}, ulp"] = Cell(ulps_text(ulps).removesuffix(" ulp"), worse)  # type: ignore[assignment]
        return identity

    blocks: list[Block] = [Paragraph(EXACTNESS_NOTE)]
    blocks += picture(findings, "the errors", partial(charts.errors, findings.numerics), ERRORS_CAPTION)
    table = table_of([row(r) for r in compared], words=3)
    blocks.append(Fold("Every input", [table], counted(len(compared), "input")))
    return blocks + _failures(findings.numerics, lambda r: f"{TITLE[r['op']]} {r['dtype']} on {r['data']}")


def part_bytes(record: Traffic, part: str) -> int:
    """Returns the bytes of one of the `PARTS`, which together are all of a record's."""
    direction, groups, _ = PARTS[part]
    again = sum(record["again"].get(group, 0) for group in groups)
    if direction == "again":
        return again
    ways = ("loaded", "stored") if direction == "both" else (direction,)
    moved = sum(record["bytes"][group][way] for group in groups for way in ways)
    return moved - again if "loaded" in ways else moved


def traffic_bars(records: Sequence[Traffic], title: str, note: str) -> list[Block]:
    """Returns a row for each op and input, and a bar for each pass, made up of the parts."""
    by_input: dict[str, dict[str, Traffic]] = {}
    for r in ok(records):
        shape = f"{r['shape'][-1]}" if FAMILY[r["op"]] == "rows" else layout_text(r)
        text = f"{TITLE[r['op']]} {shape} {r['dtype']}"
        by_input.setdefault(text, {})[r["mode"]] = r
    rows = []
    for text, by_mode in by_input.items():
        cells: list[list[Bar]] = []
        for mode in MODES:
            if mode in by_mode:
                r = by_mode[mode]
                parts = [(part_bytes(r, part) / r["floor_bytes"], colour) for part, (_, _, colour) in PARTS.items()]
                cluster = f", clusters of {blocks_of(r)}" if blocks_of(r) > 1 else ""
                label = f"{r['total_bytes'] / r['floor_bytes']:.2f}, {len(r['launches'])} L{cluster}"
                cells.append([Bar(parts, label)])
            else:
                cells.append([])
        rows.append((text, cells))
    legend = [(part, colour) for part, (_, _, colour) in PARTS.items()]
    return [Bars(title, note, [MODE_TITLE[mode] for mode in MODES], rows, legend)] if rows else []


def traffic(findings: Findings) -> list[Block]:
    counts = ok(findings.traffic)
    if not counts:
        return []

    def mebi(size: int) -> str:
        return f"{size / 2**20:.3f}"

    def row(r: Traffic) -> dict[str, Any]:
        parts = {part: mebi(part_bytes(r, part)) for part in PARTS}
        floor = r["floor_bytes"]
        return {
            **columns_of(r),
            "SMs": r.get("multiprocessors"),
            "launches": len(r["launches"]),
            "floor": mebi(floor),
            **parts,
            "all": mebi(r["total_bytes"]),
            "÷ floor": r["total_bytes"] / floor,
            "without again": (r["total_bytes"] - r["again_bytes"]) / floor,
            "weights once": Cell(f"{uncached(r):.3f}", uncached(r) > MOST_BYTES_OVER_FLOOR),
            "each once ÷ floor": r["footprint_bytes"] / floor,
        }

    title = "Bytes that the kernels ask for, over the fewest that must move; number of launches (L)"
    return [
        *traffic_bars(counts, title, TRAFFIC_NOTE),
        Fold("Every count, in MiB", [table_of([row(r) for r in counts], words=4)], counted(len(counts), "call")),
        *_failures(findings.traffic, "{0[op]} {0[mode]} {0[dtype]} {0[shape]}".format),
    ]


def _spills(r: Resources) -> str:
    return f"{r['spill_stores']}+{r['spill_loads']}" if r["spill_stores"] or r["spill_loads"] else "0"


def _warn_of_warps(r: Resources) -> bool:
    return r["resident_warps"] < FEW_WARPS * r["possible_warps"]


def machine_code(findings: Findings) -> list[Block]:
    compiled = ok(findings.resources)
    if not compiled:
        return []

    def widths(counts: dict[Any, int]) -> str:
        ordered = sorted(((int(bits), count) for bits, count in counts.items()), reverse=True)
        return " ".join(f"{count}×{bits // 8}" for bits, count in ordered) or "none"

    def row(r: Resources) -> dict[str, Any]:
        return {
            "GPU": r["target"],
            "kernel": r["kernel"].removesuffix("_kernel"),
            **columns_of(r),
            "loads": Cell(widths(r["loads"]), access_bits(r) < NARROW_BITS),
            "stores": widths(r["stores"]),
            "form": form_text(r["config"]) + (f", {r['clusters']} at once" if r.get("blocks", 1) > 1 else ""),
            "warps": r["warps"],
            "registers": r["registers"],
            "spilled": Cell(_spills(r), r["spill_stores"] > 0),
            "shared bytes": r["shared_bytes"],
            "instructions": r["instructions"],
            "resident": Cell(f"{r['resident_warps']}/{r['possible_warps']}", _warn_of_warps(r)),
            "limited by": r["limited_by"],
        }

    table = table_of([row(r) for r in compiled], words=6, notes=1)
    blocks: list[Block] = [Paragraph(CODE_NOTE), _by_target(compiled)]
    blocks.append(Fold("Every compiled kernel", [table], counted(len(compiled), "kernel")))
    name = "{0[op]} {0[mode]} {0[dtype]} {0[shape]} for {0[target]}".format
    return blocks + _failures(findings.resources, name)


def _by_target(compiled: Sequence[Resources]) -> Table:
    """Returns a row for each kernel of an op, pass and shape, and a column for each GPU."""
    targets = sorted({r["target"] for r in compiled}, key=lambda name: (not name.startswith("sm"), len(name), name))
    by_kernel: dict[tuple[str, ...], dict[str, Resources]] = {}
    for r in compiled:
        key = (TITLE[r["op"]], MODE_TITLE[r["mode"]], f"{layout_text(r)} {r['dtype']}", r["kernel"])
        again = sum(r["target"] in mine for known, mine in by_kernel.items() if known[:4] == key)
        by_kernel.setdefault((*key, ", again" * again), {})[r["target"]] = r

    def cell(r: Resources | None) -> Cell:
        if r is None:
            return Cell("")
        widest, narrowest = max(map(int, {**r["loads"], **r["stores"]}), default=0) // 8, access_bits(r) // 8
        width = f"{widest}" if narrowest >= widest else f"{widest}/{narrowest}"
        spills = f" · {_spills(r)} spills" if r["spill_stores"] else ""
        cluster = f" · {r['blocks']} blocks" if r.get("blocks", 1) > 1 else ""
        text = f"{r['registers']} · {width} · {r['resident_warps']}/{r['possible_warps']}{cluster}{spills}"
        warn = r["spill_stores"] > 0 or access_bits(r) < NARROW_BITS or _warn_of_warps(r)
        return Cell(text, warn, r["resident_warps"] / r["possible_warps"])

    rows = [
        [Cell(op), Cell(mode), Cell(shape), Cell(kernel.removesuffix("_kernel") + again)]
        + [cell(by_target.get(target)) for target in targets]
        for (op, mode, shape, kernel, again), by_target in by_kernel.items()
    ]
    return Table(["op", "pass", "x", "kernel", *targets], rows, words=4)
