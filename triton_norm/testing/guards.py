"""Interprets kernels with every access to memory checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from triton_norm.testing import interpreter
from triton_norm.testing.interpreter import AccessKind, Array, Program
from triton_norm.testing.process_wide import process_wide
from triton_norm.testing.races import Clocks, MemoryLog, Race


class RaceError(AssertionError):
    """Reports that two programs of a launch touch the same memory, one of them writes it, and no atomics order them."""


class Extent:
    """Describes the memory of a tensor's elements: runs of adjacent bytes, repeated along the axes that leave gaps."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.itemsize = tensor.element_size()
        self.start = tensor.data_ptr()
        self.run = self.itemsize if tensor.numel() else 0
        self._axes: list[tuple[int, int]] = []
        if self.run:
            for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
                self._add_axis(stride * self.itemsize, size)
        self.end = self.start + self._span()

    def _span(self) -> int:
        return self.run + sum(stride * (size - 1) for stride, size in self._axes)

    def _add_axis(self, stride: int, size: int) -> None:
        span = self._span()
        if size == 1 or stride == 0:
            return
        if stride > span or (stride == span and self._axes):
            self._axes.append((stride, size))
        else:
            # Adjacent or overlapping. Overlapping gaps are rare, and treated as filled.
            self.run, self._axes = span + stride * (size - 1), []

    def contains(self, addresses: Array, itemsize: int) -> Array:
        offset = addresses.astype(np.int64) - self.start
        inside: Array = offset >= 0
        for stride, size in reversed(self._axes):
            offset = offset - np.minimum(offset // stride, size - 1) * stride
        return inside & (offset + itemsize <= self.run)

    def contains_address(self, address: int) -> bool:
        return bool(self.contains(np.array([address], dtype=np.uint64), 1).all())

    def contains_all(self, addresses: Array, itemsize: int, low: int, high: int) -> bool:
        """Returns whether all addresses are elements' addresses; `low` and `high` are the least and the greatest."""
        if low < self.start or high + itemsize > self.end:
            return False
        return not self._axes or bool(self.contains(addresses, itemsize).all())

    def distance(self, address: int, itemsize: int) -> int:
        """Returns the bytes past the end (> 0), before the start (< 0), or 0 in a gap between the elements."""
        return max(address + itemsize - self.end, 0) or min(address - self.start, 0)


class Argument:
    """Counts the bytes of a launch's tensor argument that were moved, once per lane and access."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.name = name
        self.text = f"{name} ({dtype} {list(tensor.shape)}, strides {list(tensor.stride())})"
        self.extent = Extent(tensor)
        self.bytes: dict[AccessKind, int] = {"load": 0, "store": 0, "atomic": 0}
        # A weak reference: a strong one would make the tensor look shared; without any, its address could be reused.
        self._storage = StorageWeakRef(tensor.untyped_storage())

    def shares_memory_with(self, tensor: torch.Tensor) -> bool:
        if self._storage.cdata != tensor.untyped_storage()._cdata:
            return False
        mine, other = self.extent, Extent(tensor)
        return mine.contains_address(other.start) or other.contains_address(mine.start)


Part: TypeAlias = tuple[Argument, Array]


@dataclass
class Launch:
    """Records a launch's kernel and arguments. Memory that two arguments share counts for the first of them."""

    kernel: str
    arguments: dict[str, Argument]

    def bytes(self, kind: AccessKind, tensor: torch.Tensor | str | None = None) -> int:
        """Returns the bytes of a kind of access to one argument (name, or tensor in its memory), or to all."""
        if isinstance(tensor, str):
            return self.arguments[tensor].bytes[kind]
        arguments = self.arguments.values()
        return sum(a.bytes[kind] for a in arguments if tensor is None or a.shares_memory_with(tensor))


def _one_log_per_stretch_of_memory(arguments: list[Argument], clocks: Clocks) -> dict[str, MemoryLog]:
    logs, log, end = {}, MemoryLog(clocks), 0
    for argument in sorted(arguments, key=lambda argument: argument.extent.start):
        if argument.extent.start >= end:
            log = MemoryLog(clocks)
        logs[argument.name] = log
        end = max(end, argument.extent.end)
    return logs


class Guard(interpreter.Observer):
    """Checks each access as it happens, looks for races when a launch ends, and counts the bytes."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self._arguments: list[Argument] = []
        self._clocks = Clocks()
        self._logs: dict[str, MemoryLog] = {}

    @property
    def kernels(self) -> list[str]:
        return [launch.kernel for launch in self.launches]

    def loaded(self, tensor: torch.Tensor | None = None) -> int:
        return sum(launch.bytes("load", tensor) for launch in self.launches)

    def stored(self, tensor: torch.Tensor | None = None) -> int:
        return sum(launch.bytes("store", tensor) for launch in self.launches)

    def launch_begins(self, kernel: str, tensors: dict[str, torch.Tensor]) -> None:
        self._arguments = [Argument(name, tensor) for name, tensor in tensors.items()]
        self.launches.append(Launch(kernel, {argument.name: argument for argument in self._arguments}))
        self._clocks = Clocks()
        self._logs = _one_log_per_stretch_of_memory(self._arguments, self._clocks)

    def access(self, kind: AccessKind, addresses: Array, itemsize: int, program: Program) -> None:
        if not addresses.size:
            return
        for argument, inside in self._split(kind, addresses, itemsize, program):
            argument.bytes[kind] += inside.size * itemsize
            self._logs[argument.name].add(kind, inside, itemsize, program)

    def synchronizes(self, addresses: Array, acquires: bool, releases: bool, program: Program) -> None:
        for address in addresses.tolist():
            self._clocks.synchronize(address, acquires, releases, program)

    def launch_ends(self) -> None:
        logs, self._logs = self._logs, {}
        for log in {id(log): log for log in logs.values()}.values():
            if race := log.race():
                raise RaceError(self._race_message(race))

    def _split(self, kind: AccessKind, addresses: Array, itemsize: int, program: Program) -> list[Part]:
        low, high = int(addresses.min()), int(addresses.max())
        for argument in self._arguments:
            if argument.extent.contains_all(addresses, itemsize, low, high):
                return [(argument, addresses)]
        parts, rest = [], addresses
        for argument in self._arguments:
            inside = argument.extent.contains(rest, itemsize)
            if inside.any():
                parts.append((argument, rest[inside]))
                rest = rest[~inside]
        if rest.size:
            raise IndexError(self._bounds_message(kind, rest, addresses.size, itemsize, program))
        return parts

    def _bounds_message(self, kind: str, outside: Array, lanes: int, itemsize: int, program: Program) -> str:
        message = f"{self.launches[-1].kernel}, program {program}: {kind} of {itemsize} bytes out of bounds "
        message += f"in {outside.size} of {lanes} lanes"
        if not self._arguments:
            return f"{message}; the launch was given no tensor"
        address, argument = self._nearest(outside, itemsize)
        distance = argument.extent.distance(address, itemsize)
        where = f"{distance} bytes past the end" if distance > 0 else f"{-distance} bytes before the start"
        return f"{message}; the nearest is {where if distance else 'in a gap between the elements'} of {argument.text}"

    def _nearest(self, addresses: Array, itemsize: int) -> tuple[int, Argument]:
        ends = {int(addresses.min()), int(addresses.max())}
        pairs = [(address, argument) for address in sorted(ends) for argument in self._arguments]
        return min(pairs, key=lambda pair: abs(pair[1].extent.distance(pair[0], itemsize)))

    def _race_message(self, race: Race) -> str:
        one, other = (f"{kind} of program {program}" for kind, program in race.accesses)
        argument = next(a for a in self._arguments if a.extent.distance(race.address, 1) == 0)
        element = (race.address - argument.extent.start) // argument.extent.itemsize
        return (
            f"{self.launches[-1].kernel}: race between the {one} and the {other} at "
            f"offset {element} of {argument.text}, and at {race.places - 1} more places"
        )


@process_wide
def _poisoned_allocations() -> Iterator[None]:
    """Fills the results of torch.empty and similar functions with NaN, or an integer type's largest value."""
    settings: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fill


@contextmanager
def guarded() -> Iterator[Guard]:
    """Interprets kernels within `correct_rounding`, and raises errors for faults that a GPU would not report.

    Allocated memory that was not written holds NaN, or an integer type's largest value, and so do the lanes that a load
    without `other=` masks off: a kernel that uses either has wrong results. To this end torch's deterministic mode is
    on (`torch.use_deterministic_algorithms`). The Guard that the context yields records the launches, and the bytes
    that each moved. Threads, and RuntimeError on entering, are as with `correct_rounding`.

    Raises, from a launch:
        IndexError: a load, store or atomic outside the elements of the launch's tensors, before it takes place.
        RaceError: two programs touch the same memory, one of them writes it, and no atomics order them.
        AssertionError: an operation on integers of at most 32 bits overflows, or a tl.device_assert fails.
    """
    guard = Guard()
    with (
        _poisoned_allocations(),
        interpreter.fast_launches(),
        interpreter.correct_rounding(),
        interpreter.int32_overflow_is_an_error(),
        interpreter.observe(guard, poison_masked_loads=True),
    ):
        yield guard
