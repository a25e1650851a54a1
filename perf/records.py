"""Defines the records that the suite makes, and the files that store them.

A results file has one JSON record a line, each with its kind: "facts" of a run, "timing", "step", "traffic",
"resources" or "numerics". Records are appended as they are made, so an interrupted run can go on where it stopped. A
later line of facts adds to an earlier one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

FORMAT = 3
RESULTS = "results.jsonl"
STATIC = ("traffic", "resources", "numerics")
"""Kinds of records that need no clock."""
FAILURES = ("wrong", "error")
"""Statuses of records that should have a figure."""
SAME = ("GPU", "driver", "torch", "triton", "commit")
"""Facts of the environment that a run must have in common with the one that it goes on with."""


class Refused(ValueError):
    """The reason in a sentence why a command can't be obeyed."""


class Outcome(TypedDict):
    """Says whether there is a figure, and in words why not.

    Args:
        status: "ok", or "wrong" (outside the tolerance), "error", "unsupported", "skipped" or "missing".
    """

    status: str
    message: str


class PointFields(TypedDict):
    """Identifies a point, as `Point.describe` does.

    Args:
        shape: of x.
        layout: "contiguous" or "channels_last".
        group, source: the sweep that the shape belongs to, and the model or so that it comes from.
        floor_bytes: bytes that must move.
        apart_floor_bytes: bytes that must move where one launch reduces and another one applies.
    """

    op: str
    mode: str
    dtype: str
    shape: list[int]
    layout: str
    group: str
    source: str
    floor_bytes: int
    apart_floor_bytes: int


class Spread(TypedDict, total=False):
    """Times of one call: the median, and the 20th and 80th percentiles; host_us until it returns on the host."""

    median_us: float
    p20_us: float
    p80_us: float
    host_us: float
    repetitions: int


class Timing(PointFields, Outcome, Spread, total=False):
    """One contender at one point.

    Args:
        errors: of each output, relative to fp64's by norm.
        gbps: floor_bytes over the median time.
        kernels: names of what ran on the GPU, in order.
        launches: of this library, the kernel and the config of each, in order; `num_ctas` are the blocks of a cluster.
    """

    contender: str
    errors: dict[str, float]
    gbps: float
    kernels: list[str]
    launches: list[dict[str, Any]]


class Step(Outcome, Spread, total=False):
    """One way of training one model.

    Args:
        norms: how many norms `convert` knows in it.
        without_norms_us: a step's time with nothing in the norms' places.
    """

    model: str
    source: str
    dtype: str
    contender: str
    norms: int
    errors: dict[str, float]
    without_norms_us: float | None


Moved = dict[str, dict[str, int]]
"""Bytes by group of tensors, "loaded" and "stored"."""


class Traffic(PointFields, Outcome, total=False):
    """Bytes that one call moves.

    Args:
        multiprocessors: of the GPU that it was launched for.
        launches: as of a Timing, with the programs that accessed memory, and bytes "loaded" and "stored".
        bytes, footprint: of all accesses, and with each address once a direction.
        again: bytes by group that a program had loaded before in the same launch.
    """

    multiprocessors: int
    launches: list[dict[str, Any]]
    bytes: Moved
    footprint: Moved
    again: dict[str, int]
    again_bytes: int
    total_bytes: int
    footprint_bytes: int


class Code(TypedDict, total=False):
    """Machine code of one kernel.

    Args:
        loads, stores: instructions by their width in bits.
        accesses: the same by argument, "load" and "store"; empty where arguments can't be told apart.
        atomics: types of the elements of atomics in global memory.
        resident_warps: warps that a multiprocessor holds at once, of `possible_warps`, and what it is `limited_by`.
        blocks: blocks of a program; several are a cluster.
        clusters: programs that the GPU holds at once, if its parts are no smaller than a cluster.
    """

    registers: int
    instructions: int
    spill_stores: int
    spill_loads: int
    loads: dict[Any, int]
    stores: dict[Any, int]
    shared_bytes: int
    warps: int
    resident_warps: int
    possible_warps: int
    limited_by: str
    blocks: int
    clusters: int
    accesses: dict[str, dict[str, dict[Any, int]]]
    atomics: list[str]


class Resources(PointFields, Outcome, Code, total=False):
    """One kernel of a point, compiled for a GPU, the `target`, with its launch."""

    target: str
    kernel: str
    config: dict[str, Any]
    programs: int


Ulps = dict[str, float | None]
"""Errors by contender in ulp; None of results that are not finite."""


class Numerics(Outcome, total=False):
    """Largest errors of y and dx on one kind of data."""

    op: str
    dtype: str
    data: str
    columns: int
    y: Ulps
    dx: Ulps


class Host(Outcome, total=False):
    """Host time of one way of calling a norm, in µs.

    Args:
        launch_us, library_us: time of the call's launches alone, and the rest of `call_us`.
        bare_us: time of an autograd.Function that only allocates and saves as much, of a forward and backward.
        torch_us: time of torch's LayerNorm of 8 elements on the CPU.
        direct: the case that does the same work without an operator.
    """

    case: str
    launches: int
    call_us: float
    launch_us: float
    library_us: float
    bare_us: float | None
    torch_us: float
    direct: str | None


