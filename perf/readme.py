"""Writes the figures of the README and of docs/numerics.md, from the results that are stored beside this file, by
command, with machine and date."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from perf import charts
from perf.environment import machine
from perf.findings import OUTPUTS, OVERFLOWING, is_worse, ok, speedups, ulps_text, worst
from perf.points import MODE_TITLE, PASSES, TITLE

Results = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
NUMERICS = ROOT / "docs" / "numerics.md"
BEGIN, END = "<!-- figures: python -m perf readme -->", "<!-- end of figures -->"
COUNTED = "without-a-gpu.json"
WHO = ("triton_norm", "torch")
RIVALS = {"torch": "torch eager", "torch.compile": "torch.compile", "Liger-Kernel": "Liger-Kernel", "QuACK": "QuACK"}
LARGE = 16 << 20  # bytes
KEPT = ("traffic", "resources", "numerics")
NOT_TIMED = """\
**No GPU has timed anything yet**: the kernels have run under the interpreter and been compiled for several GPUs, and
there is no statement about speed here. What is known without a clock is how many bytes they move, and what they are
compiled to.
"""


def store(files: Sequence[Path], folder: Path) -> None:
    """Adds results: each GPU's timed run, in place of its last, and what a report counted and compiled without one.

    ValueError for a file that is none, before anything is written.
    """
    found: dict[str, Results] = {}
    for file in files:
        try:
            content = json.loads(file.read_text())
            kind, runs = content["kind"], content.get("timed", [])
            if kind not in ("timing", "report"):
                raise ValueError(f"kind {kind!r}")
            for run in [content] if kind == "timing" else runs:
                found[_file_of(run)] = run
            if kind == "report" and content["traffic"] and content["resources"]:
                about = {"kind": kind, "format": content["format"], "environment": content["environment"]}
                found[COUNTED] = about | {name: content[name] for name in KEPT}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} holds no results: {error!r}") from error
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in found.items():
        (folder / name).write_text(_dumped(content))


def _file_of(run: Results) -> str:
    return re.sub(r"[^a-z0-9]+", "-", run["environment"]["GPU"].lower()).strip("-") + ".json"


def _dumped(content: Results) -> str:
    """JSON with one record a line."""

    def value_of(value: Any) -> str:
        if isinstance(value, list) and value:
            return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
        return json.dumps(value)

    return "{\n" + ",\n".join(f"{json.dumps(name)}: {value_of(value)}" for name, value in content.items()) + "\n}\n"


def load(folder: Path) -> tuple[list[Results], Results | None]:
    """Timed runs, the latest first, and what is known without a GPU."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    timed = [content for content in found if content["kind"] == "timing" and ok(content["records"])]
    timed.sort(key=lambda run: str(run["environment"]["date"]), reverse=True)
    return timed, next((content for content in found if content["kind"] == "report"), None)


def write(folder: Path, readme: Path = README, numerics: Path = NUMERICS) -> Path:
    """Draws the pictures into `folder`, and puts the figures between the marks of the README and of the page on
    numerics; returns the README.

    ValueError for a page without the marks, before anything is written.
    """
    timed, counted = load(folder)
    where = folder.resolve().relative_to(readme.resolve().parent).as_posix()
    filled = {
        readme: _filled(readme, block(timed, counted, where)),
        numerics: _filled(numerics, errors(counted)),
    }
    _draw(timed, counted, folder)
    for page, text in filled.items():
        page.write_text(text)
    return readme


