"""The launches that are fastest on this machine's GPU, written where the library looks for them before it searches."""

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
from perf.findings import in_a_line
from perf.measure import CudaTimer, Timer
from perf.points import Point
from perf.tuner import Tuner
from triton_norm.tuning import choices as tuned_choices
from triton_norm.tuning.configs import config
from triton_norm.tuning.limits import INTERPRETED, gpu_of

Results = dict[str, Any]
Say = Callable[[str], None]

MEASURING_SHARE = 0.9  # of the time; the rest is for all choices together
SAVE_EVERY = 2.0


class CannotTune(OSError):
    """Why a run can't begin, in a sentence."""


def _replace(path: Path, content: Results, sort_keys: bool) -> None:
    """Whole at every moment, whoever else writes it: written beside, under a name of its own, and renamed."""
    partial = _beside(path)
    try:
        partial.write_text(json.dumps(content, indent=1, sort_keys=sort_keys) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}.{uuid.uuid4().hex}.part")


class TunedFile:
    """`tuned/<gpu>.json`. Choices of keys that are not reached now stay, unless a `fresh` file is asked for; what they
    were measured with stays in "kept_from"."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self.path, self._before, self._written = path, Results(), False
        if not fresh and path.exists():
            self._before = self._read()

    def _read(self) -> Results:
        try:
            found: Results = json.loads(self.path.read_text())
            for keys in found["choices"].values():
                for choice in keys.values():
                    config(**choice)
            return found
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{self.path} holds no choices that could be kept: {in_a_line(error)}"
            raise CannotTune(f"{reason}. Ask for a fresh file to replace it.") from error

    def save(self, found: Results, tuner: Tuner) -> None:
        """`found`: the results so far. Before there is a choice nothing is written."""
        choices = {
            (kernel, key): choice
            for kernel, keys in self._before.get("choices", {}).items()
            for key, choice in keys.items()
            if (kernel, key) not in tuner.trials
        }
        kept = [self._before.get("environment", {}), *self._before.get("kept_from", [])] if choices else []
        choices |= {key: config.keywords for key, config in tuner.choices.items()}
        if not choices and not self._before and not self._written:
            return
        by_kernel: dict[str, dict[str, Any]] = {}
        for (kernel, key), choice in choices.items():
            by_kernel.setdefault(kernel, {})[key] = choice
        content = {"environment": found["environment"], "choices": by_kernel}
        _replace(self.path, content | ({"kept_from": kept} if kept else {}), sort_keys=True)
        self._written = True


class _Ledger:
    """Both files of a run, at most every few seconds."""

    def __init__(self, tuned: TunedFile, path: Path, results: Results, tuner: Tuner) -> None:
        self._tuned, self._path, self.results, self._tuner = tuned, path, results, tuner
        self._saved = time.monotonic()

    def save(self, now: bool = False) -> None:
        if not now and time.monotonic() - self._saved < SAVE_EVERY:
            return
        self.results["keys"] = [trial.describe() for trial in self._tuner.trials.values()]
        _replace(self._path, self.results, sort_keys=False)
        self._tuned.save(self.results, self._tuner)
        self._saved = time.monotonic()


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = _beside(folder / "tune")
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise CannotTune(f"nothing can be written to {folder}: {in_a_line(error)}") from error


def run(
    points: Sequence[Point],
    folder: Path,
    out: Path,
    seconds: float,
    say: Say,
    timer: Timer | None = None,
    fresh: bool = False,
) -> Results:
    """Measures until `seconds` are spent, the points in their order. Whatever happens, the choices that were found are
    in `folder`/<gpu>.json, and all that was measured is in `out`/tune.json, which is returned. CannotTune is raised
    before anything is measured."""
    began = time.monotonic()
    if timer is None:
        if INTERPRETED or not environment.has_gpu():
            reason = "Triton's interpreter is on" if INTERPRETED else "this machine has no GPU"
            raise CannotTune(f"{reason}: there is nothing to search")
        timer = CudaTimer()
    gpu = gpu_of(torch.device(timer.device)).name
    if gpu is None:
        raise CannotTune(f"launches on {timer.device} are not searched for")
    for written in (folder, out):
        _require_writable(written)
    tuned = TunedFile(folder / tuned_choices.file_name(gpu), fresh)
    results: Results = {
        "kind": "tuning",
        "format": 1,
        "environment": environment.describe(),
        "file": tuned.path.name,
        "keys": [],
        "problems": [],
        "reached": 0,
        "confirmed": 0,
    }
    tuner = Tuner(timer, gpu)
    ledger = _Ledger(tuned, out / "tune.json", results, tuner)
    try:
        with tuner.scope():
            _measure(points, tuner, ledger, began + MEASURING_SHARE * seconds, say)
            _confirm(tuner, ledger, began + seconds, say)
    except KeyboardInterrupt:
        results["stopped"] = "interrupted"
    except Exception as error:
        results["stopped"] = in_a_line(error)
    finally:
        results["unreached"] = [str(point) for point in points[results["reached"] :]]
        ledger.save(now=True)
    tuned_choices.read_again()
    say(_summary(results, tuner, tuned.path))
    return results


@contextmanager
def _noted(point: Point, tuner: Tuner, results: Results, say: Say) -> Iterator[None]:
    """What fails for a point is written down; a GPU that no longer answers ends the run."""
    try:
        yield
    except Exception as error:
        problem = f"{point}: {in_a_line(error)}"
        results["problems"].append(problem)
        say(f"  {problem}")
        tuner.require_answer(problem)


def _measure(points: Sequence[Point], tuner: Tuner, ledger: _Ledger, deadline: float, say: Say) -> None:
    for reached, point in enumerate(points):
        if time.monotonic() > deadline:
            return
        say(f"[{reached + 1}/{len(points)}] {point}")
        with _noted(point, tuner, ledger.results, say):
            for line in tuner.measure(point):
                say(f"  {line}")
        ledger.results["reached"] = reached + 1
        ledger.save()


def _confirm(tuner: Tuner, ledger: _Ledger, deadline: float, say: Say) -> None:
    """Every point once more with all choices together, as the library will launch it."""
    say(f"{len(tuner.choices)} choices; checking every point with all of them in force")
    for point in tuner.keys:
        if time.monotonic() > deadline:
            return
        with _noted(point, tuner, ledger.results, say):
            ledger.results["confirmed"] += tuner.confirm(point)
        ledger.save()


def _summary(results: Results, tuner: Tuner, path: Path) -> str:
    parts = [f"choices in {path}: {len(tuner.choices)}" if tuner.choices else "nothing was chosen"]
    counts = {
        "keys without a choice": len(tuner.trials) - len(tuner.choices),
        "points not reached": len(results["unreached"]),
        "problems": len(results["problems"]),
    }
    parts += [f"{what}: {count}" for what, count in counts.items() if count]
    if "stopped" in results:
        parts.append(f"stopped: {results['stopped']}")
    return ", ".join(parts)
