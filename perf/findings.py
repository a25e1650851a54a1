"""What was found out, and the few figures that are derived from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from perf.points import BULK, ITEMSIZE, PASSES, TITLE

Record = dict[str, Any]
OUTPUTS = ("y", "dx")
OVERFLOWING = "as large as the type goes"  # data whose squares leave fp32
STEP_RIVALS = {
    "triton_norm": "torch",
    "triton_norm, compiled": "torch.compile",
    "triton_norm, compiled, kernels forced": "torch.compile",
}
NOT_TIMED = "Nothing was timed on this machine: it has no GPU."


@dataclass
class Findings:
    """Everything that one report shows. `timed` holds runs made here and runs read from files."""

    environment: dict[str, str]
    kind: str = "report"
    format: int = 1
    timed: list[Record] = field(default_factory=list)
    traffic: list[Record] = field(default_factory=list)
    resources: list[Record] = field(default_factory=list)
    numerics: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    timed_here: bool = False
    interrupted: bool = False


def in_a_line(error: BaseException) -> str:
    """Its first and its last line: Triton's errors begin with a place and end with what is wrong."""
    lines = str(error).strip().splitlines()
    ends = dict.fromkeys(line.strip()[:300] for line in (lines[:1] + lines[-1:]))
    return f"{type(error).__name__}: {' ... '.join(ends)}" if lines else type(error).__name__


def ok(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["status"] == "ok"]


def pairs(records: Sequence[Record], over: str, of: str = "triton_norm") -> list[tuple[Record, float]]:
    """On every point that both were timed on: the record of `of`, and how many times faster than `over` it is."""
    times: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in ok(records):
        key = tuple(record[name] for name in ("op", "mode", "dtype", "layout")) + tuple(record["shape"])
        times.setdefault(key, {})[record["contender"]] = record
    both = [found for found in times.values() if over in found and of in found]
    return [(found[of], found[over]["median_us"] / found[of]["median_us"]) for found in both]


def speedups(records: Sequence[Record], over: str, of: str = "triton_norm") -> list[float]:
    return [ratio for _, ratio in pairs(records, over, of)]


def step_speedups(steps: Sequence[Record]) -> list[tuple[Record, str, float]]:
    """Steps with triton_norm, what each is held against, and how many times faster it is."""
    times = {(r["model"], r["dtype"], r["contender"]): r["median_us"] for r in ok(steps)}
    found = []
    for record in ok(steps):
        over = STEP_RIVALS.get(record["contender"])
        other = times.get((record["model"], record["dtype"], over))
        if over and other:
            found.append((record, over, other / record["median_us"]))
    return found


def split(records: Sequence[Record]) -> Iterator[tuple[str, str, str, list[Record]]]:
    """Timed records by op, mode and dtype."""
    for op in TITLE:
        for mode in PASSES:
            mine = [record for record in records if (record["op"], record["mode"]) == (op, mode)]
            for dtype in dict.fromkeys(record["dtype"] for record in mine):
                yield op, mode, dtype, [record for record in mine if record["dtype"] == dtype]


def device_of(run: Record) -> str:
    return str(run["environment"].get("GPU", "unknown GPU"))


def input_bytes(record: Record) -> int:
    """Of x alone."""
    return prod(record["shape"]) * ITEMSIZE[record["dtype"]]


def shape_text(record: Record) -> str:
    return "×".join(map(str, record["shape"]))


def lying(record: Record) -> str:
    """The shape, and for channels how it lies in memory."""
    if len(record["shape"]) == 2:
        return shape_text(record)
    return f"{shape_text(record)} {'NHWC' if record['layout'] == 'channels_last' else 'NCHW'}"


def streamed(record: Record) -> float:
    """Bytes over the floor, without the weights that every program reads again and finds in cache."""
    again = sum(record["bytes"]["parameters"].values()) - sum(record["footprint"]["parameters"].values())
    return float((record["total_bytes"] - again) / record["floor_bytes"])


def uncached(record: Record) -> float:
    """The same, without what a program reads again itself: a launch is made so only where that is still in cache."""
    return streamed(record) - float(record["again_bytes"] / record["floor_bytes"])


def over_its_form(record: Record) -> float:
    """The same, over the floor of as many launches as there are: of two, what is reduced is read twice."""
    floor = "floor_bytes" if len(record["launches"]) == 1 else "apart_floor_bytes"
    return uncached(record) * float(record["floor_bytes"] / record[floor])


def exchanged(record: Record) -> float:
    """What of that is partial sums, what programs wait with, and statistics beyond each once: in cache all of it."""
    floor = "floor_bytes" if len(record["launches"]) == 1 else "apart_floor_bytes"
    partials = sum(record["bytes"]["partials"].values()) - record["again"].get("partials", 0)
    statistics = sum(record["bytes"]["statistics"].values()) - sum(record["footprint"]["statistics"].values())
    return float((partials + statistics - record["again"].get("statistics", 0)) / record[floor])


def access_bits(record: Record) -> int:
    """Of x, y and their like the narrowest access; where arguments are not told apart, the widest of all."""
    bulk = [access for name, access in record["accesses"].items() if name in BULK]
    if record["accesses"]:
        return min((int(bits) for access in bulk for widths in access.values() for bits in widths), default=128)
    return max(map(int, {**record["loads"], **record["stores"]}), default=128)


def ulps_text(ulps: float | None) -> str:
    return "not finite" if ulps is None else f"{ulps:.2f} ulp" if ulps < 1000 else f"{ulps:.1e} ulp"


def worst(errors: Sequence[float | None]) -> float | None:
    """The largest; None, not finite, if any is."""
    return None if None in errors else max(error for error in errors if error is not None)


def is_worse(ulps: dict[str, float | None]) -> bool:
    """Whether triton_norm is further off than torch, in the digits that are shown."""
    ours, theirs = ulps["triton_norm"], ulps["torch"]
    if ours is None or theirs is None:
        return ours is None and theirs is not None
    return round(ours, 2) > round(theirs, 2)
