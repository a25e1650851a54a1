"""The file that a timed run fills, and that another process can go on with."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perf import environment
from perf.findings import Record

Results = dict[str, Any]
FORMAT = 2
SAVE_EVERY = 2.0  # seconds
GPU_LOST = "the GPU no longer answers"
SAME = ("GPU", "driver", "torch", "triton", "commit")
"""What a run that goes on must have in common with the one that it goes on with."""


class Ledger:
    """A results file that is whole at every moment: written beside and renamed, at most every few seconds.

    Beside it lies the name of what is being measured; `lost` is that of a process that did not survive it.
    """

    def __init__(self, path: Path, resume: bool = False) -> None:
        self.path = path
        self._at = path.with_suffix(".at")
        going_on = resume and path.exists()
        self.lost = self._at.read_text() if going_on and self._at.exists() else ""
        self.results: Results = _earlier(path) if going_on else _new()
        self._saved = 0.0
        self.save()

    def begin(self, task: str) -> None:
        self._at.write_text(task)

    def add(self, records: Sequence[Record], kind: str) -> None:
        self.results[kind].extend(records)
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(self.results, indent=1))
        partial.replace(self.path)
        self._saved = time.monotonic()

    def close(self) -> None:
        self.save()
        self._at.unlink(missing_ok=True)


def _new() -> Results:
    return {"kind": "timing", "format": FORMAT, "environment": environment.describe(), "records": [], "steps": []}


def _earlier(path: Path) -> Results:
    """What a file holds, if this machine can go on with it; ValueError otherwise."""
    try:
        results: Results = json.loads(path.read_text())
        if (results["kind"], results["format"]) != ("timing", FORMAT):
            raise ValueError(f"kind {results['kind']!r}, format {results['format']!r}")
        before = results["environment"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is no timed run to go on with: {error!r}") from error
    now = environment.describe()
    others = [f"{name} {before.get(name)}, now {now.get(name)}" for name in SAME if before.get(name) != now.get(name)]
    if others:
        raise ValueError(f"{path.name} was measured with something else: {'; '.join(others)}")
    results.pop("stopped", None)
    return results
