"""What a run is to time, by what the command line says. Imports what is timed, which reads TRITON_INTERPRET."""

from __future__ import annotations

import argparse

from perf import models, options, workloads
from perf.contenders import CONTENDERS
from perf.points import Point
from perf.sweep import Plan, Task


def contenders_of(text: str) -> tuple[str, ...]:
    """Contenders by their names as `options.slug` has them; ValueError for one that is none."""
    known = {options.slug(contender.name): contender.name for contender in CONTENDERS}
    try:
        return tuple(known[name] for name in options.several(tuple(known))(text))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--contenders {error}") from error


def points_of(given: argparse.Namespace) -> list[Point]:
    modes = [mode for mode in options.modes_of(given) if mode != options.STEP]
    chosen = None if isinstance(given.shapes, str) else given.shapes
    return workloads.points(given.dtype, options.is_quick(given), given.op, modes, chosen)


def plan_of(given: argparse.Namespace) -> Plan:
    steps = options.STEP in options.modes_of(given)
    timed = [model for model in models.MODELS if steps and set(model.ops) & set(given.op)]
    return Plan(
        points_of(given),
        timed,
        contenders_of(given.contenders) if given.contenders else None,
        options.is_quick(given),
        options.seconds_of(given),
        given.tests,
        given.resume,
    )


def line(task: Task) -> str:
    if isinstance(task, Point):
        return f"{task}  {task.workload.source}  floor {task.floor_bytes / 2**20:.2f} MiB"
    return f"{task}  {task.source}"
