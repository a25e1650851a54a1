"""Writes the page of results. It needs no other file, and no script to be read. Nothing here measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from perf import records
from perf.environment import machine
from perf.findings import OURS, Findings
from perf.page import about, speed, static, summary
from perf.page.blocks import Section, render
from perf.records import FAILURES


def load(paths: Sequence[Path], findings: Findings) -> None:
    """Adds the content of results files; a file that is none is a problem that the page tells."""
    for path in paths:
        try:
            findings.add(records.read(path))
        except ValueError as error:
            findings.problems.append(str(error))


def _html(findings: Findings) -> str:
    """Returns the page. Its summary is made last: it tells which pictures could not be drawn."""
    sections = [
        Section("Speed", speed.speed(findings)),
        Section("Whole models", speed.steps(findings)),
        Section("Exactness", static.exactness(findings)),
        Section("Traffic", static.traffic(findings)),
        Section("Machine code", static.machine_code(findings)),
        Section(summary.SHORTFALLS, summary.shortfalls(findings)),
        Section("What is normalized", about.anatomy()),
        Section("Method", about.method()),
        Section("Contenders", about.contenders(findings)),
        Section("Environment", about.environment(findings)),
    ]
    run = summary.chief(findings)
    subtitle = machine(run["environment"] if run else findings.environment)
    return render("triton_norm: performance", subtitle, summary.summary(findings), sections)


def write(findings: Findings, out: Path) -> Path:
    """Writes index.html, and returns its path."""
    out.mkdir(parents=True, exist_ok=True)
    index = out / "index.html"
    index.write_text(_html(findings))
    return index


def has_failed(findings: Findings) -> bool:
    """Returns whether anything of ours is wrong or missing; another contender's failure is only recorded."""
    here = findings.timed[:1] if findings.timed_here else []
    timed = [record for run in here for record in (*run["records"], *run["steps"])]
    statuses = [record["status"] for record in timed if record["contender"].startswith(OURS)]
    statuses += [record["status"] for record in findings.static]
    unsound = any(run.get("stopped") or run.get("tests", {}).get("passed") is False for run in here)
    return bool(findings.problems) or unsound or not {*FAILURES}.isdisjoint(statuses)
