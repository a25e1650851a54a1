"""The command line's options, and the points and plan that follow from them."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from perf import workloads
from perf.ops import OPS
from perf.points import BOTH, ITEMSIZE, MODES, PASSES, Point, Workload
from perf.records import Refused

if TYPE_CHECKING:  # its imports read TRITON_INTERPRET, which a verb may set first
    from perf.sweep import Plan

STEP = "step"
SHORT = {"fwd": "forward", "bwd": "backward", "fwd_bwd": BOTH}
QUICK_SECONDS = 420.0
OUT = Path("perf-report")
FAIL_BELOW = 0.95
BLOCKS = (1, 2, 4, 8)
"""Numbers of blocks of clusters that run on every GPU that has clusters."""
EXAMPLE = '[{"shape": [16384, 4096]}, {"shape": [32, 64, 56, 56], "layout": "channels_last"}]'


def several(known: Sequence[str], short: dict[str, str] | None = None) -> Callable[[str], tuple[str, ...]]:
    """Returns a parser of lists with commas between names that are known, or short for some."""
    by_name = {name: name for name in known} | (short or {})

    def names(text: str) -> tuple[str, ...]:
        chosen = tuple(by_name.get(name.strip(), "") for name in text.split(","))
        if not all(chosen):
            listed = ", ".join(dict.fromkeys((*(short or {}), *known)))
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {listed}")
        return tuple(dict.fromkeys(chosen))

    return names


def shapes(text: str) -> str | list[Workload]:
    if text in ("quick", "full"):
        return text
    try:
        return workloads.read(Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; or choose quick or full") from error


def seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time to measure in")
    return value


def parents() -> tuple[argparse.ArgumentParser, ...]:
    """Returns groups of options that several verbs share: the folder, points, timing, and how records are printed."""
    folder, points, timing, lines = (argparse.ArgumentParser(add_help=False) for _ in range(4))
    folder.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="folder to write (default: %(default)s)")
    ops, dtypes = tuple(OPS), tuple(ITEMSIZE)
    text = f"ops, of {', '.join(ops)} (default: all)"
    points.add_argument("--op", type=several(ops), default=ops, metavar="OP,...", help=text)
    text = "of fwd, bwd, fwd_bwd (both in one), and step: training steps of whole models"
    points.add_argument("--mode", type=several((*PASSES, STEP), SHORT), metavar="MODE,...", help=text)
    text = f"of {', '.join(dtypes)} (default: bf16,fp32)"
    points.add_argument("--dtype", type=several(dtypes), default=("bf16", "fp32"), metavar="DTYPE,...", help=text)
    text = f"a few, all, or those of a JSON file, a list such as {EXAMPLE} (default: quick)"
    points.add_argument("--shapes", type=shapes, default="quick", metavar="quick|full|FILE", help=text)
    text = f"time for measuring (default: {QUICK_SECONDS:g} for quick shapes, else no limit)"
    timing.add_argument("--seconds", type=seconds, help=text)
    timing.add_argument("--contenders", metavar="NAME,...", help="whom to time (default: all that are installed)")
    timing.add_argument("--tests", action="store_true", help="first run the library's tests on the GPU")
    timing.add_argument("--resume", action="store_true", help="go on with the run that DIR holds")
    lines.add_argument("--lines", action="store_true", help="one JSON record a line, as results files have them")
    return folder, points, timing, lines


def choose_inspected(part: argparse.ArgumentParser, compiled: bool) -> None:
    """Adds options that narrow the points that need no GPU, and the targets that they are compiled for."""
    part.add_argument("--points", type=int, default=None, help="only the first so many points")
    choose_blocks(part, default=None if compiled else 1)
    if compiled:
        part.add_argument("--target", action="append", help="only for this GPU, such as sm_90; may be repeated")
        part.add_argument("--every-config", action="store_true", help="all that a search would try, not the first")


def choose_blocks(part: argparse._ActionsContainer, default: int | None = 1) -> None:
    """Adds the blocks of clusters that an assumed GPU has; None: as many as this version of Triton compiles."""
    text = f"assume clusters of up to this many blocks, on GPUs that have them (default: {default or 'as Triton has'})"
    part.add_argument("--blocks", type=int, choices=BLOCKS, default=default, help=text)


def is_quick(args: argparse.Namespace) -> bool:
    return bool(args.shapes == "quick")


def modes_of(args: argparse.Namespace) -> tuple[str, ...]:
    """Returns the modes that were chosen, or else each pass and the models' steps, and for all shapes both in one."""
    if args.mode is not None:
        return tuple(args.mode)
    return (*(MODES if is_quick(args) else PASSES), STEP)


def inspected_of(args: argparse.Namespace, inspected: Callable[[bool], list[Point]]) -> list[Point]:
    """Returns points to be counted or compiled: of `inspected`'s own shapes, few or all, or of a file's."""
    modes = MODES if args.mode is None else args.mode
    if isinstance(args.shapes, str):
        points = [
            point
            for point in inspected(args.shapes == "full")
            if point.op in args.op and point.mode in modes and point.dtype in args.dtype
        ]
    else:
        points = workloads.points(args.dtype, False, args.op, [m for m in modes if m in MODES], args.shapes)
    return points[: args.points]


def contenders_of(text: str) -> tuple[str, ...]:
    """Returns contenders by their names without spaces and commas; raises Refused for an unknown one."""
    from perf.contenders import CONTENDERS

    known = {re.sub(r"[\s,]+", "-", contender.name): contender.name for contender in CONTENDERS}
    try:
        return tuple(known[name] for name in several(tuple(known))(text))
    except argparse.ArgumentTypeError as error:
        raise Refused(f"--contenders {error}") from error


def points_of(args: argparse.Namespace) -> list[Point]:
    modes = [mode for mode in modes_of(args) if mode != STEP]
    chosen = None if isinstance(args.shapes, str) else args.shapes
    return workloads.points(args.dtype, is_quick(args), args.op, modes, chosen)


def plan_of(args: argparse.Namespace) -> Plan:
    from perf import models
    from perf.sweep import Plan

    steps, quick = STEP in modes_of(args), is_quick(args)
    limit = QUICK_SECONDS if quick else math.inf
    return Plan(
        points_of(args),
        [model for model in models.MODELS if steps and set(model.ops) & set(args.op)],
        contenders_of(args.contenders) if args.contenders else None,
        quick,
        limit if args.seconds is None else args.seconds,
        args.tests,
    )
