"""Compares results with the bars that the design states, and lists the causes for which some fall short."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf, prod
from statistics import geometric_mean
from typing import NamedTuple

from perf.findings import (
    LARGE_BYTES,
    OURS,
    OUTPUTS,
    Findings,
    access_bits,
    counted,
    device_of,
    input_bytes,
    is_worse,
    layout_text,
    pairs,
    speedups,
    split,
    step_speedups,
    ulps_of,
    ulps_text,
    uncached,
)
from perf.ops import FAMILY, ROW_FAMILIES, TITLE
from perf.points import MODE_TITLE
from perf.records import Numerics, PointFields, Resources, Run, Timing, Traffic, ok

# An error from this many ulp is far from exact, even where torch's is larger.
FAR_ULP = 16
# More than this many times the floor's bytes is too much.
MOST_BYTES_OVER_FLOOR = 1.25
# Less than this share of the warps that a multiprocessor holds is few.
FEW_WARPS = 0.25
# Accesses to x, y and their like of fewer bits are narrow.
NARROW_BITS = 64
# Up to LARGE_BYTES this share of another's speed is as fast.
LEVEL = 0.95
# The bars for a share of the copy bandwidth are about rows from this many elements.
LEAST_ROW_ELEMENTS = 1 << 26
# The L2 that the bars were stated for, an H200's, and how many adjacent channels a program takes together.
CACHE_BYTES = 50 << 20
SLAB_CHANNELS = 32

ROWS, RESIDUAL = ("layer_norm", "rms_norm"), ("layer_norm_residual", "rms_norm_residual")
ADDED = ("batch_norm", "batch_norm_add_relu")


@dataclass(frozen=True)
class Bar:
    """The least share of the copy bandwidth; of several bars the first that is about a point holds.

    Args:
        columns: least and most columns, of rows.
        fits: only where a channel fits in cache.
        two_launches: bytes are those of two launches.
    """

    ops: tuple[str, ...]
    mode: str
    least: float
    columns: tuple[float, float] = (1, inf)
    fits: bool = False
    two_launches: bool = False

    @property
    def is_of_rows(self) -> bool:
        return FAMILY[self.ops[0]] in ROW_FAMILIES

    @property
    def text(self) -> str:
        low, high = self.columns
        parts = [f"{low:g} to {high:g} columns"] if high < inf else []
        parts += [f"from {LEAST_ROW_ELEMENTS >> 20}M elements" if self.is_of_rows else f"above {LARGE_BYTES >> 20} MiB"]
        parts += ["a channel fits in L2"] if self.fits else []
        parts += ["bytes of two launches"] if self.two_launches else []
        return ", ".join(parts)

    def is_about(self, record: Timing) -> bool:
        if record["op"] not in self.ops or record["mode"] != self.mode:
            return False
        if not self.is_of_rows:
            return input_bytes(record) > LARGE_BYTES and (not self.fits or slab_bytes(record) <= CACHE_BYTES)
        low, high = self.columns
        return prod(record["shape"]) >= LEAST_ROW_ELEMENTS and low <= record["shape"][-1] <= high

    def share(self, record: Timing, copy_gbps: float) -> float:
        size = record["apart_floor_bytes"] if self.two_launches else record["floor_bytes"]
        return size / record["median_us"] / 1e3 / copy_gbps


BARS = (
    Bar(ROWS, "forward", 0.95, (1 << 10, 1 << 16)),
    Bar(ROWS, "forward", 0.90, (1 << 7, 1 << 18)),
    Bar(RESIDUAL, "forward", 0.95),
    Bar(ROWS, "backward", 0.85, (1 << 10, 1 << 14)),
    Bar(ROWS, "backward", 0.75),
    Bar(("batch_norm",), "forward", 0.80, fits=True),
    Bar(("batch_norm",), "forward", 0.90, two_launches=True),
    Bar(ADDED, "backward", 0.75, fits=True),
    Bar(ADDED, "backward", 0.90, two_launches=True),
    Bar(("batch_norm_eval",), "forward", 0.95),
    Bar(("batch_norm_eval",), "backward", 0.90),
)
MEANS = {
    ("layer_norm", "backward", "bf16"): 2.0,
    ("batch_norm", "forward", "bf16"): 2.0,
    ("batch_norm", "backward", "bf16"): 2.0,
}
"""The least geometric mean of speed-ups over torch eager."""


class Case(NamedTuple):
    """Describes one result that is compared with a bar.

    Args:
        cause: a text that cases of one cause have in common.
        figure: the result in words.
        where: the input.
        badness: orders cases; None of a result that meets the bar.
        is_counted: the cause tells how many results were compared with the bar.
    """

    cause: str
    figure: str = ""
    where: str = ""
    badness: float | None = 0.0
    is_counted: bool = False

    @property
    def line(self) -> str:
        return f"{self.where}: {self.figure}" if self.figure else self.where


class Cause(NamedTuple):
    """A reason for which results fall short, with all of them, the worst first; `of`: how many were compared, 0 where
    that isn't told."""

    text: str
    cases: list[Case]
    of: int = 0

    @property
    def badness(self) -> float:
        return self.cases[0].badness or 0.0

    @property
    def line(self) -> str:
        first, n = self.cases[0], len(self.cases)
        count = f" on {n} of {self.of}" if self.of else f" in {n} cases" if n > 1 else ""
        figure = f"{', at worst' if n > 1 else ':'} {first.figure}" if first.figure else ""
        return self.text + count + figure + (f" ({first.where})" if first.where else "")


