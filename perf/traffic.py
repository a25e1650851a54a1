"""Bytes that the kernels load and store, counted address by address under Triton's interpreter, against the floor.

The process must have TRITON_INTERPRET=1 set before Triton is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from perf.interpreter import AccessKind, Array, Observer, Program, exact_arithmetic, fast_launches, observe
from perf.measure import TOLERANCE, Inputs, bind, candidate, errors, expected, in_a_line, make_inputs, named, verdict
from perf.stand_in import OPS, as_on_gpu
from perf.workloads import STATISTICS, Point

Record = dict[str, Any]
GROUPS = ("bulk", "parameters", "statistics", "partials")
WAYS: dict[AccessKind, tuple[str, ...]] = {"load": ("loaded",), "store": ("stored",), "atomic": ("loaded", "stored")}


@dataclass
class Memory:
    """One allocation: how many bytes of it were moved, and which of its elements at least once."""

    tensor: torch.Tensor
    start: int
    end: int
    itemsize: int
    names: set[str] = field(default_factory=set)
    moved: dict[str, int] = field(default_factory=lambda: {"loaded": 0, "stored": 0})
    touched: dict[str, Array] = field(default_factory=dict)

    def add(self, way: str, addresses: Array, itemsize: int) -> None:
        self.moved[way] += addresses.size * itemsize
        if way not in self.touched:
            self.touched[way] = np.zeros(self.end - self.start, dtype=bool)
        self.touched[way][addresses - self.start] = True

    def footprint(self, way: str) -> int:
        return int(self.touched[way].sum()) * self.itemsize if way in self.touched else 0


class Counter(Observer):
    """Holds every tensor that it sees, so that no address is used twice for different things."""

    def __init__(self) -> None:
        self.memories: dict[int, Memory] = {}
        self.launches: list[Record] = []
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
        self.launches.append({"kernel": kernel, "loaded": 0, "stored": 0})

    def access(self, kind: AccessKind, addresses: Array, itemsize: int, program: Program) -> None:
        lanes = addresses.astype(np.int64)
        if not lanes.size:
            return
        low, high = int(lanes.min()), int(lanes.max())
        memory = self._present[int(np.searchsorted(self._starts, low, side="right")) - 1]
        if not memory.start <= low <= high < memory.end:
            raise IndexError(f"{self.launches[-1]['kernel']}: a {kind} that is not within one tensor")
        for way in WAYS[kind]:
            self.launches[-1][way] += lanes.size * itemsize
            memory.add(way, lanes, itemsize)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _group(memory: Memory, known: dict[int, str]) -> str:
    if memory.start in known:
        return known[memory.start]
    return "statistics" if memory.names & set(STATISTICS) else "partials"


def _known(inputs: Inputs, found: dict[str, torch.Tensor], y: torch.Tensor) -> dict[int, str]:
    bulk = [inputs.x, inputs.dy, y] + [found[name] for name in ("y", "dx") if name in found]
    parameters = [inputs.weight, inputs.bias] + [found[name] for name in ("dweight", "dbias") if name in found]
    statistics = [inputs.running_mean, inputs.running_var]
    groups = {"bulk": bulk, "parameters": parameters, "statistics": statistics}
    return {_storage(tensor): group for group, tensors in groups.items() for tensor in tensors}


def count(point: Point) -> Record:
    """One call under the interpreter, launched as on one multiprocessor: right, and this many bytes."""
    record: Record = {**point.describe(), "status": "ok", "message": ""}
    inputs = make_inputs(point, "cpu")
    wanted = expected(point, inputs)
    forward = bind(point, OPS, inputs)
    assert forward is not None
    counter = Counter()
    with as_on_gpu(multiprocessors=1), fast_launches(), exact_arithmetic():
        inputs.reset()
        whole = candidate("triton_norm", point, forward, inputs)
        state = whole.prepare()
        with observe(counter):
            result = whole.run(state)
    found = named(point, result, inputs)
    message = verdict(errors(found, wanted), TOLERANCE[point.dtype])
    if message:
        record |= {"status": "wrong", "message": message}
    return record | _sums(counter, _known(inputs, found, result if state is None else state))


def _sums(counter: Counter, known: dict[int, str]) -> Record:
    moved = {group: {"loaded": 0, "stored": 0} for group in GROUPS}
    footprint = {group: {"loaded": 0, "stored": 0} for group in GROUPS}
    for memory in counter.memories.values():
        group = _group(memory, known)
        for way in ("loaded", "stored"):
            moved[group][way] += memory.moved[way]
            footprint[group][way] += memory.footprint(way)
    return {
        "launches": counter.launches,
        "bytes": moved,
        "footprint": footprint,
        "bulk_bytes": sum(moved["bulk"].values()),
        "total_bytes": sum(ways[way] for ways in moved.values() for way in ways),
        "footprint_bytes": sum(ways[way] for ways in footprint.values() for way in ways),
    }


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
