"""What the command line takes, and what of it the points follow from."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from perf import workloads
from perf.points import BOTH, FAMILY, ITEMSIZE, MODES, PASSES, Point, Workload

Do = Callable[[argparse.Namespace], int]

STEP = "step"
SHORT = {"fwd": "forward", "bwd": "backward", "fwd_bwd": BOTH}
QUICK_SECONDS = 420.0
OUT, TIMING = Path("perf-report"), "timing.json"
FAIL_BELOW = 0.95
EXAMPLE = '[{"shape": [16384, 4096]}, {"shape": [32, 64, 56, 56], "layout": "channels_last"}]'


def several(known: Sequence[str], short: dict[str, str] | None = None) -> Callable[[str], tuple[str, ...]]:
    """A list with commas between names that are known, or short for some."""
    by_name = {name: name for name in known} | (short or {})

    def names(text: str) -> tuple[str, ...]:
        found = tuple(by_name.get(name.strip(), "") for name in text.split(","))
        if not all(found):
            listed = ", ".join(dict.fromkeys((*(short or {}), *known)))
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {listed}")
        return tuple(dict.fromkeys(found))

    return names


def slug(contender: str) -> str:
    """A contender's name without spaces and commas, for a list with commas between names."""
    return re.sub(r"[\s,]+", "-", contender)


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


@dataclass(frozen=True)
class Parents:
    """Groups of options that several verbs share."""

    folder: argparse.ArgumentParser
    points: argparse.ArgumentParser
    timing: argparse.ArgumentParser
    lines: argparse.ArgumentParser


def parents() -> Parents:
    folder, points, timing, lines = (argparse.ArgumentParser(add_help=False) for _ in range(4))
    folder.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="folder to write (default: %(default)s)")
    ops, dtypes = tuple(FAMILY), tuple(ITEMSIZE)
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
    lines.add_argument("--lines", action="store_true", help="one JSON record a line")
    return Parents(folder, points, timing, lines)


def choose_inspected(part: argparse.ArgumentParser, compiled: bool) -> None:
    """Adds what narrows the points that are looked at without a GPU, and what they are compiled for."""
    part.add_argument("--points", type=int, default=None, help="only the first so many points")
    if compiled:
        part.add_argument("--target", action="append", help="only for this GPU, such as sm_90; may be repeated")
        part.add_argument("--every-config", action="store_true", help="all that a search would try, not the first")


def is_quick(options: argparse.Namespace) -> bool:
    return bool(options.shapes == "quick")


def seconds_of(options: argparse.Namespace) -> float:
    if options.seconds is not None:
        return float(options.seconds)
    return QUICK_SECONDS if is_quick(options) else math.inf


def modes_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Without a choice: each pass apart and the models' steps, and beside quick shapes both passes together too."""
    if options.mode is not None:
        return tuple(options.mode)
    return (*(MODES if is_quick(options) else PASSES), STEP)


def inspected_of(options: argparse.Namespace, inspected: Callable[[bool], list[Point]]) -> list[Point]:
    """What is to be counted or compiled: of `inspected`'s own shapes, few or all, or of a file's."""
    modes = MODES if options.mode is None else options.mode
    if isinstance(options.shapes, str):
        found = [
            point
            for point in inspected(options.shapes == "full")
            if point.op in options.op and point.mode in modes and point.dtype in options.dtype
        ]
    else:
        found = workloads.points(options.dtype, False, options.op, [m for m in modes if m in MODES], options.shapes)
    return found[: options.points]
