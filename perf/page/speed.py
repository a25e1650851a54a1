"""The page's sections of timings: single calls, and training steps of whole models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import geometric_mean

from perf import charts
from perf.charts.style import in_order, styles_of
from perf.environment import machine
from perf.findings import (
    OURS,
    STATUS_TEXT,
    Findings,
    counted,
    device_of,
    layout_text,
    pairs,
    speedups,
    split,
    step_speedups,
)
from perf.page.blocks import Bar, Bars, Block, Cell, Column, Fold, Heading, Paragraph, Table, table_of
from perf.page.drawing import picture
from perf.points import MODE_TITLE, PASSES, TITLE, floor_of
from perf.records import Run, Step, Timing, ok
from perf.shortfalls import is_short

FAILED = ("wrong", "error")
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
            without = {r["contender"] for r in records} - {
                r["contender"] for r in records if r["status"] != "unsupported"
            }
            caption += f" Without such an op: {', '.join(sorted(without))}." if without else ""
            draw = partial(charts.throughput, records, run.get("copy_gbps"))
            pictures.setdefault(op, []).extend(picture(findings, name, draw, caption))
    folds: list[Block] = []
    for op, drawn in pictures.items():
        folds.append(Fold(f"{TITLE[op]}: GB/s by size", drawn, opened=not folds))
    return folds


def _means_table(run: Run) -> Table:
    rows = []
    for op, mode, dtype, records in split(run["records"]):
        for who in in_order(r["contender"] for r in records):
            ratios = speedups(records, "torch", who)
            if ratios and who != "torch":
                mean = geometric_mean(ratios)
                texts = (TITLE[op], MODE_TITLE[mode], dtype, who, f"{mean:.2f}×", str(len(ratios)))
                ends = (f"{min(ratios):.2f}×", f"{max(ratios):.2f}×")
                rows.append([Cell(text) for text in (*texts, *ends)])
    head = ("op", "pass", "dtype", "contender", "geometric mean", "points", "least", "most")
    return Table(head, rows, words=4)


def _timed_table(run: Run) -> Table:
    copy = run.get("copy_gbps")
    over_torch: dict[int, float] = {}
    for who in dict.fromkeys(r["contender"] for r in run["records"]):
        over_torch |= {id(record): ratio for record, ratio in pairs(run["records"], "torch", who)}

    def figure(name: str, digits: int = 1) -> Column[Timing]:
        title = {"median_us": "µs", "gbps": "GB/s", "p20_us": "20 %", "p80_us": "80 %", "host_us": "host µs"}[name]
        return Column(title, lambda r: f"{r[name]:,.{digits}f}" if name in r else "")

    columns: list[Column[Timing]] = [
        Column("op", lambda r: TITLE[r["op"]]),
        Column("pass", lambda r: MODE_TITLE[r["mode"]]),
        Column("dtype", lambda r: r["dtype"]),
        Column("shape", layout_text),
        Column("source", lambda r: r["source"]),
        Column("contender", lambda r: r["contender"]),
        Column("status", lambda r: STATUS_TEXT.get(r["status"], r["status"]), lambda r: r["status"] in FAILED),
        figure("median_us"),
        figure("gbps", 0),
        Column(
            "of copy",
            lambda r: f"{r['gbps'] / copy:.0%}" if copy and "gbps" in r else "",
            lambda r: is_short(r, copy),
        ),
        Column(
            "× torch",
            lambda r: f"{over_torch[id(r)]:.2f}" if id(r) in over_torch else "",
            lambda r: over_torch.get(id(r), 1) < 1 and r["contender"] == OURS,
        ),
        figure("p20_us"),
        figure("p80_us"),
        figure("host_us"),
        Column("error", lambda r: f"{max(r['errors'].values()):.1e}" if r.get("errors") else ""),
        Column("message", lambda r: r["message"]),
    ]  # fmt: skip
    return table_of(columns, run["records"], words=7, notes=1)


def speed_bars(run: Run) -> list[Block]:
    """Returns how many times as fast as each rival ours is, on the points that both were timed on."""
    records = run["records"]
    rivals = [who for who in in_order(r["contender"] for r in ok(records)) if not who.startswith(OURS)]
    colours = {who: style.colour for who, style in styles_of(rivals).items()}
    rows = []
    for op in TITLE:
        cells = []
        for mode in PASSES:
            mine = [r for r in records if (r["op"], r["mode"]) == (op, mode)]
            found = [(who, ratios) for who in rivals if (ratios := speedups(mine, who))]
            means = [(who, geometric_mean(ratios), len(ratios)) for who, ratios in found]
            cells.append([Bar([(mean, colours[who])], f"{mean:.2f}× ({count})") for who, mean, count in means])
        rows.append((TITLE[op], cells))
    used = [place for place in range(len(PASSES)) if any(cells[place] for _, cells in rows)]
    shown = [(name, [cells[place] for place in used]) for name, cells in rows if any(cells)]
    if not shown:
        return []
    note = (
        "Geometric means of a rival's time over ours, each bar on the points that both were timed on; their number in "
        f"brackets. {device_of(run)}. Single points are under Speed."
    )
    legend = [(f"over {'torch eager' if who == 'torch' else who}", colour) for who, colour in colours.items()]
    title = "triton_norm: times as fast as each rival (dashed line: as fast)"
    return [Bars(title, note, [MODE_TITLE[PASSES[place]] for place in used], shown, legend)]


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

    def figure(title: str, name: str) -> Column[Step]:
        return Column(title, lambda r: f"{r[name]:,.0f}" if r.get(name) is not None else "")

    def share(r: Step) -> str:
        without = r.get("without_norms_us")
        return f"{1 - without / r['median_us']:.0%}" if without is not None else ""

    columns: list[Column[Step]] = [
        Column("model", lambda r: r["model"]),
        Column("training", lambda r: r["source"]),
        Column("dtype", lambda r: r["dtype"]),
        Column("contender", lambda r: r["contender"]),
        Column("status", lambda r: STATUS_TEXT.get(r["status"], r["status"]), lambda r: r["status"] in FAILED),
        figure("step µs", "median_us"),
        Column(
            "speed-up",
            lambda r: "{:.3f}× {}".format(*ratios[id(r)]) if id(r) in ratios else "",
            lambda r: ratios.get(id(r), (1.0, ""))[0] < 1,
        ),
        figure("without norms", "without_norms_us"),
        Column("norms' share", share),
        figure("norms", "norms"),
        figure("20 %", "p20_us"),
        figure("80 %", "p80_us"),
        figure("host µs", "host_us"),
        Column("message", lambda r: r["message"]),
    ]
    return table_of(columns, records, words=5, notes=1)


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
