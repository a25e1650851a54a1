"""A timed run from beginning to end: the tests if asked for, then every point that the time allows, kept as it goes."""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from perf import environment
from perf.contenders import CONTENDERS, Contender
from perf.points import Point

Results = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
SAVE_EVERY = 2.0
TESTS_SHARE = 0.55


class Ledger:
    """A results file that is whole at every moment: written beside and renamed, at most every few seconds."""

    def __init__(self, path: Path, results: Results) -> None:
        self.path, self.results = path, results
        self._saved = 0.0
        self.save()

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        self.results["records"].extend(records)
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(self.results, indent=1))
        partial.replace(self.path)
        self._saved = time.monotonic()


def run_tests(seconds: float) -> dict[str, Any]:
    """The library's own tests on this machine: their last line, and whether they passed."""
    before = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "tests"]
    if importlib.util.find_spec("xdist"):  # most of the time goes to compiling, on the CPU
        command += ["-n", "auto", "--maxprocesses", "12"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        output, passed = done.stdout + done.stderr, done.returncode == 0
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else ""
        output, passed = f"{output}\nstopped after {seconds:.0f} s", False
    lines = output.strip().splitlines() or ["no output"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"passed": passed, "summary": lines[-1], "failed": failed, "seconds": time.monotonic() - before}


def _selected(point: Point, contenders: Sequence[Contender], quick: bool) -> list[Contender]:
    """Compiling each shape anew takes seconds: a quick sweep spends them on landmarks alone."""
    return [contender for contender in contenders if not quick or point.is_landmark or not contender.compiles]


def _skipped(point: Point, contenders: Sequence[Contender], chosen: Sequence[Contender]) -> list[dict[str, Any]]:
    reason = "compiled per shape: a quick sweep times it on a few shapes in training only"
    return [
        {**point.describe(), "contender": c.name, "status": "skipped", "message": reason}
        for c in contenders
        if c not in chosen
    ]


def timed_run(
    points: Sequence[Point], path: Path, seconds: float, quick: bool, tests: bool, say: Callable[[str], None]
) -> Results:
    """Measure until `seconds` are spent. Whatever happens, what was measured is in the file and is returned."""
    deadline = time.monotonic() + seconds
    results: Results = {"kind": "timing", "format": 1, "environment": environment.describe(), "records": []}
    ledger = Ledger(path, results)
    try:
        if tests:
            say("running the tests on the GPU")
            results["tests"] = run_tests(TESTS_SHARE * seconds)
            say(results["tests"]["summary"])
        _measure(points, ledger, deadline, quick, say)
    except KeyboardInterrupt:
        results["stopped"] = "interrupted"
    except Exception as error:
        results["stopped"] = f"{type(error).__name__}: {error}"
    finally:
        results["unreached"] = [str(point) for point in points[results.get("reached", 0) :]]
        results["clocks afterwards"] = {k: v for k, v in environment.gpu().items() if "as read" in k}
        ledger.save()
    return results


def _measure(points: Sequence[Point], ledger: Ledger, deadline: float, quick: bool, say: Callable[[str], None]) -> None:
    import torch

    from perf import measure
    from triton_norm import tuning
    from triton_norm.ops import launch

    results = ledger.results
    results["contenders"] = {contender.name: contender.status() for contender in CONTENDERS}
    present = [contender for contender in CONTENDERS if not contender.missing()]
    timer = measure.CudaTimer()
    results["copy_gbps"] = measure.copy_bandwidth(timer)
    say(f"copy bandwidth {results['copy_gbps']:.0f} GB/s")
    with ExitStack() as scopes:
        for contender in present:
            scopes.enter_context(contender.scope())
        for reached, point in enumerate(points):
            if time.monotonic() > deadline:
                break
            chosen = _selected(point, present, quick)
            records = measure.measure_point(point, chosen, timer) + _skipped(point, present, chosen)
            results["reached"] = reached + 1
            ledger.add(records)
            results["choices"] = tuning.choices(launch.gpu_name(torch.device(timer.device)))
            say(f"[{reached + 1}/{len(points)}] {point}: {_line(records)}")


def _line(records: Sequence[dict[str, Any]]) -> str:
    def shown(record: dict[str, Any]) -> str:
        return f"{record['gbps']:.0f} GB/s" if "gbps" in record else record["status"]

    return ", ".join(f"{record['contender']} {shown(record)}" for record in records if record["status"] != "skipped")
