"""Times calls on a GPU: none before it agrees with fp64, and each with a cold L2."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch._C._autograd import DeviceType

from perf.calls import Candidate, Inputs, bind, candidate, launches_noted, make_inputs
from perf.contenders import Contender
from perf.findings import OURS
from perf.gate import TOLERANCE, errors, expected, outputs, verdict
from perf.points import Point
from perf.records import Outcome, Spread, Timing, failed, in_a_line, made

WARMUPS = 3
HOST_CALLS = 9
MINIMUM_ROUNDS, MAXIMUM_ROUNDS = 11, 101
# Calls of a point take turns with this many sets of inputs, or as many as fit in this many bytes.
INPUT_SETS, INPUT_BYTES = 3, 6 << 30
# At most this many names of kernels are stored, and characters of each.
MOST_KERNELS, KERNEL_NAME = 40, 160


class Stopped(RuntimeError):
    """The GPU no longer answers: nothing measured after this could be trusted."""

    def __init__(self, records: Sequence[Any], error: BaseException) -> None:
        super().__init__(in_a_line(error))
        self.records = [record | failed(error) if record["status"] == "ok" else record for record in records]


class Timer(Protocol):
    """Device and clock of a sweep; a test replaces it."""

    device: str

    def round(self, entries: Sequence[Candidate], backlog_us: Sequence[float]) -> list[float]: ...

    def host(self, entry: Candidate) -> float: ...

    def kernels(self, entry: Candidate) -> list[str]: ...

    def synchronize(self) -> None: ...


class CudaTimer:
    """CUDA events around one call that starts on a flushed L2, queued behind enough work to hide the host's time."""

    device = "cuda"

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._cycles_per_us = properties.clock_rate / 1e3
        flush_bytes = max(256 << 20, 4 * int(properties.L2_cache_size))
        self._scratch = torch.zeros(flush_bytes // 4, dtype=torch.int32, device=self.device)
        self._largest = torch.zeros((), dtype=torch.int32, device=self.device)

    def _flush(self) -> None:
        """Empties the L2 by reading: written data would be written back in the time of the call."""
        torch.amax(self._scratch, 0, out=self._largest)

    def _enqueue(self, entry: Candidate, backlog_us: float) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        state = entry.prepare()
        self._flush()
        torch.cuda._sleep(int(backlog_us * self._cycles_per_us))
        start.record()
        entry.run(state)
        end.record()
        return start, end

    def round(self, entries: Sequence[Candidate], backlog_us: Sequence[float]) -> list[float]:
        events = [self._enqueue(entry, backlog) for entry, backlog in zip(entries, backlog_us, strict=True)]
        self.synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in events]

    def host(self, entry: Candidate) -> float:
        spent = []
        for _ in range(HOST_CALLS):
            state = entry.prepare()
            self.synchronize()
            before = time.perf_counter_ns()
            entry.run(state)
            spent.append((time.perf_counter_ns() - before) / 1e3)
        self.synchronize()
        return statistics.median(spent)

    def kernels(self, entry: Candidate) -> list[str]:
        """Returns the names of one call's kernels on the GPU, in order, as torch's profiler tells them."""
        state = entry.prepare()
        self.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            entry.run(state)
            self.synchronize()
        ran = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
        ran.sort(key=lambda event: event.time_range.start)
        return [event.name[:KERNEL_NAME] for event in ran[:MOST_KERNELS]]

    def synchronize(self) -> None:
        torch.cuda.synchronize()


def summary(samples: Sequence[float]) -> Spread:
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return {"median_us": statistics.median(samples), "p20_us": fifths[0], "p80_us": fifths[3]}