Cases = Iterator[Case]


def _causes(cases: Iterable[Case]) -> list[Cause]:
    """Returns the causes of cases that fall short, the worst first."""
    by_cause: dict[str, list[Case]] = {}
    for case in cases:
        by_cause.setdefault(case.cause, []).append(case)
    causes = []
    for text, cases_of_cause in by_cause.items():
        short = [case for case in cases_of_cause if case.badness is not None]
        short.sort(key=lambda case: case.badness or 0.0, reverse=True)
        if short:
            causes.append(Cause(text, short, len(cases_of_cause) if cases_of_cause[0].is_counted else 0))
    return sorted(causes, key=lambda cause: cause.badness, reverse=True)


def slab_bytes(record: Timing) -> int:
    """Returns bytes that the programs of one channel, or of those side by side, read before they write."""
    together = SLAB_CHANNELS if record["layout"] == "channels_last" or len(record["shape"]) == 2 else 1
    tensors = 2 if record["mode"] == "backward" else 1
    channels = record["shape"][1]
    return input_bytes(record) // channels * min(together, channels) * tensors


def bar_of(record: Timing) -> Bar | None:
    return next((bar for bar in BARS if bar.is_about(record)), None)


def is_short(record: Timing, copy_gbps: float | None) -> bool:
    """Returns whether a timed record of ours is below its bar."""
    bar = bar_of(record)
    if bar is None or not copy_gbps or record["status"] != "ok" or record["contender"] != OURS:
        return False
    return bar.share(record, copy_gbps) < bar.least


def shortfalls(findings: Findings) -> dict[str, list[Cause]]:
    """Returns causes under titles, the worst first."""
    by_title: dict[str, Iterable[Case]] = {}
    for run in findings.timed:
        where = f", {device_of(run)}, {run['environment'].get('date', '')}" if len(findings.timed) > 1 else ""
        by_title |= {f"{title}{where}": check(run) for title, check in OF_A_RUN.items()}
    by_title["The report"] = [Case(problem) for problem in findings.problems]
    by_title["Exactness"] = _inexact(findings.numerics)
    by_title["Bytes moved"] = _traffic(findings.traffic)
    by_title["Machine code"] = _machine_code(findings.resources)
    return {title: causes for title, cases in by_title.items() if (causes := _causes(cases))}


def _run_itself(run: Run) -> Cases:
    tests = run.get("tests", {})
    if tests.get("passed") is False:
        yield Case(f"the tests did not pass: {tests['summary']}")
    if run.get("stopped"):
        yield Case(f"the run stopped early: {run['stopped']}")
    if run.get("unreached"):
        yield Case(f"{counted(len(run['unreached']), 'point')} not reached in the time given")
    for who, status in run.get("contenders", {}).items():
        if status.startswith("missing"):
            yield Case(f"{who}: {status}")


def _failed(run: Run) -> Cases:
    """Yields failures, of which a contender's with one message are one cause; ours come first."""
    timings = [(r, f"{_op_of(r)} {layout_text(r)} {r['dtype']}") for r in run["records"]]
    steps = [(s, f"training step of {s['model']} in {s['dtype']}") for s in run["steps"]]
    for record, where in (*timings, *steps):
        who = record["contender"]
        badness = float(who.startswith(OURS))
        if record["status"] == "error":
            yield Case(f"{who}: {record['message']}", "", where, badness)
        elif record["status"] == "wrong":
            yield Case(f"{who} is outside our tolerance", record["message"], where, badness)


def _op_of(record: PointFields) -> str:
    return f"{TITLE[record['op']]} {MODE_TITLE[record['mode']]}"


def _slower(run: Run, over: str, least: float, chosen: Callable[[Timing], bool], where: str = "") -> Cases:
    """Yields the `chosen` points; those on which the speed-up is below `least` fall short."""
    for record, ratio in pairs(run["records"], over):
        if chosen(record):
            text = f"{_op_of(record)} {record['dtype']}: slower than {over}{where}"
            badness = 1 / ratio if ratio < least else None
            yield Case(text, f"{ratio:.2f}× its speed", layout_text(record), badness, is_counted=True)