class Launches(Outcome, total=False):
    """Work that one training step of one model gives the GPU.

    Args:
        way: "as it is", "converted" or "fused".
        operators: dispatched operators that start a kernel on a GPU, by name.
        launches: of this library.
    """

    model: str
    source: str
    dtype: str
    way: str
    operators: dict[str, int]
    launches: int


class Run(TypedDict, total=False):
    """Facts of a run, and what was timed in it.

    Args:
        contenders: each one's version, or why it is missing.
        copy_gbps: bandwidth of a large copy.
        tests: whether the library's tests passed on this GPU, and their summary.
        choices: launches that were chosen, by kernel and key.
        measuring: the task that was being measured when the last line was written; None between tasks.
        stopped, unreached: why the run ended before its time, and tasks for which no time was left.
    """

    format: int
    environment: dict[str, str]
    contenders: dict[str, str]
    copy_gbps: float
    tests: dict[str, Any]
    choices: dict[str, dict[str, dict[str, Any]]]
    measuring: str | None
    stopped: str
    unreached: list[str]
    clocks_afterwards: dict[str, str]
    records: list[Timing]
    steps: list[Step]


@dataclass
class Static:
    """Records that need no clock."""

    traffic: list[Traffic] = field(default_factory=list)
    resources: list[Resources] = field(default_factory=list)
    numerics: list[Numerics] = field(default_factory=list)

    @property
    def static(self) -> list[Outcome]:
        return [*self.traffic, *self.resources, *self.numerics]


@dataclass
class Results(Static):
    """All that a results file holds."""

    run: Run = field(default_factory=lambda: Run(environment={}, records=[], steps=[]))

    def add(self, kind: str, record: Any) -> None:
        """Adds a record; raises KeyError for an unknown kind."""
        lists: dict[str, list[Any]] = {"timing": self.run["records"], "step": self.run["steps"]}
        lists |= {name: getattr(self, name) for name in STATIC}
        if kind == "facts":
            self.run.update(record)
        else:
            lists[kind].append(record)


def task_name(record: Mapping[str, Any]) -> str:
    """Returns the name of the task that a record is of, which is the str() of a point or a model."""
    if "model" in record:
        return f"step {record['dtype']} {record['model']}"
    layout = "" if record["layout"] == "contiguous" else f" {record['layout']}"
    return f"{record['op']} {record['mode']} {record['dtype']} {'x'.join(map(str, record['shape']))}{layout}"


def dumped(kind: str, record: Mapping[str, Any]) -> str:
    return json.dumps({"kind": kind, **record})


def read(path: Path) -> Results:
    """Reads a results file. An unfinished last line is what an interrupted process left, and is ignored.

    Raises:
        Refused: if it is no results file, with the reason.
    """
    results = Results()
    try:
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                record = json.loads(line)
                results.add(record.pop("kind"), record)
        if results.run.get("format") != FORMAT:
            raise ValueError(f"format {results.run.get('format')}, not {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{path.name} is not a results file: {type(error).__name__}: {error}") from error
    return results


class ResultsFile:
    """A results file that is written, and its content."""

    def __init__(self, path: Path, environment: dict[str, str], resume: bool = False) -> None:
        """Begins a file, or with `resume` goes on with the one that is there, if any.

        Raises:
            Refused: if it is no results file, or was measured with something else.
        """
        self.path, self.results = path, Results()
        if resume and path.exists():
            self.results = read(path)
            before = self.results.run["environment"]
            differing = [name for name in SAME if before.get(name) != environment.get(name)]
            if differing:
                others = "; ".join(f"{name} {before.get(name)}, now {environment.get(name)}" for name in differing)
                raise Refused(f"{path.name} was measured with something else: {others}")
            whole = path.read_text()
            path.write_text(whole[: whole.rfind("\n") + 1])
            self.results.run.pop("stopped", None)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
            self.add("facts", {"format": FORMAT, "environment": environment})

    def drop(self, kinds: Collection[str]) -> None:
        """Removes the records of some kinds, which are to be made anew."""
        lines = self.path.read_text().splitlines(keepends=True)
        self.path.write_text("".join(line for line in lines if json.loads(line)["kind"] not in kinds))
        for kind in kinds:
            getattr(self.results, kind).clear()

    def add(self, kind: str, *records: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            for record in records:
                self.results.add(kind, dict(record))
                file.write(dumped(kind, record) + "\n")


Known = TypeVar("Known", bound=Outcome)


def made(kind: type[Known], *parts: Mapping[str, Any]) -> Known:
    """Returns one record of a kind, put together from parts."""
    return cast(Known, {name: value for part in parts for name, value in part.items()})


def ok(records: Sequence[Known]) -> list[Known]:
    return [record for record in records if record["status"] == "ok"]


def failed(error: BaseException) -> Outcome:
    return {"status": "error", "message": in_a_line(error)}


def in_a_line(error: BaseException) -> str:
    """Returns the first and the last line of an error: Triton's begin with a place and end with the reason."""
    lines = str(error).strip().splitlines()
    ends = dict.fromkeys(line.strip()[:300] for line in (lines[:1] + lines[-1:]))
    return f"{type(error).__name__}: {' ... '.join(ends)}" if lines else type(error).__name__
