"""The page's parts: what was timed, what is known without a clock, and what it all rests on."""

from __future__ import annotations

from pathlib import Path

from perf import page
from perf.environment import machine
from perf.findings import Findings
from perf.sections import about, shortfalls, speed, static, summary
from perf.sections.drawing import Drawing


def html(findings: Findings, out: Path) -> str:
    """The page; its pictures are drawn into `out`. The summary comes last: it tells what could not be drawn."""
    drawing = Drawing(findings, out)
    sections = [
        ("Speed", speed.speed(drawing)),
        ("Whole models", speed.steps(drawing)),
        ("Exactness", static.exactness(drawing)),
        ("Traffic", static.traffic(drawing)),
        ("Machine code", static.machine_code(drawing)),
        ("What is normalized", about.anatomy()),
        ("Method", about.method()),
        ("Contenders", about.contenders(findings)),
        ("Environment", about.environment(findings)),
    ]
    sections.insert(6, (shortfalls.TITLE, shortfalls.section(findings)))
    run = summary.chief(findings)
    subtitle = machine(run["environment"] if run else findings.environment)
    return page.page("triton_norm: performance", subtitle, summary.summary(drawing), sections)
