"""The report's page, written from findings. It needs nothing beside itself, and no script to be read."""

from __future__ import annotations

from perf.environment import machine
from perf.findings import Findings
from perf.page import about, speed, static, summary
from perf.page.blocks import Section, render


def html(findings: Findings) -> str:
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