def time_interleaved(
    entries: Sequence[Sequence[Candidate]], timer: Timer, seconds: float, backlog: bool = True
) -> list[Spread]:
    """Times calls in rounds of one call of every contender, so that a drifting clock falls on all alike.

    Args:
        entries: for each contender, one call for each set of inputs; each round takes the next set.
        backlog: queues the calls behind other work, which hides the host's time.
    """
    for calls in entries:
        for turn in range(max(WARMUPS, len(calls))):
            call = calls[turn % len(calls)]
            call.run(call.prepare())
    timer.synchronize()
    host = [timer.host(calls[0]) for calls in entries]
    backlogs = [2 * us if backlog else 0.0 for us in host]
    rounds: list[list[float]] = []
    until = time.monotonic() + seconds
    while len(rounds) < MINIMUM_ROUNDS or (time.monotonic() < until and len(rounds) < MAXIMUM_ROUNDS):
        rounds.append(timer.round([calls[len(rounds) % len(calls)] for calls in entries], backlogs))
    samples = zip(*rounds, strict=True)
    return [
        {**summary(sample), "host_us": host_us, "repetitions": len(rounds)}
        for sample, host_us in zip(samples, host, strict=True)
    ]


def copy_bandwidth(timer: Timer, size: int = 1 << 30, seconds: float = 0.5) -> float:
    """Returns GB/s of a large device-to-device copy, bytes read plus bytes written: the roof."""
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=timer.device)
    target = torch.empty_like(source)
    entry = Candidate("copy", lambda: None, lambda _: target.copy_(source))
    median_us: float = time_interleaved([[entry]], timer, seconds)[0]["median_us"]
    return 2 * size / median_us / 1e3


def _input_sets(point: Point, device: str) -> list[Inputs]:
    first = make_inputs(point, device)
    count = max(1, min(INPUT_SETS, INPUT_BYTES // first.bytes))
    return [first, *(make_inputs(point, device, seed) for seed in range(1, count))]


def _record(point: Point, contender: Contender, outcome: Outcome) -> Timing:
    return made(Timing, point.describe(), {"contender": contender.name}, outcome)


def _admit(
    contender: Contender, point: Point, sets: Sequence[Inputs], exact: dict[str, torch.Tensor], timer: Timer
) -> tuple[Timing, list[Candidate]]:
    """Builds a contender's calls, one for each set of inputs, and holds the first one's results against fp64."""
    record = _record(point, contender, {"status": "ok", "message": ""})
    try:
        functions = contender.load()
        forwards = [bind(point, functions, inputs) for inputs in sets]
        calls = [candidate(contender.name, point, f, i) for f, i in zip(forwards, sets, strict=True) if f]
        if not calls:
            return record | {"status": "unsupported", "message": "the contender has no such op"}, []
        measured = errors(outputs(point, calls[0], sets[0]), exact)
        if contender.name == OURS:
            record["launches"] = _launches(calls[0])
        timer.synchronize()
    except Exception as error:
        return made(Timing, record, failed(error)), []
    message = verdict(measured, contender.accuracy * TOLERANCE[point.dtype])
    record["errors"] = {name: overall for name, (overall, _) in measured.items()}
    return record | {"status": "wrong" if message else "ok", "message": message}, [] if message else calls


def _launches(entry: Candidate) -> list[dict[str, Any]]:
    state = entry.prepare()
    with launches_noted() as launches:
        entry.run(state)
    return launches


def _kernels(calls: Sequence[Candidate], timer: Timer) -> list[str]:
    """Returns the names of a call's kernels. A profiler that fails, as while another one runs, leaves no figure out."""
    try:
        return timer.kernels(calls[0])
    except Exception as error:
        return [f"not told: {in_a_line(error)}"]


def measure_point(point: Point, contenders: Sequence[Contender], timer: Timer, seconds: float = 0.12) -> list[Timing]:
    """Returns one record for each contender: timed, or with the reason why not."""
    try:
        sets = _input_sets(point, timer.device)
        exact = expected(point, sets[0])
        admitted = [_admit(contender, point, sets, exact, timer) for contender in contenders]
        del exact
        entries = [calls for _, calls in admitted if calls]
        timings = iter(time_interleaved(entries, timer, seconds) if entries else [])
    except Exception as error:
        admitted, timings = [(_record(point, contender, failed(error)), []) for contender in contenders], iter(())
    records = []
    for record, calls in admitted:
        if calls:
            record = made(Timing, record, next(timings))
            record["gbps"] = record["floor_bytes"] / record["median_us"] / 1e3
            record["kernels"] = _kernels(calls, timer)
        records.append(record)
    try:
        timer.synchronize()
    except Exception as error:
        raise Stopped(records, error) from error
    return records