def _slower_than_torch(run: Run) -> Cases:
    yield from _slower(run, "torch", 1.0, lambda record: True)
    for op, mode, dtype, records in split(run["records"]):
        least, ratios = MEANS.get((op, mode, dtype), 0.0), speedups(records, "torch")
        if ratios and (mean := geometric_mean(ratios)) < least:
            figure = f"{mean:.2f}× torch's speed where {least:g}× is wanted"
            points = counted(len(ratios), "point")
            yield Case(f"{TITLE[op]} {mode} {dtype}: geometric mean", figure, points, least / mean)


def _slower_than_others(run: Run) -> Cases:
    for other in dict.fromkeys(r["contender"] for r in run["records"]):
        if other not in (OURS, "torch"):
            size = f"{LARGE_BYTES >> 20} MiB"
            yield from _slower(run, other, 1.0, lambda r: input_bytes(r) > LARGE_BYTES, f" above {size}")
            yield from _slower(run, other, LEVEL, lambda r: input_bytes(r) <= LARGE_BYTES, f" up to {size}")


def _below_bars(run: Run) -> Cases:
    copy = run.get("copy_gbps")
    for r in ok(run["records"]):
        bar = bar_of(r) if copy and r["contender"] == OURS else None
        if copy and bar:
            share, counting = bar.share(r, copy), " counted as two launches" if bar.two_launches else ""
            figure = f"{share:.0%} of the copy bandwidth{counting} where {bar.least:.0%} is wanted"
            badness = bar.least / share if is_short(r, copy) else None
            yield Case(f"{_op_of(r)} {r['dtype']}: below the bar", figure, layout_text(r), badness, is_counted=True)


def _slower_steps(run: Run) -> Cases:
    for r, over, x in step_speedups(run["steps"]):
        if x < 1:
            yield Case(
                f"a step with {r['contender']} slower than with {over}", f"{x:.2f}× its speed", r["model"], 1 / x
            )


OF_A_RUN: dict[str, Callable[[Run], Cases]] = {
    "Failed or outside our tolerance": _failed,
    "The timed run": _run_itself,
    "Too slow against torch eager": _slower_than_torch,
    "Slower steps of whole models": _slower_steps,
    "Too slow against others": _slower_than_others,
    "Below the bars for a share of the copy bandwidth": _below_bars,
}


def _traffic(records: Sequence[Traffic]) -> Cases:
    for r in records:
        where = f"{layout_text(r)} {r['dtype']}"
        if r["status"] != "ok":
            yield Case(f"{_op_of(r)}: not counted", r["message"], where, inf)
        elif (bytes_over_floor := uncached(r)) > MOST_BYTES_OVER_FLOOR:
            text = f"{_op_of(r)} moves more than {MOST_BYTES_OVER_FLOOR:g} times the floor's bytes"
            yield Case(text, f"{bytes_over_floor:.2f} times", where, bytes_over_floor)


def _machine_code(records: Sequence[Resources]) -> Cases:
    for r in records:
        where = f"{r['target']}, {_op_of(r)} {r['dtype']} {layout_text(r)}"
        if r["status"] != "ok":
            yield Case(f"{TITLE[r['op']]} does not compile", r["message"], where, 5e6)
            continue
        if r["spill_stores"]:
            yield Case(f"{r['kernel']} spills", f"{r['spill_stores']} stores", where, 3e6 + r["spill_stores"])
        warps = f"{r['resident_warps']} of {r['possible_warps']} warps, by {r['limited_by']}"
        if r["resident_warps"] == 0:
            yield Case(f"{r['kernel']} cannot be launched", r["limited_by"], where, 4e6)
        elif r["resident_warps"] < FEW_WARPS * r["possible_warps"]:
            yield Case(f"{r['kernel']} fills few warps", warps, where, 1e6 - r["resident_warps"])
        if (bits := access_bits(r)) < NARROW_BITS:
            yield Case(f"{r['kernel']} moves few bytes an instruction", f"{bits // 8} bytes", where, 2e6 - bits)


def _inexact(records: Sequence[Numerics]) -> Cases:
    """Yields outputs compared with torch's, and those that are far off as torch's are."""
    for r in records:
        if r["status"] != "ok":
            yield Case(f"{TITLE[r['op']]} {r['dtype']}: not computed", r["message"], r["data"], inf)
            continue
        for output in OUTPUTS:
            ulps, where = ulps_of(r, output), f"{r['data']}, {r['columns']} columns"
            ours = inf if ulps[OURS] is None else float(ulps[OURS] or 0)
            name = f"{TITLE[r['op']]} {r['dtype']} {output}"
            figure = f"{ulps_text(ulps[OURS])} where torch has {ulps_text(ulps['torch'])}"
            badness = 1e9 + ours - (ulps["torch"] or 0) if is_worse(ulps) else None
            yield Case(f"{name}: less exact than torch", figure, where, badness, is_counted=True)
            if badness is None and ours > FAR_ULP:
                yield Case(f"{name}: no worse than torch, and far from exact all the same", figure, where, ours)
