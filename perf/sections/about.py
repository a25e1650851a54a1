"""What the results rest on: what is normalized, how it was measured, against whom, and where."""

from __future__ import annotations

from pathlib import Path

from perf import page
from perf.findings import Findings, Record, device_of
from perf.page import Entry
from perf.points import FLOORS, MODE_TITLE, TITLE
from perf.sections.speed import kernels_table
from perf.shortfalls import BARS, LARGE, LEVEL, MEANS, counted

METHOD = {
    "Timing": (
        "GB/s is the floor's bytes over the median time, by the one formula below for every contender: one that moves "
        "more bytes is slower, not busier. The roof is a device-to-device copy of 1 GiB in the same run, bytes read "
        "plus bytes written.",
        "Each call is timed by CUDA events on the device alone: it starts with an L2 that holds none of its tensors, "
        "queued behind enough other work that the host is never waited for. The host's time for a call is recorded "
        "apart. Contenders take turns, call by call, on several sets of inputs; compiling and searching happen before. "
        "A backward pass is timed after a fresh forward pass that is not; forward and backward in one is timed whole.",
        "The names of the kernels that a call ran are those that torch's profiler tells.",
    ),
    "Gate": (
        "No contender is timed on a point before all that it computes agrees with torch's own function in fp64. One "
        "that does not, or that fails, is recorded with its message.",
    ),
    "Without a clock": (
        "Traffic is counted address by address while Triton's interpreter runs the kernels: exactly, on slices of "
        "large inputs, with the launches of as large a slice of a GPU of 132 multiprocessors. Masked lanes count "
        "nothing. Time under the interpreter means nothing and is not recorded.",
        "Machine code is what Triton compiles for a GPU that is not there, from the very arguments of a launch; "
        "occupancy follows from registers, shared memory and threads.",
    ),
}


ANATOMY = Path(__file__).resolve().parent.parent / "anatomy.png"


def anatomy() -> str:
    caption = "In each panel the coloured elements share one mean and one variance; every other group has its own."
    return page.figure(ANATOMY, caption)


def method() -> str:
    html = [page.heading(title) + "".join(map(page.paragraph, texts)) for title, texts in METHOD.items()]
    floors: list[list[Entry]] = [
        [TITLE[op], mode, floor.short, floor.text.partition(": ")[2]] for (op, mode), floor in FLOORS.items()
    ]
    html.append(page.heading("Floor: the bytes that must move"))
    html.append(page.table(["op", "pass", "floor", "tensors"], floors, words=4))
    html.append(page.heading("Bars: what is wanted of triton_norm"))
    means = [f"{least:g}× for {TITLE[op]} {mode} in {dtype}" for (op, mode, dtype), least in MEANS.items()]
    html.append(
        page.paragraph(
            "Never slower than torch eager, and as geometric means over all points at least "
            f"{', '.join(means)}. Faster than every other contender on inputs above {LARGE >> 20} MiB, and at least "
            f"{LEVEL:.0%} of its speed below. Of the measured copy bandwidth at least, stated for an H200:"
        )
    )
    bars: list[list[Entry]] = [
        [", ".join(TITLE[op] for op in bar.ops), MODE_TITLE[bar.mode], bar.text, f"{bar.least:.0%}"] for bar in BARS
    ]
    return "".join(html) + page.table(["op", "pass", "inputs", "of copy bandwidth"], bars, words=3)


def contenders(findings: Findings) -> str:
    """Each with its version or why it is missing, and what came of it."""
    html = []
    for run in findings.timed:
        if len(findings.timed) > 1:
            html.append(page.heading(device_of(run)))
        statuses = ("ok", "wrong", "error", "unsupported", "skipped")
        records: list[Record] = run["records"]
        named = dict.fromkeys([*run.get("contenders", {}), *(r["contender"] for r in records)])
        rows: list[list[Entry]] = []
        for name in named:
            counts = [sum((r["contender"], r["status"]) == (name, status) for r in records) for status in statuses]
            shown = [str(count) if count else "" for count in counts]
            rows.append([name, run.get("contenders", {}).get(name, "not told"), *shown])
        html.append(page.table(["contender", "version, or why it is missing", *statuses], rows, words=2))
    return "".join(html) or page.paragraph("Nothing was timed, so there were no contenders.", "soft")


def environment(findings: Findings) -> str:
    html = [_facts("This report", findings.environment)]
    for run in findings.timed:
        facts = dict(run["environment"]) if run["environment"] != findings.environment else {}
        facts |= {f"{name}, afterwards": value for name, value in run.get("clocks afterwards", {}).items()}
        tests = run.get("tests", {})
        facts |= {"tests on the GPU": tests["summary"]} if tests.get("summary") else {}
        html.append(_facts("Timed run", facts) if facts else "")
        kernels = kernels_table(run)
        if kernels:
            html.append(page.details("Kernels that ran, by the profiler's names", kernels, note=device_of(run)))
        if run.get("choices"):
            html.append(_choices(run["choices"]))
    return "".join(html)


def _facts(title: str, facts: dict[str, str]) -> str:
    rows: list[list[Entry]] = [[name, value] for name, value in facts.items()]
    return page.heading(title) + page.table(("what", "value"), rows, words=2)


def _choices(choices: dict[str, dict[str, Record]]) -> str:
    """The launches that the run chose, by kernel and what the choice depends on."""
    rows: list[list[Entry]] = [
        [kernel, key, ", ".join(f"{name} {value}" for name, value in launch.items())]
        for kernel, keys in choices.items()
        for key, launch in keys.items()
    ]
    table = page.table(["kernel", "key", "launch"], rows, words=3)
    return page.details("Launches chosen in this run", table, note=counted(len(rows), "choice"))
