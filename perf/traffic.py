"""Bytes that the kernels load and store, counted address by address under Triton's interpreter, against the floor.

The process must have TRITON_INTERPRET=1 set before Triton is imported.

Of rows a count is of the whole input on a GPU, though the interpreter runs few of them. On the smallest part of the GPU
for which the launch choices are the whole's, as many rows are counted as give every team of programs one turn, and
twice as many: what a turn adds is linear in the rows. What remains does not depend on the rows: what each team moves
once, such as the sums that it leaves, as many times as the GPU has more teams than the part, and what is there once,
such as dweight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch

from perf.interleave import interleaved
from perf.interpreter import AccessKind, Array, Observer, Program, exact_arithmetic, fast_launches, observe
from perf.measure import TOLERANCE, Inputs, bind, candidate, errors, expected, in_a_line, make_inputs, named, verdict
from perf.stand_in import OPS, as_on_gpu
from perf.workloads import BULK, PARAMETERS, STATISTICS, Point
from triton_norm import tuning

Record = dict[str, Any]
GROUPS = ("bulk", "parameters", "statistics", "partials")
MULTIPROCESSORS = 132
TEAMS_LAUNCH = 0  # of a call's launches, the one whose programs are the teams
PARTS = (1, 12, 24, 48, 96, MULTIPROCESSORS)
FEWEST_ROWS, MOST_ELEMENTS = 1024, 1 << 26  # of tensors that no kernel touches: enough rows for every team
WAYS: dict[AccessKind, tuple[str, ...]] = {"load": ("loaded",), "store": ("stored",), "atomic": ("loaded", "stored")}


@dataclass
class Memory:
    """One allocation: how many bytes of it were moved, and which of its elements at least once."""

    tensor: torch.Tensor
    start: int
    end: int
    itemsize: int
    names: set[str] = field(default_factory=set)
    touched: dict[str, Array] = field(default_factory=dict)

    def add(self, way: str, addresses: Array) -> None:
        if way not in self.touched:
            self.touched[way] = np.zeros(self.end - self.start, dtype=bool)
        self.touched[way][addresses - self.start] = True

    def footprint(self, way: str) -> int:
        return int(self.touched[way].sum()) * self.itemsize if way in self.touched else 0


class Counter(Observer):
    """Holds every tensor that it sees, so that no address is used twice for different things."""

    def __init__(self) -> None:
        self.memories: dict[int, Memory] = {}
        self.kernels: list[str] = []
        self.moved: dict[tuple[int, int, str], int] = {}  # by the launch's number, the memory's start and the way
        self._starts: Array = np.zeros(0, dtype=np.int64)
        self._present: list[Memory] = []

    def launch_begins(self, kernel: str, tensors: dict[str, torch.Tensor]) -> None:
        present = {}
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            start = storage.data_ptr()
            end = start + storage.nbytes()
            memory = self.memories.setdefault(start, Memory(tensor, start, end, tensor.element_size()))
            memory.names.add(name.removesuffix("_ptr"))
            present[start] = memory
        self._present = [present[start] for start in sorted(present)]
        self._starts = np.array(sorted(present), dtype=np.int64)
        self.kernels.append(kernel)

    def access(self, kind: AccessKind, addresses: Array, itemsize: int, program: Program) -> None:
        lanes = addresses.astype(np.int64)
        if not lanes.size:
            return
        low, high = int(lanes.min()), int(lanes.max())
        memory = self._present[int(np.searchsorted(self._starts, low, side="right")) - 1]
        if not memory.start <= low <= high < memory.end:
            raise IndexError(f"{self.kernels[-1]}: a {kind} that is not within one tensor")
        for way in WAYS[kind]:
            key = (len(self.kernels) - 1, memory.start, way)
            self.moved[key] = self.moved.get(key, 0) + lanes.size * itemsize
            memory.add(way, lanes)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _group(memory: Memory, known: dict[int, str]) -> str:
    if memory.start in known:
        return known[memory.start]
    return "statistics" if memory.names & {"statistics", *STATISTICS} else "partials"


def _known(point: Point, inputs: Inputs, results: Sequence[dict[str, torch.Tensor]]) -> dict[int, str]:
    found = {name: tensor for result in results for name, tensor in result.items()}
    found |= {name: tensor for name, tensor in vars(inputs).items() if tensor is not None}
    groups = {"bulk": (*BULK, "dresidual"), "parameters": PARAMETERS, "statistics": STATISTICS}
    return {_storage(found[name]): group for group, names in groups.items() for name in names if name in found}


@dataclass
class Counts:
    """Bytes moved by launch, group and way, and bytes of elements touched by group and way."""

    kernels: list[str]
    moved: dict[tuple[int, str, str], int]
    footprint: dict[tuple[str, str], int]

    def extended(self, twice: Counts, rows: int, wanted: int, teams: float) -> Counts:
        """To `wanted` rows and so many times the teams, from the counts of `rows` and of twice as many."""

        def extend(once: dict[Any, int], twice: dict[Any, int], key: Any) -> int:
            per_turn = twice.get(key, 0) - once.get(key, 0)
            constant = once.get(key, 0) - per_turn
            by_every_team = "partials" in key or key[0] == TEAMS_LAUNCH
            return round(per_turn * wanted / rows + constant * (teams if by_every_team else 1))

        moved = {key: extend(self.moved, twice.moved, key) for key in self.moved | twice.moved}
        footprint = {key: extend(self.footprint, twice.footprint, key) for key in self.footprint | twice.footprint}
        return Counts(self.kernels, moved, footprint)

    def record(self) -> Record:
        def total(group: str | None, way: str, launch: int | None = None) -> int:
            chosen = [(i, g, w) for i, g, w in self.moved if w == way and group in (None, g) and launch in (None, i)]
            return sum(self.moved[key] for key in chosen)

        ways = ("loaded", "stored")
        moved = {group: {way: total(group, way) for way in ways} for group in GROUPS}
        return {
            "launches": [
                {"kernel": kernel, **{way: total(None, way, launch) for way in ways}}
                for launch, kernel in enumerate(self.kernels)
            ],
            "bytes": moved,
            "footprint": {group: {way: self.footprint.get((group, way), 0) for way in ways} for group in GROUPS},
            "bulk_bytes": sum(moved["bulk"].values()),
            "total_bytes": sum(self.moved.values()),
            "footprint_bytes": sum(self.footprint.values()),
        }


def _grouped(counter: Counter, known: dict[int, str]) -> Counts:
    counts = Counts(counter.kernels, {}, {})
    for (launch, start, way), size in counter.moved.items():
        key = (launch, _group(counter.memories[start], known), way)
        counts.moved[key] = counts.moved.get(key, 0) + size
    for memory in counter.memories.values():
        for way in memory.touched:
            group = (_group(memory, known), way)
            counts.footprint[group] = counts.footprint.get(group, 0) + memory.footprint(way)
    return counts


def _few_finalising() -> AbstractContextManager[Any]:
    """The programs that add up the teams' sums are as few as the interpreter likes: each sum is loaded by one of them,
    whatever their number."""
    space = tuning.rows_backward_finalise
    return mock.patch.object(tuning, "rows_backward_finalise", lambda interpreted: space(True))


def counted(point: Point, multiprocessors: int) -> tuple[Counts, str]:
    """One call under the interpreter, launched as on so many multiprocessors, and what is wrong with its results."""
    inputs = make_inputs(point, "cpu")
    wanted = expected(point, inputs)
    forward = bind(point, OPS, inputs)
    assert forward is not None
    counter = Counter()
    with as_on_gpu(multiprocessors), _few_finalising(), fast_launches(), exact_arithmetic():
        inputs.reset()
        whole = candidate("triton_norm", point, forward, inputs)
        with interleaved():
            state = whole.prepare()
        with observe(counter), interleaved():
            result = whole.run(state)
    found = named(point, result, inputs)
    before = {} if state is None else named(replace(point, mode="forward"), state, inputs)
    message = verdict(errors(found, wanted), TOLERANCE[point.dtype])
    return _grouped(counter, _known(point, inputs, (before, found))), message


def _with_rows(point: Point, rows: int) -> Point:
    return replace(point, workload=replace(point.workload, shape=(rows, point.workload.features)))


def _launches(point: Point, multiprocessors: int) -> list[tuple[Any, int]]:
    """The config and the number of programs of each launch; nothing is run."""
    launches: list[tuple[Any, int]] = []

    def note(kernel: Any, count: int, arguments: Any, constants: Any, config: Any) -> None:
        launches.append((config, count))

    inputs = make_inputs(point, "cpu", blank=True)
    forward = bind(point, OPS, inputs)
    assert forward is not None
    call = candidate("triton_norm", point, forward, inputs)
    with as_on_gpu(multiprocessors, start=note):
        state = call.prepare()
        launches.clear()
        call.run(state)
    return launches


def _counted_rows(point: Point) -> tuple[Counts, str]:
    rows, n_cols = point.workload.shape
    untouched = _with_rows(point, min(rows, max(FEWEST_ROWS, MOST_ELEMENTS // n_cols)))
    whole = _launches(untouched, MULTIPROCESSORS)
    config, programs = whole[0]
    part = next(n for n in PARTS if [c for c, _ in _launches(untouched, n)] == [c for c, _ in whole])
    part_programs = _launches(untouched, part)[0][1]
    n_peers = -(-n_cols // (config["BLOCK_N"] * config.keywords.get("PIECES", 1)))
    turn = config["BLOCK_M"] * (part_programs // n_peers if point.mode == "backward" else 1)
    once, wrong = counted(_with_rows(point, turn), part)
    twice, wrong_again = counted(_with_rows(point, 2 * turn), part)
    return once.extended(twice, turn, rows, programs / part_programs), wrong or wrong_again


def count(point: Point) -> Record:
    """Right, and this many bytes: of a whole GPU's launch for rows, otherwise of one multiprocessor's."""
    counts, message = _counted_rows(point) if point.workload.family == "rows" else counted(point, 1)
    status = "wrong" if message else "ok"
    return {**point.describe(), "status": status, "message": message, **counts.record()}


def records(points: Sequence[Point]) -> Iterator[Record]:
    for point in points:
        try:
            yield count(point)
        except Exception as error:
            yield {**point.describe(), "status": "error", "message": in_a_line(error)}


def line(record: Record) -> str:
    name = f"{record['op']} {record['mode']} {record['dtype']} {record['shape']} {record['layout']}"
    if "total_bytes" not in record:
        return f"{name}: {record['status']}, {record['message']}"
    return f"{name}: {record['total_bytes'] / record['floor_bytes']:.3f} of the floor, {record['status']}"
