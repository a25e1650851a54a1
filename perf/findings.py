"""What was found out, and the few figures that are derived from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from perf.points import BULK, PASSES, TITLE

Record = dict[str, Any]
OUTPUTS = ("y", "dx")
FAR = 16  # ulp
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


def speedups(records: Sequence[Record], over: str, of: str = "triton_norm") -> list[float]:
    """How many times faster, on every point that both were timed on."""
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for record in ok(records):
        key = tuple(record[name] for name in ("op", "mode", "dtype", "layout")) + tuple(record["shape"])
        times.setdefault(key, {})[record["contender"]] = record["median_us"]
    return [found[over] / found[of] for found in times.values() if over in found and of in found]


def split(records: Sequence[Record]) -> Iterator[tuple[str, str, str, list[Record]]]:
    """Timed records by op, mode and dtype: one figure each."""
    for op in TITLE:
        for mode in PASSES:
            mine = [record for record in records if (record["op"], record["mode"]) == (op, mode)]
            for dtype in dict.fromkeys(record["dtype"] for record in mine):
                yield op, mode, dtype, [record for record in mine if record["dtype"] == dtype]


def shape_text(record: Record) -> str:
    return "×".join(map(str, record["shape"]))


def lying(record: Record) -> str:
    """The shape, and for channels how it lies in memory."""
    if len(record["shape"]) == 2:
        return shape_text(record)
    return f"{shape_text(record)} {'NHWC' if record['layout'] == 'channels_last' else 'NCHW'}"


def shortfalls(findings: Findings) -> list[str]:
    """Everything that is not as it should be, in words, worst first; the page's most useful list."""
    found = []
    for run in findings.timed:
        device = run["environment"].get("GPU", "unknown GPU")
        failed = [r for r in run["records"] if r["status"] in ("wrong", "error")]
        found += [f"{device}: {r['contender']} on {_name(r)}: {r['status']}, {r['message']}" for r in failed]
        for op, mode, dtype, records in split(run["records"]):
            slower = [ratio for ratio in speedups(records, "torch") if ratio < 1]
            if slower:
                text = f"slower than torch eager on {len(slower)} points, at worst {min(slower):.2f}×"
                found.append(f"{device}: {TITLE[op]} {mode} {dtype}: {text}")
        if run.get("unreached"):
            found.append(f"{device}: {len(run['unreached'])} points were not reached in the time given")
        if run.get("tests", {}).get("passed") is False:
            found.append(f"{device}: the tests did not pass: {run['tests']['summary']}")
    found += [f"traffic of {_name(r)}: {r['status']}, {r['message']}" for r in findings.traffic if r["status"] != "ok"]
    found += [
        f"{_name(r)}: moves {uncached(r):.2f} times the floor's bytes, weights counted once"
        for r in sorted(ok(findings.traffic), key=uncached, reverse=True)
        if uncached(r) > 1.25
    ]
    return found + _code_shortfalls(findings.resources) + _inexact(findings.numerics)


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


def _code_shortfalls(records: Sequence[Record]) -> list[str]:
    """One line for each kernel, shape and complaint, with the targets that it is true of."""
    found: dict[str, list[str]] = {}
    for r in records:
        where = f"{r['kernel']} ({_name(r)})"
        if r["status"] != "ok":
            found.setdefault(f"{_name(r)} does not compile: {r['message']}", []).append(r["target"])
            continue
        if r["spill_stores"]:
            found.setdefault(f"{where} spills, stores", []).append(f"{r['target']}: {r['spill_stores']}")
        if r["resident_warps"] == 0:
            found.setdefault(f"{where} cannot be launched", []).append(f"{r['target']}: {r['limited_by']}")
        elif r["resident_warps"] < 0.25 * r["possible_warps"]:
            text = f"{r['target']}: {r['resident_warps']} of {r['possible_warps']} warps, by {r['limited_by']}"
            found.setdefault(f"{where} fills few warps", []).append(text)
        width = access_bits(r)
        if width < 64:
            found.setdefault(f"{where} moves few bytes an instruction", []).append(f"{r['target']}: {width // 8}")
    return [f"{what} ({'; '.join(targets)})" for what, targets in found.items()]


def access_bits(record: Record) -> int:
    """Of x, y and their like the narrowest access; where arguments are not told apart, the widest of all."""
    bulk = [access for name, access in record["accesses"].items() if name in BULK]
    if record["accesses"]:
        return min((int(bits) for access in bulk for widths in access.values() for bits in widths), default=128)
    return max(map(int, {**record["loads"], **record["stores"]}), default=128)


def ulps_text(ulps: float | None) -> str:
    return "not finite" if ulps is None else f"{ulps:.2f} ulp" if ulps < 1000 else f"{ulps:.1e} ulp"


def is_worse(ulps: dict[str, float | None]) -> bool:
    """Whether triton_norm is further off than torch, in the digits that are shown."""
    ours, theirs = ulps["triton_norm"], ulps["torch"]
    if ours is None or theirs is None:
        return ours is None and theirs is not None
    return round(ours, 2) > round(theirs, 2)


def _inexact(records: Sequence[Record]) -> list[str]:
    """Outputs that are further off than torch's, and those that are far off as torch's are."""
    failed = [r for r in records if r["status"] != "ok"]
    found = [f"exactness of {r['op']} {r['dtype']} on {r['data']}: {r['status']}, {r['message']}" for r in failed]
    groups: dict[str, list[Record]] = {}
    for r in ok(records):
        for output in OUTPUTS:
            about = {"data": r["data"], "columns": r["columns"], **r[output]}
            groups.setdefault(f"{TITLE[r['op']]} {r['dtype']} {output}", []).append(about)
    for name, members in groups.items():
        worse = [member for member in members if is_worse(member)]
        if worse:
            worst = max(worse, key=lambda member: _off(member["triton_norm"]) - _off(member["torch"]))
            ours, theirs = ulps_text(worst["triton_norm"]), ulps_text(worst["torch"])
            where = f"{ours} where torch has {theirs} ({worst['data']}, {worst['columns']} columns)"
            found.append(f"{name}: less exact than torch on {len(worse)} of {len(members)} inputs, at worst {where}")
        far: dict[str, float] = {}
        for member in members:
            if _off(member["triton_norm"]) > FAR and member not in worse:
                far[member["data"]] = max(far.get(member["data"], 0.0), _off(member["triton_norm"]))
        if far:
            listed = ", ".join(f"{data} (up to {ulps_text(ulps)})" for data, ulps in far.items())
            found.append(f"{name}: no worse than torch, and far from exact all the same: {listed}")
    return found


def _off(ulps: float | None) -> float:
    return inf if ulps is None else ulps


def _name(record: Record) -> str:
    return f"{record['op']} {record['mode']} {record['dtype']} {lying(record)}"
