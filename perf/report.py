"""Results to something to read, one page. Nothing here measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from perf import page, records
from perf.findings import OURS, Findings


def load(paths: Sequence[Path], findings: Findings) -> None:
    """Adds the content of results files; a file that is none is a problem that the page tells."""
    for path in paths:
        try:
            findings.add(records.read(path))
        except ValueError as error:
            findings.problems.append(str(error))


def write(findings: Findings, out: Path) -> Path:
    """Writes index.html, and returns its path."""
    out.mkdir(parents=True, exist_ok=True)
    index = out / "index.html"
    index.write_text(page.html(findings))
    return index


def has_failed(findings: Findings) -> bool:
    """Returns whether anything of ours is wrong or missing; another contender's failure is only recorded."""
    here = findings.timed[:1] if findings.timed_here else []
    timed = [record for run in here for record in (*run["records"], *run["steps"])]
    statuses = [record["status"] for record in timed if record["contender"].startswith(OURS)]
    statuses += [record["status"] for record in (*findings.traffic, *findings.resources, *findings.numerics)]
    unsound = any(run.get("stopped") or run.get("tests", {}).get("passed") is False for run in here)
    return bool(findings.problems) or unsound or bool({"wrong", "error"} & set(statuses))
