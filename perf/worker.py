"""A part of the suite in a process of its own: the interpreter and the compiler cannot share one."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
QUIET = 5.0
GRACE = 5.0


class Worker:
    """`python -m perf VERB --lines`. What it has found so far is always in `records`."""

    def __init__(self, verb: str, say: Callable[[str], None]) -> None:
        self.verb = verb
        self.records: list[dict[str, Any]] = []
        self._say = say
        self._process: subprocess.Popen[str] | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115

    def start(self) -> None:
        command = [sys.executable, "-m", "perf", self.verb, "--lines"]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=self._errors, text=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        spoke = 0.0
        for line in self._process.stdout:
            self.records.append(json.loads(line))
            if time.monotonic() - spoke > QUIET:
                self._say(f"{self.verb}: {len(self.records)} records")
                spoke = time.monotonic()

    def wait(self) -> list[str]:
        """Until it ends. Returns what went wrong apart from what its records say."""
        assert self._process is not None
        self._reader.join()
        status = self._process.wait()
        self._say(f"{self.verb}: done, {len(self.records)} records")
        if status == 0 or (status == 1 and any(record["status"] != "ok" for record in self.records)):
            return []
        self._errors.seek(0)
        last = (self._errors.read().strip().splitlines() or ["no message"])[-1]
        return [f"{self.verb} ended with exit status {status}: {last}"]

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(GRACE)
            except subprocess.TimeoutExpired:  # an import can swallow what the signal raises
                self._process.kill()
                self._process.wait()
        self._errors.close()
