"""Counts the bytes that the kernels load and store, address by address under Triton's interpreter.

The process must have TRITON_INTERPRET=1 set before Triton is imported. Every count is exact: the whole call is
interpreted. So that this takes seconds, the inputs in `workloads.traffic_points` are slices of large ones, counted on
as large a slice of a GPU: with fewer rows or channels for fewer multiprocessors, which share a smaller cache.

Bytes that a program loads again in one launch are also counted apart, for tensors that no two programs share: such a
launch was chosen because they are then still in cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch

from perf.calls import Inputs, bind, candidate, launches_noted, make_inputs
from perf.findings import blocks_of, uncached
from perf.gate import TOLERANCE, errors, expected, named, verdict
from perf.ops import BITS, BULK, MODULATIONS, PARAMETERS, STATISTICS, triton_norm_functions
from perf.points import Point
from perf.records import Traffic, failed, made, task_name
from triton_norm.testing.interleave import interleaved
from triton_norm.testing.interpreter import (
    AccessKind,
    Array,
    Observer,
    Program,
    correct_rounding,
    fast_launches,
    observe,
)
from triton_norm.testing.stub_driver import H100, as_on_gpu
from triton_norm.tuning import modulated_spaces, row_spaces
from triton_norm.tuning.configs import Space
from triton_norm.tuning.limits import Gpu

OPS = triton_norm_functions()
GROUPS = ("bulk", "bits", "parameters", "statistics", "partials")
# No two programs of a launch load the same elements of these groups.
UNSHARED = ("bulk", "bits")
WAYS: dict[AccessKind, tuple[str, ...]] = {"load": ("loaded",), "store": ("stored",), "atomic": ("loaded", "stored")}
# A multiprocessor runs this many programs at once, of those that wait for each other.
RESIDENT_PER_SM = 2


@dataclass
class Memory:
    """One allocation, and which of its elements were loaded and stored at least once.

    Args:
        names: the kernels' names for it.
        touched: by way, a flag for each element.
    """

    tensor: torch.Tensor
    names: set[str] = field(default_factory=set)
    touched: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        storage = self.tensor.untyped_storage()
        self.start, self.itemsize = storage.data_ptr(), self.tensor.element_size()
        self.end = self.start + storage.nbytes()

    @property
    def n_elements(self) -> int:
        return (self.end - self.start) // self.itemsize

    def touch(self, way: str, places: Array) -> None:
        if way not in self.touched:
            self.touched[way] = np.zeros(self.n_elements, dtype=bool)
        self.touched[way][places] = True


class TrafficCounter(Observer):
    """Counts the bytes of every access. It holds all tensors that it sees, so that no address is used twice.

    Lanes of one access that ask for the same address count once. So does a program that asks again while it waits: how
    often it does is a matter of time.

    Args (of counters):
        moved: bytes by the number of the launch, the start of the memory and the way.
        again: bytes that a program had loaded before in the same launch, by the start of the memory.
        programs: programs of each launch that accessed memory.
    """

    def __init__(self) -> None:
        self.memories: dict[int, Memory] = {}
        self.moved: Counter[tuple[int, int, str]] = Counter()
        self.again: Counter[int] = Counter()
        self.programs: list[set[Program]] = []
        self._kernel = ""
        self._starts: Array = np.zeros(0, dtype=np.int64)
        self._last_loader: dict[int, Array] = {}
        self._asked: set[tuple[int, Program]] = set()

    def launch_begins(self, kernel: str, tensors: dict[str, torch.Tensor]) -> None:
        starts = set()
        for name, tensor in tensors.items():
            memory = Memory(tensor)
            memory = self.memories.setdefault(memory.start, memory)
            memory.names.add(name.removesuffix("_ptr"))
            starts.add(memory.start)
        self._starts = np.array(sorted(starts), dtype=np.int64)
        self._kernel = kernel
        self.programs.append(set())
        self._last_loader.clear()
        self._asked.clear()

    def access(self, kind: AccessKind, addresses: Array, itemsize: int, program: Program) -> None:
        lanes = addresses.astype(np.int64)
        if not lanes.size:
            return
        if not (lanes[1:] > lanes[:-1]).all():
            lanes = np.unique(lanes)
        memory = self._memory_of(kind, lanes)
        places = (lanes - memory.start) // itemsize
        self.programs[-1].add(program)
        for way in WAYS[kind]:
            self._move(memory, way, lanes.size * itemsize)
            memory.touch(way, places)
        if kind == "load":
            loader = self._last_loader.setdefault(memory.start, np.zeros(memory.n_elements, dtype=np.int32))
            number = program[0] + 1
            self.again[memory.start] += int((loader[places] == number).sum()) * itemsize
            loader[places] = number

    def synchronizes(self, addresses: Array, acquires: bool, releases: bool, program: Program) -> None:
        if not acquires or releases:
            return
        access = (int(addresses[0]), program)
        if access in self._asked:
            memory = self._memory_of("atomic", addresses.astype(np.int64))
            for way in WAYS["atomic"]:
                self._move(memory, way, -addresses.size * memory.itemsize)
        self._asked.add(access)

    def _memory_of(self, kind: AccessKind, lanes: Array) -> Memory:
        low, high = int(lanes.min()), int(lanes.max())
        memory = self.memories[int(self._starts[int(np.searchsorted(self._starts, low, side="right")) - 1])]
        if not memory.start <= low <= high < memory.end:
            raise IndexError(f"{self._kernel}: a {kind} that is not within one tensor")
        return memory

    def _move(self, memory: Memory, way: str, size: int) -> None:
        self.moved[len(self.programs) - 1, memory.start, way] += size


def _groups(counter: TrafficCounter, tensors: dict[str, torch.Tensor]) -> dict[int, str]:
    """Returns the group of each memory by its start: by the name of the call's tensor that it is, or else by the
    kernels' names for it."""
    names = {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors.items()}
    named_groups = {"bulk": BULK, "parameters": (*PARAMETERS, *MODULATIONS), "statistics": STATISTICS}

    def group(memory: Memory) -> str:
        if memory.start in names:
            return next(group for group, members in named_groups.items() if names[memory.start] in members)
        if memory.names & {*BITS}:
            return "bits"
        return "statistics" if memory.names & {"statistics", *STATISTICS} else "partials"

    return {start: group(memory) for start, memory in counter.memories.items()}


