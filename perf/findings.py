"""Everything that a report shows, and the figures that are derived from records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

from perf.ops import BULK, FAMILY, ROW_FAMILIES, TITLE
from perf.points import ITEMSIZE, MODE_TITLE, PASSES, STRIDED
from perf.records import STATIC, Numerics, PointFields, Resources, Results, Run, Static, Step, Timing, Traffic, Ulps, ok

OURS = "triton_norm"
OUTPUTS = ("y", "dx")
OVERFLOWING = "as large as the type goes"
"""Data whose squares leave fp32."""
LARGE_BYTES = 16 << 20
"""Inputs above this size are bound by memory, on which contenders are compared by bandwidth."""
STEP_RIVALS = {
    "triton_norm": "torch",
    "triton_norm, compiled": "torch.compile",
    "triton_norm, compiled, kernels forced": "torch.compile",
}
STATUS_TEXT = {"wrong": "outside tolerance"}
"""Texts that stand for a status, unless its name does."""
LAYOUT_TEXT = {"contiguous": "NCHW", "channels_last": "NHWC", STRIDED: "strided"}
ALONE = "one block"
"""The form of programs that share nothing."""
NOT_TIMED = "Nothing was timed on this machine: it has no GPU."


@dataclass(kw_only=True)
class Findings(Static):
    """The content of one report.

    Args:
        environment: of the report.
        timed: runs on GPUs, made here or read from files.
        problems: sentences about the report itself.
        timed_here: the first of `timed` was made for this report.
    """

    environment: dict[str, str]
    timed: list[Run] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    timed_here: bool = False
    interrupted: bool = False

    def add(self, results: Results) -> None:
        if results.run["records"] or results.run["steps"]:
            self.timed.append(results.run)
        for kind in STATIC:
            getattr(self, kind).extend(getattr(results, kind))


def pairs(records: Sequence[Timing], over: str, of: str = OURS) -> list[tuple[Timing, float]]:
    """Returns the record of `of`, and how many times as fast as `over` it is, for each point of both."""
    times: dict[tuple[Any, ...], dict[str, Timing]] = {}
    for r in ok(records):
        key = (r["op"], r["mode"], r["dtype"], r["layout"], *r["shape"])
        times.setdefault(key, {})[r["contender"]] = r
    both = [by_contender for by_contender in times.values() if over in by_contender and of in by_contender]
    return [
        (by_contender[of], by_contender[over]["median_us"] / by_contender[of]["median_us"]) for by_contender in both
    ]


def speedups(records: Sequence[Timing], over: str, of: str = OURS) -> list[float]:
    return [ratio for _, ratio in pairs(records, over, of)]


def step_speedups(steps: Sequence[Step]) -> list[tuple[Step, str, float]]:
    """Returns steps with triton_norm, the contender that each is compared with, and how many times as fast it is."""
    times = {(r["model"], r["dtype"], r["contender"]): r["median_us"] for r in ok(steps)}
    speedups = []
    for record in ok(steps):
        over = STEP_RIVALS.get(record["contender"], "")
        other = times.get((record["model"], record["dtype"], over))
        if other:
            speedups.append((record, over, other / record["median_us"]))
    return speedups


def passes(records: Sequence[Timing]) -> Iterator[tuple[str, str, list[Timing]]]:
    """Yields op and mode with the records of each, where there are any."""
    for op, mode in product(TITLE, PASSES):
        if mine := [record for record in records if (record["op"], record["mode"]) == (op, mode)]:
            yield op, mode, mine


def split(records: Sequence[Timing]) -> Iterator[tuple[str, str, str, list[Timing]]]:
    """Yields op, mode and dtype with the records of each."""
    for op, mode, mine in passes(records):
        for dtype in dict.fromkeys(record["dtype"] for record in mine):
            yield op, mode, dtype, [record for record in mine if record["dtype"] == dtype]


def device_of(run: Run) -> str:
    return run["environment"].get("GPU", "unknown GPU")


def input_bytes(record: PointFields) -> int:
    """Returns the size of x."""
    return prod(record["shape"]) * ITEMSIZE[record["dtype"]]


def shape_text(record: PointFields) -> str:
    return "×".join(map(str, record["shape"]))


def layout_text(record: PointFields) -> str:
    """Returns the shape, and its layout where that is not plain rows."""
    is_of_rows = FAMILY[record["op"]] in ROW_FAMILIES and record["layout"] != STRIDED
    if len(record["shape"]) == 2 or is_of_rows:
        return shape_text(record)
    return f"{shape_text(record)} {LAYOUT_TEXT[record['layout']]}"


def columns_of(record: PointFields) -> dict[str, Any]:
    """Returns the columns that identify a point in tables."""
    about = {"op": TITLE[record["op"]], "pass": MODE_TITLE[record["mode"]]}
    return about | {"dtype": record["dtype"], "shape": layout_text(record)}


def streamed(record: Traffic) -> float:
    """Returns bytes over the floor, without weights and modulations that programs read again and find in cache."""
    again = sum(record["bytes"]["parameters"].values()) - sum(record["footprint"]["parameters"].values())
    return (record["total_bytes"] - again) / record["floor_bytes"]


def uncached(record: Traffic) -> float:
    """Returns `streamed` without the bytes that a program loads again, which are still in cache."""
    return streamed(record) - record["again_bytes"] / record["floor_bytes"]


def access_bits(record: Resources) -> int:
    """Returns the narrowest access to x, y and their like; where arguments are not told apart, the widest of all."""
    bulk = [access for name, access in record["accesses"].items() if name in BULK]
    if record["accesses"]:
        return min((int(bits) for access in bulk for widths in access.values() for bits in widths), default=128)
    return max(map(int, {**record["loads"], **record["stores"]}), default=128)


def form_text(config: Mapping[str, Any]) -> str:
    """Returns how many blocks or programs share a row or channel, if a launch's config tells."""
    n_blocks, n_peers = config.get("num_ctas", 1), config.get("PEERS", 1)
    if n_blocks > 1:
        return f"cluster of {n_blocks}"
    return f"{n_peers} peers" if n_peers > 1 else ALONE


