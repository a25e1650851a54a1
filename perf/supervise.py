"""A timed run in processes of its own, the next of which goes on where the GPU, or the process, was lost."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

LOST = 3  # the exit status of a run whose GPU no longer answers


def _of_one_process(arguments: Sequence[str]) -> list[str]:
    """The command line without --keep-going, and without --seconds, which each process is given anew."""
    kept: list[str] = []
    is_value = False
    for argument in arguments:
        dropped = is_value or argument == "--keep-going" or argument.startswith("--seconds")
        is_value = argument == "--seconds"
        kept += [] if dropped else [argument]
    return kept


def run(path: Path, seconds: float, say: Callable[[str], None], arguments: Sequence[str] | None = None) -> int:
    """The exit status of the last process. None is started anew unless the one before got further than its own."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = [sys.executable, "-m", "perf", *_of_one_process(given)]
    until = time.monotonic() + seconds
    before: object = None
    while True:
        left = until - time.monotonic()
        status = subprocess.run([*command, f"--seconds={max(left, 1)}"]).returncode
        if status != LOST and status >= 0:
            return status
        now = _progress(path)
        if now == before or left <= 0:
            return LOST
        before = now
        say("going on in a new process")
        command += [] if "--resume" in command else ["--resume"]


def _progress(path: Path) -> tuple[int, str]:
    """What a run has come to: how much is kept, and what it was measuring when it was lost."""
    at = path.with_suffix(".at")
    return path.stat().st_size if path.exists() else 0, at.read_text() if at.exists() else ""
