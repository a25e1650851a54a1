"""Writes the figures of the README and of docs/numerics.md, from the stored results, by command, with machine and
date."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean, median

from perf import charts
from perf.charts.style import encoded
from perf.environment import machine
from perf.findings import (
    LARGE_BYTES,
    OUTPUTS,
    OVERFLOWING,
    device_of,
    is_worse,
    layout_text,
    pairs,
    passes,
    ulps_of,
    ulps_text,
    worst,
)
from perf.ops import TITLE
from perf.points import MODE_TITLE
from perf.records import STATIC, Refused, Results, Run, Timing, dumped, ok, read

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
NUMERICS = ROOT / "docs" / "numerics.md"
BEGIN, END = "<!-- figures: python -m perf readme -->", "<!-- end of figures -->"
COUNTED = "without-a-gpu.jsonl"
WHO = ("triton_norm", "torch")
RIVALS = {"torch": "torch eager", "torch.compile": "torch.compile", "Liger-Kernel": "Liger-Kernel", "QuACK": "QuACK"}
PICTURE = "Times as fast as each rival, geometric means on the points that both were timed on, with their number"
NOT_TIMED = """\
**No GPU has timed anything yet**: the kernels have run under the interpreter and been compiled for several GPUs, and
there is no statement about speed here. How many bytes they move, and what they are compiled to, is in the report.
"""


def store(files: Sequence[Path], folder: Path) -> None:
    """Adds results: each GPU's timed run, in place of its last, and bytes, machine code and errors, in place of those.

    Raises:
        Refused: for a file that is none, before anything is written.
    """
    contents: dict[str, list[str]] = {}
    for file in files:
        results = read(file)
        facts = {name: value for name, value in results.run.items() if name not in ("records", "steps", "measuring")}
        if results.run["records"] or results.run["steps"]:
            timed = [dumped("timing", r) for r in results.run["records"]]
            timed += [dumped("step", r) for r in results.run["steps"]]
            contents[f"{_stem(results.run)}.jsonl"] = [dumped("facts", facts), *timed]
        if results.traffic and results.resources:
            lines = [dumped("facts", {name: facts[name] for name in ("format", "environment")})]
            for kind in STATIC:
                lines += [dumped(kind, record) for record in getattr(results, kind)]
            contents[COUNTED] = lines
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in contents.items():
        (folder / name).write_text("\n".join(lines) + "\n")


def _stem(run: Run) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device_of(run).lower()).strip("-")


def load(folder: Path) -> tuple[list[Run], Results | None]:
    """Returns timed runs, the latest first, and the results that need no GPU."""
    all_results = [read(path) for path in sorted(folder.glob("*.jsonl"))]
    timed = [results.run for results in all_results if ok(results.run["records"])]
    timed.sort(key=lambda run: run["environment"]["date"], reverse=True)
    return timed, next((results for results in all_results if results.numerics), None)


def write(folder: Path, readme: Path = README, numerics: Path = NUMERICS) -> Path:
    """Draws the pictures into `folder`, and puts the figures between the marks of both pages. Returns the README.

    Raises:
        Refused: for a page without the marks, before anything is written.
    """
    timed, counted = load(folder)
    where = folder.resolve().relative_to(readme.resolve().parent).as_posix()
    pages = {readme: filled(readme, block(timed, where)), numerics: filled(numerics, errors(counted))}
    for run in timed:
        (folder / f"{_stem(run)}-speedups.png").write_bytes(encoded(charts.over_rivals(run["records"]), "png"))
    for page, text in pages.items():
        page.write_text(text)
    return readme


def filled(page: Path, figures: str, mark: str = BEGIN) -> str:
    """Returns the page's text with these figures between its marks."""
    before, begin, rest = page.read_text().partition(mark)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise Refused(f"{page.name} has no place for figures, between {mark} and {END}")
    return f"{before}{mark}\n{figures}{END}{after}"


def block(timed: Sequence[Run], where: str) -> str:
    """Returns the README's figures in Markdown; `where`: the folder of the pictures."""
    return "\n".join(_timed(run, where) for run in timed) or NOT_TIMED


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def _timed(run: Run, where: str) -> str:
    foot, copy = machine(run["environment"]), run["copy_gbps"]
    names = {r["contender"] for r in ok(run["records"])}
    rivals = {name: title for name, title in RIVALS.items() if name in names}
    rows = []
    for op, mode, mine in passes(run["records"]):
        if any(pairs(mine, name) for name in rivals):
            cells = [_share(mine, copy), *(_faster(mine, name) for name in rivals)]
            rows.append([TITLE[op], MODE_TITLE[mode], *cells])
    text = (
        "Share of a copy's bandwidth: the bytes that an op has to move over the time it takes, as a share of the "
        f"{copy:.0f} GB/s of a plain copy; lowest to highest, and median, of the points that move {LARGE_BYTES >> 20} "
        "MiB or more. Then the speed-up over each contender, on the points that both were timed on: the geometric "
        "mean, and in brackets their number or, where there is one, its shape.\n\n"
    )
    text += table(["op", "pass", "share of a copy's bandwidth", *rivals.values()], rows)
    picture = f"{where}/{_stem(run)}-speedups.png"
    return f"{text}\n*{foot}*\n\n![{PICTURE}]({picture})\n\n*{PICTURE}. {foot}*\n"


def _share(records: Sequence[Timing], copy_gbps: float) -> str:
    shares = sorted(
        r["gbps"] / copy_gbps
        for r in ok(records)
        if r["contender"] == "triton_norm" and r["floor_bytes"] >= LARGE_BYTES
    )
    return f"{shares[0]:.0%} to {shares[-1]:.0%}, {median(shares):.0%}" if shares else "·"


def _faster(records: Sequence[Timing], rival: str) -> str:
    compared = pairs(records, rival)
    if not compared:
        return "·"
    count = f"{len(compared)}" if len(compared) > 1 else layout_text(compared[0][0])
    return f"{geometric_mean([ratio for _, ratio in compared]):.2f}× ({count})"


def errors(counted: Results | None) -> str:
    """Returns the largest errors by op and type in Markdown, and on how many results torch's are less."""
    if counted is None:
        return ""
    compared = [r for r in ok(counted.numerics) if r["data"] != OVERFLOWING]
    columns = [(output, who) for output in OUTPUTS for who in WHO]
    rows = []
    for op, dtype in dict.fromkeys((r["op"], r["dtype"]) for r in compared):
        mine = [r for r in compared if (r["op"], r["dtype"]) == (op, dtype)]
        cells = [ulps_text(worst([ulps_of(r, output)[who] for r in mine])) for output, who in columns]
        closer = sum(is_worse(ulps_of(r, output)) for r in mine for output in OUTPUTS)
        rows.append([TITLE[op], dtype, *cells, f"{closer} of {len(mine) * len(OUTPUTS)}"])
    lengths = ", ".join(str(n) for n in dict.fromkeys(r["columns"] for r in compared))
    data = ", ".join(dict.fromkeys(r["data"] for r in compared))
    return (
        "The largest error of each result against fp64, in ulp of the largest result of its row, channel or group, "
        f"over rows, channels and groups of {lengths} elements. The data are hard for norms: {data}. torch ran on the "
        "same device; the last column counts the results on which it is closer, which "
        "`python -m perf report perf/results/*.jsonl` lists.\n\n"
        + table(["op", "type", *map(", ".join, columns), "torch is closer on"], rows)
        + f"\n*{machine(counted.run['environment'])}*\n"
    )