def blocks_of(record: Timing | Traffic) -> int:
    """Returns the most blocks of a cluster of a call; 1 of a call without clusters, and of older records."""
    return max((launch.get("config", {}).get("num_ctas", 1) for launch in record.get("launches", [])), default=1)


def reads_twice(record: Timing | Traffic) -> bool:
    """Decides whether a kernel was launched twice in a call, first to reduce and then to apply."""
    kernels = [launch["kernel"] for launch in record.get("launches", [])]
    return len(set(kernels)) < len(kernels)


def forms_text(record: Timing | Traffic) -> str:
    """Returns the form of a call's launches: clusters, two launches, or programs that share a row, if any."""
    if reads_twice(record):
        return "two launches"
    forms = dict.fromkeys(form_text(launch.get("config", {})) for launch in record.get("launches", []))
    return ", ".join(form for form in forms if form != ALONE)


def ulps_of(record: Numerics, output: str) -> Ulps:
    return record["y"] if output == "y" else record["dx"]


def ulps_text(ulps: float | None) -> str:
    return "not finite" if ulps is None else f"{ulps:.2f} ulp" if ulps < 1000 else f"{ulps:.1e} ulp"


def worst(errors: Sequence[float | None]) -> float | None:
    """Returns the largest error, or None, which is not finite, if any is."""
    return None if None in errors else max(error for error in errors if error is not None)


def is_worse(ulps: Ulps) -> bool:
    """Returns whether triton_norm is further off than torch, in the digits that are shown."""
    ours, theirs = ulps[OURS], ulps["torch"]
    if ours is None or theirs is None:
        return ours is None and theirs is not None
    return round(ours, 2) > round(theirs, 2)


def counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
