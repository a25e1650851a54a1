"""Bytes that the kernels load and store, counted address by address under Triton's interpreter, against the floor.

The process must have TRITON_INTERPRET=1 set before Triton is imported.

A count is of the whole input on a GPU, though the interpreter runs a part of it. Of rows, on the smallest part of the
GPU for which the launch choices are the whole's, as many are counted as give every team of programs one turn, and twice
as many: what a turn adds is linear in the rows. What remains does not depend on the rows: what each team moves once,
such as the sums that it leaves, as many times as the GPU has more teams than the part, and what is there once, such as
dweight. Of channels, with the launches of the whole, one and two blocks of channels are counted, and of each the last
split and one and two of the others: blocks know nothing of each other, and what a split adds is linear.

What a program loads again, having loaded it before in the same launch, is told apart where that one program alone
loads it: the launch was chosen for it to be still in cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch

from perf.calls import Inputs, bind, candidate, make_inputs
from perf.findings import in_a_line
from perf.gate import TOLERANCE, errors, expected, named, verdict
from perf.points import BITS, BULK, PARAMETERS, STATISTICS, Point
from perf.stand_in import H100, OPS, as_on_gpu
from triton_norm.channels.layout import Layout, as_readable, kind_of, layout_of
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
from triton_norm.tuning import channel_spaces, row_spaces
from triton_norm.tuning.channel_spaces import ChannelWork, Plan
from triton_norm.tuning.configs import Space
from triton_norm.tuning.limits import Gpu, assumed

Record = dict[str, Any]
GROUPS = ("bulk", "bits", "parameters", "statistics", "partials")
ONE_PROGRAMS = ("bulk", "bits")  # no two programs of a launch load the same of these
RESIDENT = 2  # programs of a multiprocessor
COUNTED_TILE = 16384  # elements
ONE_SPLIT = Plan(0, 1 << 30)
TEAMS_LAUNCH = 0  # of a call's launches, the one whose programs are the teams
PARTS = (1, 12, 24, 48, 96)  # of a GPU, in multiprocessors
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
    """Holds every tensor that it sees, so that no address is used twice for different things.

    Lanes of one access that ask for the same address count once. So does a program that asks again and again, while it
    waits: how often is a matter of time.
    """

    def __init__(self) -> None:
        self.memories: dict[int, Memory] = {}
        self.kernels: list[str] = []
        self.moved: dict[tuple[int, int, str], int] = {}  # by the launch's number, the memory's start and the way
        self.again: dict[int, int] = {}  # by the memory's start
        self.programs: list[set[Program]] = []  # of each launch
        self._starts: Array = np.zeros(0, dtype=np.int64)
        self._present: list[Memory] = []
        self._loaders: dict[int, Array] = {}  # in this launch the last to have loaded each element, by memory
        self._asked: set[tuple[int, Program]] = set()

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
        self.programs.append(set())
        self._loaders.clear()
        self._asked.clear()

    def access(self, kind: AccessKind, addresses: Array, itemsize: int, program: Program) -> None:
        lanes = addresses.astype(np.int64)
        if not lanes.size:
            return
        if not (lanes[1:] > lanes[:-1]).all():
            lanes = np.unique(lanes)
        memory = self._memory(kind, lanes)
        self.programs[-1].add(program)
        for way in WAYS[kind]:
            self._move(memory, way, lanes.size * itemsize)
            memory.add(way, lanes)
        if kind == "load":
            n_elements = (memory.end - memory.start) // itemsize
            loaders = self._loaders.setdefault(memory.start, np.zeros(n_elements, dtype=np.int32))
            places, number = (lanes - memory.start) // itemsize, program[0] + 1
            again = int((loaders[places] == number).sum()) * itemsize
            self.again[memory.start] = self.again.get(memory.start, 0) + again
            loaders[places] = number

    def synchronizes(self, addresses: Array, acquires: bool, releases: bool, program: Program) -> None:
        if not acquires or releases:
            return
        asked = (int(addresses[0]), program)
        if asked in self._asked:
            memory = self._memory("atomic", addresses.astype(np.int64))
            for way in WAYS["atomic"]:
                self._move(memory, way, -addresses.size * memory.itemsize)
        self._asked.add(asked)

    def _memory(self, kind: AccessKind, lanes: Array) -> Memory:
        low, high = int(lanes.min()), int(lanes.max())
        memory = self._present[int(np.searchsorted(self._starts, low, side="right")) - 1]
        if not memory.start <= low <= high < memory.end:
            raise IndexError(f"{self.kernels[-1]}: a {kind} that is not within one tensor")
        return memory

    def _move(self, memory: Memory, way: str, size: int) -> None:
        key = (len(self.kernels) - 1, memory.start, way)
        self.moved[key] = self.moved.get(key, 0) + size


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _group(memory: Memory, known: dict[int, str]) -> str:
    if memory.start in known:
        return known[memory.start]
    if memory.names & {*BITS}:
        return "bits"
    return "statistics" if memory.names & {"statistics", *STATISTICS} else "partials"


def _known(point: Point, inputs: Inputs, results: Sequence[dict[str, torch.Tensor]]) -> dict[int, str]:
    found = {name: tensor for result in results for name, tensor in result.items()}
    found |= {name: tensor for name, tensor in vars(inputs).items() if tensor is not None}
    groups = {"bulk": BULK, "parameters": PARAMETERS, "statistics": STATISTICS}
    return {_storage(found[name]): group for group, names in groups.items() for name in names if name in found}


@dataclass
class Counts:
    """Bytes moved by launch, group and way, bytes of elements touched by group and way, and bytes that a program has
    loaded before by group; and the programs of each launch."""

    kernels: list[str]
    moved: dict[tuple[int, str, str], int]
    footprint: dict[tuple[str, str], int]
    again: dict[tuple[str], int]
    programs: dict[tuple[int], int]

    def extended(self, twice: Counts, rows: int, wanted: int, teams: float) -> Counts:
        """To `wanted` rows and so many times the teams, from the counts of `rows` and of twice as many."""

        def extend(once: dict[Any, int], twice: dict[Any, int], key: Any) -> int:
            per_turn = twice.get(key, 0) - once.get(key, 0)
            constant = once.get(key, 0) - per_turn
            by_every_team = "partials" in key or key[0] == TEAMS_LAUNCH
            return round(per_turn * wanted / rows + constant * (teams if by_every_team else 1))

        def extend_all(name: str) -> dict[Any, int]:
            counted, again = getattr(self, name), getattr(twice, name)
            return {key: extend(counted, again, key) for key in counted | again}

        return Counts(self.kernels, *map(extend_all, ("moved", "footprint", "again", "programs")))

    def along(self, other: Counts, n: int) -> Counts:
        """These, and n times what the other has more."""

        def go(name: str) -> dict[Any, int]:
            here, there = getattr(self, name), getattr(other, name)
            return {key: here.get(key, 0) + n * (there.get(key, 0) - here.get(key, 0)) for key in here | there}

        return Counts(self.kernels, *map(go, ("moved", "footprint", "again", "programs")))

    def record(self) -> Record:
        def total(group: str | None, way: str, launch: int | None = None) -> int:
            chosen = [(i, g, w) for i, g, w in self.moved if w == way and group in (None, g) and launch in (None, i)]
            return sum(self.moved[key] for key in chosen)

        ways = ("loaded", "stored")
        moved = {group: {way: total(group, way) for way in ways} for group in GROUPS}
        again = {group: self.again.get((group,), 0) for group in ONE_PROGRAMS}
        return {
            "launches": [
                {"kernel": kernel, "programs": programs, **{way: total(None, way, launch) for way in ways}}
                for launch, (kernel, programs) in enumerate(zip(self.kernels, self.programs.values(), strict=True))
            ],
            "bytes": moved,
            "footprint": {group: {way: self.footprint.get((group, way), 0) for way in ways} for group in GROUPS},
            "bulk_bytes": sum(moved["bulk"].values()),
            "again": again,
            "again_bytes": sum(again.values()),
            "total_bytes": sum(self.moved.values()),
            "footprint_bytes": sum(self.footprint.values()),
        }


def _grouped(counter: Counter, known: dict[int, str]) -> Counts:
    programs = {(launch,): len(programs) for launch, programs in enumerate(counter.programs)}
    counts = Counts(counter.kernels, {}, {}, {}, programs)
    for (launch, start, way), size in counter.moved.items():
        key = (launch, _group(counter.memories[start], known), way)
        counts.moved[key] = counts.moved.get(key, 0) + size
    for start, size in counter.again.items():
        again = (_group(counter.memories[start], known),)
        counts.again[again] = counts.again.get(again, 0) + size
    for memory in counter.memories.values():
        for way in memory.touched:
            group = (_group(memory, known), way)
            counts.footprint[group] = counts.footprint.get(group, 0) + memory.footprint(way)
    return counts


@contextmanager
def _as_the_interpreter_likes() -> Iterator[None]:
    """What changes no count: few programs add up the teams' sums, each of which is loaded by one of them, and what is
    gone through once is gone through in large tiles."""
    space, finalise = channel_spaces.channels, row_spaces.rows_backward_finalise

    def channels(work: ChannelWork, gpu: Gpu) -> Space:
        found = space(work, gpu)
        if work.held:
            return found
        blocks = dict(found.configs[0].blocks) | {"T": max(1, COUNTED_TILE // work.lanes)}
        return replace(found, configs=(replace(found.configs[0], blocks=tuple(blocks.items())),))

    def rows_backward_finalise(gpu: Gpu) -> Space:
        return finalise(replace(gpu, interpreted=True))

    with (
        mock.patch.object(row_spaces, "rows_backward_finalise", rows_backward_finalise),
        mock.patch.object(channel_spaces, "channels", channels),
    ):
        yield


def counted(point: Point, gpu: Gpu, plan: Plan | None = None) -> tuple[Counts, str]:
    """One call under the interpreter, launched as on a GPU, and what is wrong with its results.

    `plan`: how programs share channels, if not as the library would choose.
    """
    inputs = make_inputs(point, "cpu")
    wanted = expected(point, inputs)
    forward = bind(point, OPS, inputs)
    assert forward is not None
    counter = Counter()
    resident = RESIDENT * gpu.multiprocessors
    with as_on_gpu(gpu), _as_the_interpreter_likes(), fast_launches(), correct_rounding():
        inputs.reset()
        whole = candidate("triton_norm", point, forward, inputs)
        with interleaved(resident), _planned(ONE_SPLIT) if plan else nullcontext():
            state = whole.prepare()
        with observe(counter), interleaved(resident), _planned(plan) if plan else nullcontext():
            result = whole.run(state)
    found = named(point, result, inputs)
    before = {} if state is None else named(replace(point, mode="forward"), state, inputs)
    message = verdict(errors(found, wanted), TOLERANCE[point.dtype])
    return _grouped(counter, _known(point, inputs, (before, found))), message


def _with_rows(point: Point, rows: int) -> Point:
    return replace(point, workload=replace(point.workload, shape=(rows, point.workload.features)))


def _launches(point: Point, gpu: Gpu) -> list[tuple[Any, int]]:
    """The config and the number of programs of each launch; nothing is run."""
    launches: list[tuple[Any, int]] = []

    def note(kernel: Any, count: int, arguments: Any, constants: Any, config: Any) -> None:
        launches.append((config, count))

    inputs = make_inputs(point, "cpu", blank=True)
    forward = bind(point, OPS, inputs)
    assert forward is not None
    call = candidate("triton_norm", point, forward, inputs)
    with as_on_gpu(gpu, start=note):
        state = call.prepare()
        launches.clear()
        call.run(state)
    return launches


def _counted_rows(point: Point, gpu: Gpu) -> tuple[Counts, str]:
    rows, n_cols = point.workload.shape
    untouched = _with_rows(point, min(rows, max(FEWEST_ROWS, MOST_ELEMENTS // n_cols)))
    whole = _launches(untouched, gpu)
    config, programs = whole[0]
    parts = [replace(gpu, multiprocessors=n) for n in PARTS if n < gpu.multiprocessors]
    part = next(p for p in (*parts, gpu) if [c for c, _ in _launches(untouched, p)] == [c for c, _ in whole])
    part_programs = _launches(untouched, part)[0][1]
    n_peers = -(-n_cols // (config["BLOCK_N"] * config.keywords.get("PIECES", 1)))
    turn = config["BLOCK_M"] * (part_programs // n_peers if point.mode == "backward" else 1)
    once, wrong = counted(_with_rows(point, turn), part)
    twice, wrong_again = counted(_with_rows(point, 2 * turn), part)
    return once.extended(twice, turn, rows, programs / part_programs), wrong or wrong_again


def _layout(point: Point) -> Layout:
    x = make_inputs(point, "cpu", blank=True).x
    kind = kind_of(x)
    return layout_of(x.shape, kind, as_readable(x, kind)[1])


def _plan(point: Point, gpu: Gpu) -> Plan:
    """How programs share the channels of a point on the whole GPU."""
    found: list[Plan | None] = []

    def noting(name: str) -> Any:
        plan = getattr(channel_spaces, name)

        def note(*arguments: Any) -> Plan | None:
            found.append(plan(*arguments))
            return found[-1]

        return mock.patch.object(channel_spaces, name, note)

    with noting("plan_channels"), noting("plan_channels_apart"):
        _launches(point, gpu)
    assert found[-1] is not None
    return found[-1]


@contextmanager
def _planned(plan: Plan) -> Iterator[None]:
    with (
        mock.patch.object(channel_spaces, "plan_channels", lambda *_: plan if plan.tile else None),
        mock.patch.object(channel_spaces, "plan_channels_apart", lambda *_: plan),
    ):
        yield


def _part(point: Point, layout: Layout, n_blocks: int, n_groups: int) -> Point | None:
    """A point with so many whole blocks of channels, the last one as it is, and so many groups of each channel; None
    where it would be read in another way."""
    n_columns = n_blocks * layout.block_columns + layout.n_columns % layout.block_columns
    n_samples, _, *positions = point.workload.shape
    ways = [(n_samples, positions)]
    if layout.fold or not positions:
        ways.append((n_groups, positions))
    else:  # in one sample, or with an odd number of groups in each, so that no wider accesses are possible
        lanes = layout.vector if layout.axis is None else 1
        ones = [1] * (len(positions) - 1)
        ways += [(n, [n_groups // n * lanes, *ones]) for n in (1, n_groups & -n_groups)]
    told = {name: getattr(layout, name) for name in ("n_channels", "n_columns", "groups_per_sample")}
    for n_samples, positions in ways:
        shape = (n_samples, n_columns // layout.columns_per_channel, *positions)
        part = replace(point, workload=replace(point.workload, shape=shape))
        found = _layout(part)
        if found._replace(**told) == layout and n_samples * found.groups_per_sample == n_groups:
            return part
    return None


def _counted_channels(point: Point, gpu: Gpu) -> tuple[Counts, str]:
    layout, plan = _layout(point), _plan(point, gpu)
    n_groups, each = point.workload.shape[0] * layout.groups_per_sample, plan.groups_per_split
    n_blocks, n_before = layout.n_columns // layout.block_columns, (n_groups - 1) // each
    few_blocks, few_before = ((n,) if n <= 2 else (1, 2) for n in (n_blocks, n_before))
    last = n_groups - n_before * each
    if any(_part(point, layout, blocks, n * each + last) is None for blocks in few_blocks for n in few_before):
        few_before = (n_before,)
    messages = []

    def part(n_blocks: int, n_before: int) -> Counts:
        smaller = _part(point, layout, n_blocks, n_before * each + last)
        assert smaller is not None
        counts, message = counted(smaller, gpu, plan)
        messages.append(message)
        return counts

    def block(n_blocks: int) -> Counts:
        counts = [part(n_blocks, n) for n in few_before]
        return counts[0].along(counts[-1], n_before - few_before[0])

    counts = [block(n) for n in few_blocks]
    return counts[0].along(counts[-1], n_blocks - few_blocks[0]), "".join(messages)


def count(point: Point, gpu: Gpu = H100) -> Record:
    """Right, and this many bytes."""
    with assumed(gpu):
        counts, message = (_counted_rows if point.workload.family == "rows" else _counted_channels)(point, gpu)
    status = "wrong" if message else "ok"
    return {**point.describe(), "status": status, "message": message, **counts.record()}


def records(points: Sequence[Point], gpu: Gpu = H100) -> Iterator[Record]:
    for point in points:
        try:
            yield count(point, gpu)
        except Exception as error:
            yield {**point.describe(), "status": "error", "message": in_a_line(error)}


def line(record: Record) -> str:
    name = f"{record['op']} {record['mode']} {record['dtype']} {record['shape']} {record['layout']}"
    if "total_bytes" not in record:
        return f"{name}: {record['status']}, {record['message']}"
    again = f", {record['again_bytes'] / record['floor_bytes']:.3f} of it again" if record["again_bytes"] else ""
    return f"{name}: {record['total_bytes'] / record['floor_bytes']:.3f} of the floor{again}, {record['status']}"
