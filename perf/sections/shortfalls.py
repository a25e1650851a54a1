"""What falls short, at a glance and to the last line."""

from __future__ import annotations

from perf import page
from perf.findings import Findings
from perf.shortfalls import counted, shortfalls

TITLE = "What falls short"
SHOWN = 8


def section(findings: Findings) -> str:
    found = shortfalls(findings)
    if not found:
        return page.paragraph("Nothing that this report can see.")
    html = [page.paragraph("Held against the bars under Method, the worst first.", "soft")]
    for title, lines in found.items():
        html += [page.heading(f"{title}: {len(lines)}"), page.bullets(lines[:SHOWN])]
        if len(lines) > SHOWN:
            html.append(page.details(f"{counted(len(lines) - SHOWN, 'more line')}", page.bullets(lines[SHOWN:])))
    return "".join(html)
