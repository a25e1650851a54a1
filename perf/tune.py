"""Finds the launches that are fastest on this machine's GPU, and writes them where the library looks for them."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from perf import environment
from perf.measure import CudaTimer, Timer
from perf.points import Point
from perf.records import Refused, in_a_line
from perf.tuner import Tuner
from triton_norm.tuning import choices as tuned_choices
from triton_norm.tuning.configs import config
from triton_norm.tuning.limits import INTERPRETED, gpu_of

Results = dict[str, Any]
Say = Callable[[str], None]

# The rest of the time is for all choices together.
MEASURING_SHARE = 0.9


def _replace(path: Path, content: Results, sort_keys: bool) -> None:
    """Writes another file and renames it, so that a reader finds a whole one at every moment."""
    partial = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.part")
    try:
        partial.write_text(json.dumps(content, indent=1, sort_keys=sort_keys) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class TunedFile:
    """`tuned/<gpu>.json`. Choices of keys that are not reached stay, except in a `fresh` file."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self.path, self._before = path, Results()
        if not fresh and path.exists():
            self._before = self._read()

    def _read(self) -> Results:
        try:
            stored: Results = json.loads(self.path.read_text())["choices"]
            for keys in stored.values():
                for choice in keys.values():
                    config(**choice)
            return stored
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{self.path} holds no choices that could be kept: {in_a_line(error)}"
            raise Refused(f"{reason}. Ask for a fresh file to replace it.") from error

    def save(self, results: Results, tuner: Tuner) -> None:
        """Writes the choices so far, with the environment in `results`; nothing before there is one."""
        merged = {kernel: dict(keys) for kernel, keys in self._before.items()}
        for kernel, key in tuner.trials:
            merged.get(kernel, {}).pop(key, None)
        for (kernel, key), choice in tuner.choices.items():
            merged.setdefault(kernel, {})[key] = choice.keywords
        by_kernel = {kernel: keys for kernel, keys in merged.items() if keys}
        if by_kernel or self.path.exists():
            _replace(self.path, {"environment": results["environment"], "choices": by_kernel}, sort_keys=True)


def _device(timer: Timer | None) -> tuple[Timer, str]:
    """Returns the timer and the name of the GPU; raises Refused where there is nothing to search."""
    if timer is None:
        if INTERPRETED or not environment.has_gpu():
            reason = "Triton's interpreter is on" if INTERPRETED else "this machine has no GPU"
            raise Refused(f"{reason}: there is nothing to search")
        timer = CudaTimer()
    gpu = gpu_of(torch.device(timer.device)).name
    if gpu is None:
        raise Refused(f"launches on {timer.device} are not searched for")
    return timer, gpu


def run(
    points: Sequence[Point],
    folder: Path,
    out: Path,
    seconds: float,
    say: Say,
    timer: Timer | None = None,
    fresh: bool = False,
) -> Results:
    """Measures until `seconds` are spent, the points in their order.

    Whatever happens, the choices that were found are in `folder`/<gpu>.json, and all that was measured is in
    `out`/tune.json, which is returned.

    Raises:
        Refused: before anything is measured, where there is nothing to search, or the files can't be kept.
    """
    began = time.monotonic()
    timer, gpu = _device(timer)
    tuned = TunedFile(folder / tuned_choices.file_name(gpu), fresh)
    results: Results = {"environment": environment.describe(), "file": tuned.path.name, "keys": [], "problems": []}
    results |= {"reached": 0, "confirmed": 0}
    tuner = Tuner(timer, gpu)

    def save() -> None:
        results["keys"] = [trial.describe() for trial in tuner.trials.values()]
        _replace(out / "tune.json", results, sort_keys=False)
        tuned.save(results, tuner)

    try:
        for written in (folder, out):
            written.mkdir(parents=True, exist_ok=True)
        _replace(out / "tune.json", results, sort_keys=False)
    except OSError as error:
        raise Refused(f"nothing can be written to {folder} or {out}: {in_a_line(error)}") from error
    try:
        with tuner.scope():
            for reached, point in enumerate(points):
                if time.monotonic() > began + MEASURING_SHARE * seconds:
                    break
                say(f"[{reached + 1}/{len(points)}] {point}")
                with _noted(point, tuner, results, say):
                    for line in tuner.measure(point):
                        say(f"  {line}")
                results["reached"] = reached + 1
                save()
            _confirm(tuner, results, began + seconds, say)
    except KeyboardInterrupt:
        results["stopped"] = "interrupted"
    except Exception as error:
        results["stopped"] = in_a_line(error)
    finally:
        results["unreached"] = [str(point) for point in points[results["reached"] :]]
        save()
    tuned_choices.read_again()
    say(_summary(results, tuner, tuned.path))
    return results


@contextmanager
def _noted(point: Point, tuner: Tuner, results: Results, say: Say) -> Iterator[None]:
    """Notes an error as a problem of the point; a GPU that no longer answers ends the run."""
    try:
        yield
    except Exception as error:
        problem = f"{point}: {in_a_line(error)}"
        results["problems"].append(problem)
        say(f"  {problem}")
        tuner.require_answer(problem)


def _confirm(tuner: Tuner, results: Results, deadline: float, say: Say) -> None:
    """Checks every point once more with all choices together, as the library will launch it."""
    say(f"{len(tuner.choices)} choices; checking every point with all of them in force")
    for point in tuner.keys:
        if time.monotonic() > deadline:
            return
        with _noted(point, tuner, results, say):
            results["confirmed"] += tuner.confirm(point)


def _summary(results: Results, tuner: Tuner, path: Path) -> str:
    counts = {
        f"choices in {path}": len(tuner.choices),
        "keys without a choice": len(tuner.trials) - len(tuner.choices),
        "points not reached": len(results["unreached"]),
        "problems": len(results["problems"]),
    }
    parts = [f"{name}: {count}" for name, count in counts.items() if count] or ["nothing was chosen"]
    return ", ".join([*parts, f"stopped: {results['stopped']}"] if "stopped" in results else parts)
