"""Makes a timed run: the tests, if chosen, then every point that the time allows. Each result is stored at once."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perf import environment, measure, models
from perf.contenders import CONTENDERS, Contender
from perf.models import Model
from perf.points import Point
from perf.records import ResultsFile, Run, task_name
from triton_norm.tuning.choices import chosen_so_far
from triton_norm.tuning.limits import gpu_of

ROOT = Path(__file__).resolve().parent.parent
TESTS_SHARE = 0.55
GPU_LOST = "the GPU no longer answers"
NOT_SURVIVED = "the process that measured it did not survive"
COMPILED = "compiled per shape: a quick run times it on a few shapes in training only, or if it searches, only by name"

Task = Point | Model


@dataclass(frozen=True)
class Plan:
    """A choice of tasks, and of contenders by their names, or all."""

    points: Sequence[Point]
    models: Sequence[Model] = ()
    contenders: Sequence[str] | None = None
    quick: bool = True
    seconds: float = math.inf
    tests: bool = False

    def tasks(self) -> list[Task]:
        """Returns landmarks, models, then other points: when time runs out, a picture of the whole is done."""
        landmarks = [point for point in self.points if point.workload.landmark]
        return [*landmarks, *self.models, *(point for point in self.points if not point.workload.landmark)]

    def has_time_for(self, contender: Contender, task: Task) -> bool:
        """Returns whether to time it: compiling each shape anew takes seconds, spent on landmarks alone in a
        quick run."""
        if not self.quick or not contender.compiles:
            return True
        return task.is_landmark and (self.contenders is not None or not contender.searches)

    def chosen(self) -> list[Contender]:
        return [c for c in CONTENDERS if self.contenders is None or c.name in self.contenders]


def run_tests(seconds: float) -> dict[str, Any]:
    """Runs the library's own tests on this machine. Returns their last line, and whether they passed."""
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


def timed_run(plan: Plan, file: ResultsFile, say: Callable[[str], None]) -> Run:
    """Measures until the plan's seconds are spent. Whatever happens, the file has all that was measured."""
    deadline = time.monotonic() + plan.seconds
    run = file.results.run
    reached: set[str] = set()
    ends: dict[str, Any] = {}
    try:
        if plan.tests and "tests" not in run:
            say("running the tests on the GPU")
            file.add("facts", {"tests": run_tests(TESTS_SHARE * plan.seconds)})
            say(run["tests"]["summary"])
        _measure(plan, file, reached, deadline, say)
    except KeyboardInterrupt:
        ends["stopped"] = "interrupted"
    except measure.Stopped as error:
        ends["stopped"] = f"{GPU_LOST}: {error}"
    except Exception as error:
        ends["stopped"] = f"{type(error).__name__}: {error}"
    finally:
        ends["unreached"] = [str(task) for task in plan.tasks() if str(task) not in reached]
        ends["clocks_afterwards"] = {k: v for k, v in environment.gpu().items() if "as read" in k}
        file.add("facts", ends | {"measuring": None})
    return run


def _measure(plan: Plan, file: ResultsFile, reached: set[str], deadline: float, say: Callable[[str], None]) -> None:
    run, chosen, tasks = file.results.run, plan.chosen(), plan.tasks()
    present = [contender for contender in chosen if not contender.missing()]
    timer = measure.CudaTimer()
    facts = {
        "contenders": {contender.name: contender.status() for contender in chosen},
        "copy_gbps": measure.copy_bandwidth(timer),
    }
    say(f"copy bandwidth {facts['copy_gbps']:.0f} GB/s")
    lost = run.get("measuring")  # by a process that did not survive it
    file.add("facts", facts)
    timed: list[Mapping[str, Any]] = [*run["records"], *run["steps"]]
    known = {(task_name(record), record["contender"]) for record in timed}
    gpu = gpu_of(torch.device(timer.device)).name
    with ExitStack() as scopes:
        scopes.callback(lambda: file.add("facts", {"choices": chosen_so_far(gpu)}))
        for contender in present:
            scopes.enter_context(contender.scope())
        for number, task in enumerate(tasks, 1):
            if time.monotonic() > deadline:
                break
            kind = "timing" if isinstance(task, Point) else "step"
            new = [contender for contender in present if (str(task), contender.name) not in known]
            if new:
                file.add("facts", {"measuring": str(task)})
            try:
                if lost == str(task):
                    records = _not_timed(task, new, "error", NOT_SURVIVED)
                else:
                    records = _records(task, new, timer, plan)
            except measure.Stopped as stopped:
                file.add(kind, *stopped.records)
                reached.add(str(task))
                raise
            file.add(kind, *records)
            reached.add(str(task))
            if records:
                say(f"[{number}/{len(tasks)}] {task}: {_line(records)}")


def _records(task: Task, contenders: Sequence[Contender], timer: measure.Timer, plan: Plan) -> list[Any]:
    """Returns records of every contender, without figures of those that would take too long to compile."""
    timed = [contender for contender in contenders if plan.has_time_for(contender, task)]
    skipped = [contender for contender in contenders if contender not in timed]
    if isinstance(task, Point):
        records: list[Any] = list(measure.measure_point(task, timed, timer)) if timed else []
    else:
        records = list(models.measure_step(task, {contender.name for contender in timed}, timer))
        skipped = [contender for contender in skipped if contender.name in models.WAYS]
    return records + _not_timed(task, skipped, "skipped", COMPILED)


def _not_timed(task: Task, contenders: Sequence[Contender], status: str, message: str) -> list[Any]:
    outcome = {**task.describe(), "status": status, "message": message}
    return [{**outcome, "contender": contender.name} for contender in contenders]


def _line(records: Sequence[Mapping[str, Any]]) -> str:
    def shown(record: Mapping[str, Any]) -> str:
        if record["status"] != "ok":
            return str(record["status"])
        return f"{record['gbps']:.0f} GB/s" if "gbps" in record else f"{record['median_us'] / 1e3:.2f} ms"

    return ", ".join(f"{record['contender']} {shown(record)}" for record in records if record["status"] != "skipped")