def _filled(page: Path, figures: str) -> str:
    """Returns the page's text with these figures between its marks."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page.name} has no place for figures, between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{figures}{END}{after}"


def _draw(timed: Sequence[Results], counted: Results | None, folder: Path) -> None:
    for run in timed:
        stem, foot = _file_of(run).removesuffix(".json"), machine(run["environment"])
        charts.speedups(run["records"], foot, folder / f"{stem}-speedups.png")
        if ok(run.get("steps", [])):
            charts.steps(run["steps"], foot, folder / f"{stem}-steps.png")
    if counted is not None:
        foot = machine(counted["environment"])
        charts.traffic(counted["traffic"], foot, folder / "traffic.png")
        charts.resources(counted["resources"], foot, folder / "resources.png")


def block(timed: Sequence[Results], counted: Results | None, where: str) -> str:
    """Returns the README's figures in Markdown: of speed or, where no GPU has timed anything, of bytes and registers.

    Args:
        where: the folder of the pictures.
    """
    parts = [_timed(run, where) for run in timed]
    if not timed:
        parts.append(NOT_TIMED)
        if counted is not None:
            parts.append(_counted(counted, where))
    return "\n".join(parts)


def _timed(run: Results, where: str) -> str:
    stem, foot = _file_of(run).removesuffix(".json"), machine(run["environment"])
    timed = {r["contender"] for r in ok(run["records"])}
    rivals = {name: title for name, title in RIVALS.items() if name in timed}
    lines = [
        f"| op | pass | share of a copy's bandwidth | {' | '.join(rivals.values())} |",
        "|---|---|---|" + len(rivals) * "---|",
    ]
    for op in TITLE:
        for mode in PASSES:
            mine = [r for r in run["records"] if (r["op"], r["mode"]) == (op, mode)]
            if any(speedups(mine, name) for name in rivals):
                cells = [_share(mine, run["copy_gbps"]), *(_faster(speedups(mine, name)) for name in rivals)]
                lines.append(f"| {TITLE[op]} | {MODE_TITLE[mode]} | {' | '.join(cells)} |")
    text = (
        f"Share of a copy's bandwidth: the bytes that an op has to move over the time it takes, as a share of the "
        f"{run['copy_gbps']:.0f} GB/s of a plain copy; lowest to highest, and median, of the points that move "
        f"{LARGE >> 20} MiB or more. Then the speed-up over each contender: the geometric mean, and in brackets the "
        "number of points, small ones among them.\n\n"
    )
    text += "\n".join(lines) + f"\n\n*{foot}*\n\n"
    text += _picture("Speed-up over torch eager, geometric means", f"{where}/{stem}-speedups.png", foot)
    if ok(run.get("steps", [])):
        text += "\n" + _picture("Training steps of whole models", f"{where}/{stem}-steps.png", foot)
    return text


def _share(records: Sequence[Results], copy_gbps: float) -> str:
    found = sorted(
        r["gbps"] / copy_gbps for r in ok(records) if r["contender"] == "triton_norm" and r["floor_bytes"] >= LARGE
    )
    return f"{found[0]:.0%} to {found[-1]:.0%}, {median(found):.0%}" if found else "·"


def _faster(ratios: Sequence[float]) -> str:
    return f"{geometric_mean(ratios):.2f}× ({len(ratios)})" if ratios else "·"


def _counted(counted: Results, where: str) -> str:
    foot = machine(counted["environment"])
    pictures = (
        ("Bytes that the kernels ask for, over the fewest that must move", "traffic"),
        ("Registers, spills, access widths and resident warps of the compiled kernels", "resources"),
    )
    return "\n".join(_picture(text, f"{where}/{name}.png", foot) for text, name in pictures)


def errors(counted: Results | None) -> str:
    """Returns the largest errors by op and type, and where torch's are less, in Markdown; nothing of no results."""
    if counted is None:
        return ""
    compared = [r for r in ok(counted["numerics"]) if r["data"] != OVERFLOWING]
    columns = [(output, who) for output in OUTPUTS for who in WHO]
    lines = [f"| op | type | {' | '.join(map(', '.join, columns))} |", "|---|---|" + len(columns) * "---|"]
    for op, dtype in dict.fromkeys((r["op"], r["dtype"]) for r in compared):
        mine = [r for r in compared if (r["op"], r["dtype"]) == (op, dtype)]
        cells = [ulps_text(worst([r[output][who] for r in mine])) for output, who in columns]
        lines.append(f"| {TITLE[op]} | {dtype} | {' | '.join(cells)} |")
    less = [(r, output) for r in compared for output in OUTPUTS if is_worse(r[output])]
    lengths = ", ".join(str(n) for n in dict.fromkeys(r["columns"] for r in compared))
    data = ", ".join(dict.fromkeys(r["data"] for r in compared))
    return (
        f"The largest error of each result against fp64, in ulp of the largest result of its row or channel, over rows "
        f"and channels of {lengths} elements. The data are hard for norms: {data}. torch ran on the same device, and "
        f"is closer on {len(less)} of {len(compared) * len(OUTPUTS)} results, which are listed below the table.\n\n"
        + "\n".join(lines)
        + f"\n\n{_where_torch_is_closer(less)}*{machine(counted['environment'])}*\n"
    )


def _where_torch_is_closer(results: Sequence[tuple[Results, str]]) -> str:
    if not results:
        return ""
    lines = [
        "<details><summary>The results on which torch is closer</summary>\n",
        f"| op | type | data | elements | result | {' | '.join(WHO)} |",
        "|---|---|---|---|---|" + len(WHO) * "---|",
    ]
    for record, output in results:
        about = TITLE[record["op"]], record["dtype"], record["data"], str(record["columns"]), output
        lines.append(f"| {' | '.join((*about, *(ulps_text(record[output][who]) for who in WHO)))} |")
    return "\n".join(lines) + "\n\n</details>\n\n"


def _picture(text: str, path: str, foot: str) -> str:
    return f"![{text}]({path})\n\n*{text}. {foot}*\n"
