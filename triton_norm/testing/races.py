"""Finds programs of one launch that touch the same memory with nothing that orders them."""

from dataclasses import dataclass, field

import numpy as np

from triton_norm.testing.interpreter import AccessKind, Array, Program

KINDS: tuple[AccessKind, ...] = ("load", "store", "atomic")
LOAD, STORE, ATOMIC = range(3)
SPARSE = 1 << 20


class Clocks:
    """Tracks the order that atomics impose on programs by vector clocks: how much a program has seen of each other.

    A program's run is cut into segments at its atomics. A release publishes, at the atomic's address, the end of the
    program's current epoch and all it has seen itself; an acquire takes over the clock published there.
    """

    def __init__(self) -> None:
        self.programs: list[Program] = []
        self.program_of: list[int] = []
        self._epoch_of: list[int] = []
        self._seen_by: list[dict[int, int]] = []
        self._current: dict[Program, int] = {}
        self._published: dict[int, dict[int, int]] = {}

    def segment(self, program: Program) -> int:
        if program not in self._current:
            self._current[program] = self._new_segment(len(self.programs), 0, {})
            self.programs.append(program)
        return self._current[program]

    def synchronize(self, address: int, acquires: bool, releases: bool, program: Program) -> None:
        now = self.segment(program)
        index, epoch, seen = self.program_of[now], self._epoch_of[now], self._seen_by[now]
        published = self._published.get(address, {})
        if acquires:
            seen = _later(seen, published)
        if releases:
            epoch += 1
            self._published[address] = _later(published, {**seen, index: epoch})
        if epoch != self._epoch_of[now] or seen != self._seen_by[now]:
            self._current[program] = self._new_segment(index, epoch, seen)

    def ordered(self, a: int, b: int) -> bool:
        """Returns whether one of two segments of different programs ended before the other began."""
        return self._has_seen(a, b) or self._has_seen(b, a)

    def _has_seen(self, later: int, earlier: int) -> bool:
        return self._seen_by[later].get(self.program_of[earlier], 0) > self._epoch_of[earlier]

    def _new_segment(self, index: int, epoch: int, seen: dict[int, int]) -> int:
        self.program_of.append(index)
        self._epoch_of.append(epoch)
        self._seen_by.append(seen)
        return len(self.program_of) - 1


def _later(one: dict[int, int], other: dict[int, int]) -> dict[int, int]:
    return {program: max(one.get(program, 0), other.get(program, 0)) for program in one.keys() | other.keys()}


@dataclass(frozen=True)
class Race:
    address: int
    places: int
    accesses: tuple[tuple[AccessKind, Program], tuple[AccessKind, Program]]


@dataclass
class MemoryLog:
    """Records all accesses of a launch to one stretch of memory."""

    clocks: Clocks
    _kinds: list[int] = field(default_factory=list)
    _segments: list[int] = field(default_factory=list)
    _itemsizes: list[int] = field(default_factory=list)
    _addresses: list[Array] = field(default_factory=list)

    def add(self, kind: AccessKind, addresses: Array, itemsize: int, program: Program) -> None:
        self._kinds.append(KINDS.index(kind))
        self._segments.append(self.clocks.segment(program))
        self._itemsizes.append(itemsize)
        self._addresses.append(addresses)

    def race(self) -> Race | None:
        if not any(self._kinds) or len(set(self._segments)) == 1:
            return None
        unit = min(self._itemsizes)
        places = [self._places(i, unit) for i in range(len(self._addresses))]
        lanes = [len(p) for p in places]
        place = np.concatenate(places)
        segment = np.repeat(np.array(self._segments, dtype=np.int32), lanes)
        kind = np.repeat(np.array(self._kinds, dtype=np.int8), lanes)
        shared = _written_and_shared(place, self._program_of[segment], kind != LOAD)
        if not shared.any():
            return None
        return self._unordered(_distinct(place[shared], segment[shared], kind[shared]), unit)

    @property
    def _program_of(self) -> Array:
        return np.array(self.clocks.program_of, dtype=np.int32)

    def _places(self, i: int, unit: int) -> Array:
        places: Array = (self._addresses[i] // np.uint64(unit)).astype(np.int64)
        units = self._itemsizes[i] // unit
        return places if units == 1 else np.ravel(places[:, None] + np.arange(units))

    def _unordered(self, accesses: tuple[Array, Array, Array], unit: int) -> Race | None:
        """Compares, at each address, every access with the 1st, 2nd, ... after it in the order of segments."""
        place, segment, kind = accesses
        program = self._program_of[segment]
        a = np.arange(place.size)
        for lag in range(1, place.size):
            a = a[a + lag < place.size]
            a = a[place[a] == place[a + lag]]
            if not a.size:
                return None
            b = a + lag
            # Loads do not conflict with loads, nor atomics with atomics.
            conflict = (program[a] != program[b]) & ((kind[a] != kind[b]) | (kind[a] == STORE))
            guilty = a[conflict][self._not_ordered(segment[a[conflict]], segment[b[conflict]])]
            if guilty.size:
                one, other = (self._described(segment[i], kind[i]) for i in (guilty[0], guilty[0] + lag))
                return Race(int(place[guilty[0]]) * unit, guilty.size, (one, other))
        return None

    def _not_ordered(self, a: Array, b: Array) -> Array:
        """Returns the mask of pairs of segments that nothing orders."""
        n_segments = len(self.clocks.program_of)
        pairs, which = np.unique(a.astype(np.int64) * n_segments + b, return_inverse=True)
        ordered = [self.clocks.ordered(*divmod(pair, n_segments)) for pair in pairs.tolist()]
        return ~np.array(ordered, dtype=bool)[which]

    def _described(self, segment: int, kind: int) -> tuple[AccessKind, Program]:
        return KINDS[kind], self.clocks.programs[self.clocks.program_of[segment]]


def _distinct(place: Array, segment: Array, kind: Array) -> tuple[Array, Array, Array]:
    """Returns each access once, sorted by address, then by segment."""
    first, n_actors = place.min(), (int(segment.max()) + 1) * len(KINDS)
    place, actor = np.divmod(np.unique((place - first) * n_actors + segment * len(KINDS) + kind), n_actors)
    return place + first, *np.divmod(actor, len(KINDS))


def _written_and_shared(place: Array, program: Array, writes: Array) -> Array:
    """Returns the mask of accesses to addresses that one program writes and another one touches."""
    first = place.min()
    extent = int(place.max() - first) + 1
    if extent > SPARSE + 4 * place.size:
        distinct, place = np.unique(place, return_inverse=True)
        extent = distinct.size
    else:
        place = place - first
    writer = np.full(extent, -1, dtype=np.int32)
    writer[place[writes]] = program[writes]
    others: Array = (writer[place] >= 0) & (writer[place] != program)
    if not others.any():
        return others
    shared = np.zeros(extent, dtype=bool)
    shared[place[others]] = True
    return np.asarray(shared[place])
