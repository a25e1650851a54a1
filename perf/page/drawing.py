"""Pictures for the page: one that can't be drawn is a problem that the page tells, not the end of it."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from perf.charts.style import encoded
from perf.findings import Findings
from perf.page.blocks import Block, Picture
from perf.records import in_a_line


def picture(findings: Findings, name: str, draw: Callable[[], Figure], caption: str) -> list[Block]:
    try:
        return [Picture(encoded(draw()), "image/webp", caption)]
    except Exception as error:
        findings.problems.append(f"the picture of {name} could not be drawn: {in_a_line(error)}")
        return []
