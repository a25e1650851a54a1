"""Pictures for the page: one that can't be drawn is a problem that the page tells, not the end of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from perf import page
from perf.findings import Findings, in_a_line


@dataclass
class Drawing:
    """Where pictures go, and which there are, by name."""

    findings: Findings
    out: Path
    drawn: dict[str, str] = field(default_factory=dict)

    def figure(self, name: str, draw: Callable[[Path], object], caption: str) -> str:
        """`draw` writes a PNG to the path that it gets."""
        path = self.out / f"{name}.png"
        try:
            draw(path)
            self.drawn[name] = page.figure(path, caption)
        except Exception as error:
            self.findings.problems.append(f"the picture {path.name} could not be drawn: {in_a_line(error)}")
        return self.drawn.get(name, "")
