"""Makes the page's sections on method, contenders and machine."""

from __future__ import annotations

from pathlib import Path

from perf.findings import LARGE_BYTES, STATUS_TEXT, Findings, counted, device_of
from perf.ops import OPS, TITLE
from perf.page.blocks import Block, Cell, Fold, Heading, Paragraph, Picture, Table
from perf.page.speed import kernels_table
from perf.points import MODE_TITLE, MODES, floor_of
from perf.records import Run
from perf.shortfalls import BARS, LEVEL, MEANS

ANATOMY = Path(__file__).resolve().parent.parent / "anatomy.png"
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
        "No contender is timed on a point before all that it computes agrees with torch's own function in fp64, within "
        "a tolerance of this suite's own. One that does not, or that fails, is recorded with its message.",
    ),
    "Without a clock": (
        "Traffic is counted address by address while Triton's interpreter runs the kernels: exactly, on slices of "
        "large inputs, with the launches of as large a slice of a GPU of 132 multiprocessors. Masked lanes count "
        "nothing. Time under the interpreter means nothing and is not recorded.",
        "Machine code is what Triton compiles for a GPU that is not there, from the very arguments of a launch; "
        "occupancy follows from registers, shared memory and threads.",
    ),
}


def _table(head: list[str], rows: list[list[str]], words: int) -> Table:
    return Table(head, [[Cell(text) for text in row] for row in rows], words)


def anatomy() -> list[Block]:
    caption = "In each panel the coloured elements share one mean and one variance; every other group has its own."
    return [Picture(ANATOMY.read_bytes(), "image/png", caption)]


def method() -> list[Block]:
    blocks: list[Block] = []
    for title, texts in METHOD.items():
        blocks += [Heading(title), *map(Paragraph, texts)]
    floors = [(TITLE[op], mode, floor_of(op, mode)) for op in OPS for mode in MODES]
    means = [f"{least:g}× for {TITLE[op]} {mode} in {dtype}" for (op, mode, dtype), least in MEANS.items()]
    text = (
        "Never slower than torch eager, and as geometric means over all points at least "
        f"{', '.join(means)}. Faster than every other contender on inputs above {LARGE_BYTES >> 20} MiB, and at least "
        f"{LEVEL:.0%} of its speed below. Of the measured copy bandwidth at least, stated for an H200:"
    )
    bars = [[", ".join(TITLE[op] for op in b.ops), MODE_TITLE[b.mode], b.text, f"{b.least:.0%}"] for b in BARS]
    return [
        *blocks,
        Heading("Floor: the bytes that must move"),
        _table(
            ["op", "pass", "floor", "tensors"],
            [[op, mode, floor.short, floor.text.partition(": ")[2]] for op, mode, floor in floors],
            words=4,
        ),
        Heading("Bars: what is wanted of triton_norm"),
        Paragraph(text),
        _table(["op", "pass", "inputs", "of copy bandwidth"], bars, words=3),
    ]


def contenders(findings: Findings) -> list[Block]:
    """Returns each contender with its version, or why it is missing, and how many records of each status it has."""
    blocks: list[Block] = []
    statuses = ("ok", "wrong", "error", "unsupported", "skipped")
    for run in findings.timed:
        known = run.get("contenders", {})
        rows = []
        for name in dict.fromkeys([*known, *(r["contender"] for r in run["records"])]):
            counts = [
                sum((r["contender"], r["status"]) == (name, status) for r in run["records"]) for status in statuses
            ]
            rows.append([name, known.get(name, "not told"), *(str(count) if count else "" for count in counts)])
        shown = [STATUS_TEXT.get(status, status) for status in statuses]
        blocks += [Heading(device_of(run))] if len(findings.timed) > 1 else []
        blocks.append(_table(["contender", "version, or why it is missing", *shown], rows, words=2))
    return blocks or [Paragraph("Nothing was timed, so there were no contenders.", "soft")]


def environment(findings: Findings) -> list[Block]:
    blocks = _facts("This report", findings.environment)
    for run in findings.timed:
        facts = dict(run["environment"]) if run["environment"] != findings.environment else {}
        facts |= {f"{name}, afterwards": value for name, value in run.get("clocks_afterwards", {}).items()}
        summary = run.get("tests", {}).get("summary")
        facts |= {"tests on the GPU": summary} if summary else {}
        blocks += _facts("Timed run", facts) if facts else []
        kernels = kernels_table(run)
        if kernels:
            blocks.append(Fold("Kernels that ran, by the profiler's names", [kernels], device_of(run)))
        blocks += _choices(run)
    return blocks


def _facts(title: str, facts: dict[str, str]) -> list[Block]:
    return [Heading(title), _table(["fact", "value"], [[name, value] for name, value in facts.items()], words=2)]


def _choices(run: Run) -> list[Block]:
    rows = [
        [kernel, key, ", ".join(f"{name} {value}" for name, value in launch.items())]
        for kernel, keys in run.get("choices", {}).items()
        for key, launch in keys.items()
    ]
    table = _table(["kernel", "key", "launch"], rows, words=3)
    return [Fold("Launches chosen in this run", [table], counted(len(rows), "choice"))] if rows else []
