"""A timed run from beginning to end: the tests if asked for, then every point that the time allows, kept as it goes."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perf import environment, measure, models
from perf.contenders import CONTENDERS, Contender
from perf.findings import Record
from perf.ledger import GPU_LOST, Ledger, Results
from perf.models import Model
from perf.points import Point
from triton_norm.tuning.choices import chosen_so_far
from triton_norm.tuning.limits import gpu_of

ROOT = Path(__file__).resolve().parent.parent
TESTS_SHARE = 0.55
NOT_SURVIVED = "the process that measured it did not survive"
COMPILED = "compiled per shape: a quick run times it on a few shapes in training only, or if it searches, only by name"

Task = Point | Model


@dataclass(frozen=True)
class Plan:
    """What to measure. `contenders`: their names, or all; `resume`: go on with the file that is there."""

    points: Sequence[Point]
    models: Sequence[Model] = ()
    contenders: Sequence[str] | None = None
    quick: bool = True
    seconds: float = math.inf
    tests: bool = False
    resume: bool = False

    def tasks(self) -> list[Task]:
        """Landmarks, models, other points: what is done when time runs out is a picture of the whole."""
        landmarks = [point for point in self.points if point.workload.landmark]
        return [*landmarks, *self.models, *(point for point in self.points if not point.workload.landmark)]

    def has_time_for(self, contender: Contender, task: Task) -> bool:
        """Compiling each shape anew takes seconds, which a quick run spends on landmarks alone."""
        if not self.quick or not contender.compiles:
            return True
        return task.is_landmark and (self.contenders is not None or not contender.searches)

    def chosen(self) -> list[Contender]:
        return [c for c in CONTENDERS if self.contenders is None or c.name in self.contenders]


def run_tests(seconds: float) -> dict[str, Any]:
    """The library's own tests on this machine: their last line, and whether they passed."""
    before = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "tests"]
    if importlib.util.find_spec("xdist"):  # most of the time goes to compiling, on the CPU
        command += ["-n", "auto", "--maxprocesses", "12", "--dist", "worksteal"]
    limit = None if math.isinf(seconds) else seconds
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        output, passed = done.stdout + done.stderr, done.returncode == 0
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else ""
        output, passed = f"{output}\nstopped after {seconds:.0f} s", False
    lines = output.strip().splitlines() or ["no output"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"passed": passed, "summary": lines[-1], "failed": failed, "seconds": time.monotonic() - before}


def timed_run(plan: Plan, path: Path, say: Callable[[str], None]) -> Results:
    """Measure until the plan's seconds are spent. Whatever happens, what was measured is in the file, and returned."""
    deadline = time.monotonic() + plan.seconds
    ledger = Ledger(path, plan.resume)
    results = ledger.results
    reached: set[str] = set()
    try:
        if plan.tests and "tests" not in results:
            say("running the tests on the GPU")
            results["tests"] = run_tests(TESTS_SHARE * plan.seconds)
            say(results["tests"]["summary"])
        _measure(plan, ledger, reached, deadline, say)
    except KeyboardInterrupt:
        results["stopped"] = "interrupted"
    except measure.Stopped as error:
        results["stopped"] = f"{GPU_LOST}: {error}"
    except Exception as error:
        results["stopped"] = f"{type(error).__name__}: {error}"
    finally:
        results["unreached"] = [str(task) for task in plan.tasks() if str(task) not in reached]
        results["clocks afterwards"] = {k: v for k, v in environment.gpu().items() if "as read" in k}
        ledger.close()
    return results


def _measure(plan: Plan, ledger: Ledger, reached: set[str], deadline: float, say: Callable[[str], None]) -> None:
    results, chosen, tasks = ledger.results, plan.chosen(), plan.tasks()
    results["contenders"] = {contender.name: contender.status() for contender in chosen}
    present = [contender for contender in chosen if not contender.missing()]
    timer = measure.CudaTimer()
    results["copy_gbps"] = measure.copy_bandwidth(timer)
    results["peak_gflops"] = environment.peak_gflops()
    say(f"copy bandwidth {results['copy_gbps']:.0f} GB/s")
    known = {(task_name(record), record["contender"]) for record in results["records"] + results["steps"]}
    with ExitStack() as scopes:
        for contender in present:
            scopes.enter_context(contender.scope())
        for number, task in enumerate(tasks, 1):
            if time.monotonic() > deadline:
                break
            kind = "records" if isinstance(task, Point) else "steps"
            new = [contender for contender in present if (str(task), contender.name) not in known]
            ledger.begin(str(task))
            try:
                records = _lost(task, new) if ledger.lost == str(task) else _records(task, new, timer, plan)
            except measure.Stopped as stopped:
                ledger.add(stopped.records, kind)
                reached.add(str(task))
                raise
            ledger.add(records, kind)
            reached.add(str(task))
            results["choices"] = chosen_so_far(gpu_of(torch.device(timer.device)).name)
            if records:
                say(f"[{number}/{len(tasks)}] {task}: {_line(records)}")


def task_name(record: Record) -> str:
    """What the task is called that gave a record: str() of a point or a model."""
    if "model" in record:
        return f"step {record['dtype']} {record['model']}"
    layout = "" if record["layout"] == "contiguous" else f" {record['layout']}"
    return f"{record['op']} {record['mode']} {record['dtype']} {'x'.join(map(str, record['shape']))}{layout}"


def _records(task: Task, contenders: Sequence[Contender], timer: measure.Timer, plan: Plan) -> list[Record]:
    """Of every contender, but for those that it would take too long to compile."""
    timed = [contender for contender in contenders if plan.has_time_for(contender, task)]
    skipped = [contender for contender in contenders if contender not in timed]
    if isinstance(task, Point):
        records = measure.measure_point(task, timed, timer) if timed else []
    else:
        records = models.measure_step(task, {contender.name for contender in timed}, timer)
        skipped = [contender for contender in skipped if contender.name in models.WAYS]
    return records + _not_timed(task, skipped, "skipped", COMPILED)


def _lost(task: Task, contenders: Sequence[Contender]) -> list[Record]:
    return _not_timed(task, contenders, "error", NOT_SURVIVED)


def _not_timed(task: Task, contenders: Sequence[Contender], status: str, message: str) -> list[Record]:
    about = {**task.describe(), "status": status, "message": message}
    return [{**about, "contender": contender.name} for contender in contenders]


def _line(records: Sequence[Record]) -> str:
    def shown(record: Record) -> str:
        if record["status"] != "ok":
            return str(record["status"])
        return f"{record['gbps']:.0f} GB/s" if "gbps" in record else f"{record['median_us'] / 1e3:.2f} ms"

    return ", ".join(f"{record['contender']} {shown(record)}" for record in records if record["status"] != "skipped")