def _tensors(inputs: Inputs, *results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {name: tensor for result in results for name, tensor in result.items()}
    tensors |= {name: tensor for name, tensor in vars(inputs).items() if tensor is not None}
    return {name: tensors[name] for name in (*BULK, *PARAMETERS, *MODULATIONS, *STATISTICS) if name in tensors}


def _figures(counter: TrafficCounter, groups: dict[int, str], launches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    ways = ("loaded", "stored")
    moved: Counter[tuple[str, str]] = Counter()
    by_launch: Counter[tuple[int, str]] = Counter()
    for (launch, start, way), size in counter.moved.items():
        moved[groups[start], way] += size
        by_launch[launch, way] += size
    touched: Counter[tuple[str, str]] = Counter()
    for memory in counter.memories.values():
        for way, flags in memory.touched.items():
            touched[groups[memory.start], way] += int(flags.sum()) * memory.itemsize
    again = {group: sum(size for start, size in counter.again.items() if groups[start] == group) for group in UNSHARED}
    return {
        "launches": [
            {**launch, "programs": len(programs), **{way: by_launch[place, way] for way in ways}}
            for place, (launch, programs) in enumerate(zip(launches, counter.programs, strict=True))
        ],
        "bytes": {group: {way: moved[group, way] for way in ways} for group in GROUPS},
        "footprint": {group: {way: touched[group, way] for way in ways} for group in GROUPS},
        "again": again,
        "again_bytes": sum(again.values()),
        "total_bytes": sum(moved.values()),
        "footprint_bytes": sum(touched.values()),
    }


def h100(blocks: int = 1) -> Gpu:
    """Returns an H100 with clusters of at most so many blocks. The interpreter ignores the blocks of a launch."""
    return replace(H100, most_blocks=blocks)


def slice_of(gpu: Gpu, multiprocessors: int) -> Gpu:
    """Returns a GPU with fewer multiprocessors on which as large a part of the work is launched as on the whole one.

    Cache and the limits in bytes of all programs shrink alike. All programs of the slice may share a row or channel,
    as fewer than a third of the whole GPU's may.
    """
    fraction, limits = multiprocessors / gpu.multiprocessors, gpu.limits
    if fraction == 1:
        return gpu
    return replace(
        gpu,
        multiprocessors=multiprocessors,
        l2_bytes=int(gpu.l2_bytes * fraction),
        limits=replace(
            limits,
            one_launch_bytes=int(limits.one_launch_bytes * fraction),
            small_bytes=int(limits.small_bytes * fraction),
            sms_per_peer=1,
        ),
    )


@contextmanager
def _few_finalising_programs() -> Iterator[None]:
    """Has the sums of a backward's teams added up by the few programs of the interpreter: each sum is loaded once,
    however many programs share them, and a program takes the interpreter milliseconds."""
    spaces = (row_spaces, "rows_backward_finalise"), (modulated_spaces, "modulated_backward_finalise")
    with ExitStack() as stack:
        for module, name in spaces:
            stack.enter_context(mock.patch.object(module, name, _interpreted(getattr(module, name))))
        yield


def _interpreted(space: Callable[[Gpu], Space]) -> Callable[[Gpu], Space]:
    return lambda gpu: space(replace(gpu, interpreted=True))


def count(point: Point, gpu: Gpu = H100) -> Traffic:
    """Interprets one call, launched as on a GPU. Returns its bytes, and whether its results are right."""
    inputs = make_inputs(point, "cpu")
    exact = expected(point, inputs)
    forward = bind(point, OPS, inputs)
    assert forward is not None
    counter = TrafficCounter()
    resident = RESIDENT_PER_SM * gpu.multiprocessors
    with as_on_gpu(gpu), _few_finalising_programs(), fast_launches(), correct_rounding(), interleaved(resident):
        inputs.reset()
        call = candidate("triton_norm", point, forward, inputs)
        state = call.prepare()
        with observe(counter), launches_noted() as launches:
            result = call.run(state)
    computed = named(point, result, inputs)
    before = {} if state is None else named(replace(point, mode="forward"), state, inputs)
    message = verdict(errors(computed, exact), TOLERANCE[point.dtype])
    figures = _figures(counter, _groups(counter, _tensors(inputs, before, computed)), launches)
    outcome = {"multiprocessors": gpu.multiprocessors, "status": "wrong" if message else "ok", "message": message}
    return made(Traffic, point.describe(), outcome, figures)


def records(points: Sequence[Point], gpu: Gpu = H100) -> Iterator[Traffic]:
    for point in points:
        try:
            yield count(point, slice_of(gpu, point.workload.multiprocessors))
        except Exception as error:
            yield made(Traffic, point.describe(), failed(error))


def line(record: Traffic) -> str:
    name = task_name(record)
    if "total_bytes" not in record:
        return f"{name}: {record['status']}, {record['message']}"
    again = f", {record['again_bytes'] / record['floor_bytes']:.3f} of it again" if record["again_bytes"] else ""
    of_floor = f"{record['total_bytes'] / record['floor_bytes']:.3f} of the floor{again}"
    cluster = f", clusters of {blocks_of(record)}" if blocks_of(record) > 1 else ""
    return f"{name}: {of_floor}, {uncached(record):.3f} without reads from cache{cluster}, {record['status']}"
