"""The search for the config of each kernel and key that is fastest with a cold L2, over many workloads.

A choice's key holds no number of rows or samples, so that one choice serves many workloads. Every config of a key's
space is timed on each of them, and the one with the least geometric mean of its times, each over the best time on that
workload, is chosen. A config that fails on one workload, or disagrees with fp64 there, is out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

import triton_norm
from perf.calls import Candidate, Inputs, bind, candidate, make_inputs
from perf.gate import TOLERANCE, errors, expected, outputs, verdict
from perf.measure import Stopped, Timer, time_interleaved
from perf.ops import triton_norm_functions
from perf.points import Point
from perf.records import in_a_line
from triton_norm import launch, trials
from triton_norm.tuning.choices import begun_anew, choose_only
from triton_norm.tuning.configs import Config, Space

Key = tuple[str, str]
"""A kernel, and the key of its choice."""
Choices = Mapping[Key, Config]

# All configs of one key are timed this long on one workload.
SECONDS = 0.12


def text(config: Config) -> str:
    return " ".join(f"{name}={value}" for name, value in config.keywords.items())


@dataclass
class Trial:
    """Times and failures of each config for one key. The space is that of the first workload that has the key."""

    space: Space
    times: dict[str, dict[Config, float]] = field(default_factory=dict)  # µs, by workload
    failures: dict[Config, tuple[str, str]] = field(default_factory=dict)  # status and message
    left_out: str = ""

    def fail(self, config: Config, status: str, message: str) -> None:
        self.failures.setdefault(config, (status, message))

    @property
    def working(self) -> list[Config]:
        return [config for config in self.space.configs if config not in self.failures]

    @property
    def ratios(self) -> dict[Config, float]:
        """Returns, for every config that works, the geometric mean of its times over the best time on each
        workload."""
        working = self.working
        if not (self.times and working):
            return {}
        best = [min(times[config] for config in working) for times in self.times.values()]

        def ratio(config: Config) -> float:
            each = zip(self.times.values(), best, strict=True)
            return math.exp(sum(math.log(times[config] / least) for times, least in each) / len(best))

        return {config: ratio(config) for config in working}

    @property
    def choice(self) -> Config | None:
        ratios = {} if self.left_out else self.ratios
        return min(ratios, key=ratios.__getitem__, default=None)

    def describe(self) -> dict[str, Any]:
        choice, ratios = self.choice, self.ratios
        reason = self.left_out or ("" if self.working else "no config works on every workload")
        configs = []
        for config in self.space.configs:
            status, message = self.failures.get(config, ("ok", "") if self.times else ("not timed", ""))
            outcome = {"config": config.keywords, "ratio": ratios.get(config), "status": status, "message": message}
            configs.append(outcome)
        return {
            "kernel": self.space.kernel,
            "key": self.space.key,
            "chosen": None if choice is None else choice.keywords,
            "left_out": reason,
            "configs": configs,
            "workloads": [
                {"point": point, "us": [times.get(config) for config in self.space.configs]}
                for point, times in self.times.items()
            ],
        }


class Again:
    """Something that a call did with the config `used`, and that can be done again with any of its space."""

    used: Config

    def zero(self) -> None:
        """Zeroes the memory in which zeros are expected, if any."""

    def start(self, config: Config) -> None:
        raise NotImplementedError

    def candidate(self, name: str, config: Config) -> Candidate:
        return Candidate(name, self.zero, lambda _: self.start(config))


class Launch(Again):
    """One launch of a call: see `launch.search`."""

    def __init__(
        self,
        kernel: Any,
        n_programs: Callable[[Any], int],
        arguments: Sequence[Any],
        constants: Mapping[str, Any],
        used: Config,
    ) -> None:
        by_name = dict(zip(kernel.arg_names, arguments, strict=False))
        for name in launch.MOVED:
            if by_name.get(name) is not None:
                by_name[name] = by_name[name].clone()
        self.used = used
        self._kernel, self._n_programs, self._constants = kernel, n_programs, constants
        self._arguments, self._sync = list(by_name.values()), by_name.get("sync_ptr")

    def zero(self) -> None:
        if self._sync is not None:
            self._sync.zero_()

    def start(self, config: Config) -> None:
        count = self._n_programs(config.keywords)
        launch.start(self._kernel, count, self._arguments, self._constants, config)


class Way(Again):
    """One of the ways to run a call, which makes its own workspace: see `trials.fastest`."""

    def __init__(self, runs: Mapping[Config, Callable[[], None]], used: Config) -> None:
        self.used, self._runs = used, runs

    def start(self, config: Config) -> None:
        self._runs[config]()


class Tuner:
    """Times what the calls of points launch. `trials`: by kernel and key; `keys`: those of each point so far."""

    def __init__(self, timer: Timer, gpu: str) -> None:
        self.trials: dict[Key, Trial] = {}
        self.keys: dict[Point, list[Key]] = {}
        self._timer, self._gpu = timer, gpu
        self._point: Point | None = None
        self._launches: dict[Key, Again] = {}
        self._timed: set[tuple[Any, ...]] = set()

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Lets the library know no choice but those that are in force here, and ask for every other one."""
        search = mock.patch.object(launch, "search", self._search)
        fastest = mock.patch.object(trials, "fastest", self._fastest)
        with triton_norm.backend("triton"), begun_anew(folder=None), search, fastest:
            yield

    @property
    def choices(self) -> dict[Key, Config]:
        chosen = ((key, trial.choice) for key, trial in self.trials.items())
        return {key: choice for key, choice in chosen if choice is not None}

    def _search(
        self,
        kernel: Any,
        space: Space,
        n_programs: Callable[[Any], int],
        arguments: Sequence[Any],
        constants: Mapping[str, Any],
    ) -> Config:
        """Returns the best config so far that works for this launch. It is timed after the call: a backward
        pass runs in a thread of torch's, where nothing interrupts it."""
        return self._first(space, lambda config: Launch(kernel, n_programs, arguments, constants, config))

    def _fastest(self, space: Space, kernel: Any, gpu: str, runs: Mapping[Config, Callable[[], None]]) -> Config:
        """Returns the best way so far that works, as `_search` does."""
        return self._first(space, lambda way: Way(runs, way))

    def _first(self, space: Space, make: Callable[[Config], Again]) -> Config:
        key = space.kernel, space.key
        trial = self.trials.setdefault(key, Trial(space))
        best = trial.choice
        for config in dict.fromkeys([*([] if best is None else [best]), *trial.working]):
            made = make(config)
            if self._works(trial, made, config):
                self._launches.setdefault(key, made)
                return config
        raise RuntimeError(f"no config of {space.kernel} works for {space.key or 'any columns'}")

    def _works(self, trial: Trial, made: Again, config: Config) -> bool:
        made.zero()
        try:
            made.start(config)
            self._timer.synchronize()
        except Exception as error:
            trial.fail(config, "error", f"{self._point}: {in_a_line(error)}")
            self._timer.synchronize()  # raises where the GPU no longer answers
            return False
        finally:
            made.zero()
        return True

    def measure(self, point: Point) -> Iterator[str]:
        """Times and checks the launches of this point's call that are new for its workload. Yields a line for
        each."""
        self._point, self._launches = point, {}
        inputs = make_inputs(point, self._timer.device)
        exact = expected(point, inputs)
        choose_only(self._gpu, {})
        outputs(point, self._call(point, inputs), inputs)
        self._timer.synchronize()
        launches = self._launches
        measured_call = point.op, point.dtype, point.workload
        new = [key for key in launches if (*measured_call, *key) not in self._timed]
        times = {key: self._time(key, launches[key]) for key in new}
        self._check_each(point, inputs, exact, {key: made.used for key, made in launches.items()}, times)
        self.keys[point] = list(launches)
        for key in new:
            self.trials[key].times[str(point)] = times[key]
            self._timed.add((*measured_call, *key))
            yield self._line(key, times[key])

    def _call(self, point: Point, inputs: Inputs) -> Candidate:
        forward = bind(point, triton_norm_functions(), inputs)
        assert forward is not None
        return candidate("triton_norm", point, forward, inputs)

    def _time(self, key: Key, made: Again) -> dict[Config, float]:
        trial = self.trials[key]
        able = [config for config in trial.working if self._works(trial, made, config)]
        if not able:
            raise RuntimeError(f"no config of {key[0]} works for {key[1] or 'any columns'}")
        entries = [[made.candidate(f"{self._point}: {key[0]} {text(config)}", config)] for config in able]
        timings = time_interleaved(entries, self._timer, SECONDS)
        made.zero()
        return {config: timing["median_us"] for config, timing in zip(able, timings, strict=True)}

    def check(self, point: Point, inputs: Inputs, exact: dict[str, torch.Tensor], choices: Choices) -> str:
        """Returns why the point's results are wrong with these choices, or an empty string. Memory that a
        kernel leaves unwritten is NaN, not the results of an earlier call."""
        choose_only(self._gpu, choices)
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True)  # fills new memory
        try:
            computed = outputs(point, self._call(point, inputs), inputs)
            return verdict(errors(computed, exact), TOLERANCE[point.dtype])
        except Exception as error:
            self._timer.synchronize()
            return in_a_line(error)
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])

    def _check_each(
        self,
        point: Point,
        inputs: Inputs,
        exact: dict[str, torch.Tensor],
        used: dict[Key, Config],
        times: dict[Key, dict[Config, float]],
    ) -> None:
        """Puts each config that was timed in its place in a call that is right, so that the blame is its own."""
        right, message = used, self.check(point, inputs, exact, used)
        if message:
            blamed = self._to_blame(point, inputs, exact, used)
            if blamed is None:
                self._leave_out(f"{point} is wrong with every config: {message}")
                raise RuntimeError(f"wrong with every config: {message}")
            key, other = blamed
            self.trials[key].fail(used[key], "wrong", f"{point}: {message}")
            right = {**used, key: other}
        for key, timed in times.items():
            for config in timed:
                if config != right[key] and config in self.trials[key].working:
                    message = self.check(point, inputs, exact, {**right, key: config})
                    if message:
                        self.trials[key].fail(config, "wrong", f"{point}: {message}")

    def _to_blame(
        self, point: Point, inputs: Inputs, exact: dict[str, torch.Tensor], used: dict[Key, Config]
    ) -> tuple[Key, Config] | None:
        """Returns the one key whose config makes a call wrong, and another one that makes it right."""
        for key in used:
            for config in self.trials[key].working:
                if config != used[key] and not self.check(point, inputs, exact, {**used, key: config}):
                    return key, config
        return None

    def _line(self, key: Key, times: dict[Config, float]) -> str:
        trial = self.trials[key]
        fastest = min(times, key=times.__getitem__)
        choice = trial.choice
        chosen = "nothing is chosen" if choice is None else f"chosen {text(choice)}"
        out = f", {len(trial.failures)} out" if trial.failures else ""
        us = f"{times[fastest]:.1f} to {max(times.values()):.1f} µs with {len(times)} configs{out}"
        return f"{key[0]} ({key[1] or 'one key'}): {us}; {chosen}"

    def confirm(self, point: Point) -> bool:
        """Returns whether the point could be launched. Leaves its keys out where it is wrong with all choices
        in force, and raises an error."""
        self._point, self._launches = point, {}
        if not all(self.trials[key].working for key in self.keys[point]):
            return False
        inputs = make_inputs(point, self._timer.device)
        message = self.check(point, inputs, expected(point, inputs), self.choices)
        if message:
            self._leave_out(f"{point} is wrong with all choices in force: {message}")
            raise RuntimeError(f"wrong with all choices in force: {message}")
        return True

    def require_answer(self, problem: str) -> None:
        """Raises where the GPU no longer answers. The library is to make none of the present launches then."""
        try:
            self._timer.synchronize()
        except Exception as error:
            self._leave_out(problem)
            raise Stopped([], error) from error

    def _leave_out(self, reason: str) -> None:
        """Leaves out all keys that the present point launches."""
        known = self.keys.get(self._point, []) if self._point else []
        for key in {*known, *self._launches}:
            self.trials[key].left_out = reason
