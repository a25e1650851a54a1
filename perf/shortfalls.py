"""Results held against the bars that the design states: every cause for which some result falls short."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from perf.ops import TITLE
from perf.points import MODE_TITLE
from perf.records import Numerics, Resources, Run, Timing, Traffic, ok

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
# A share of the copy bandwidth is asked for rows from this many elements.
LEAST_ROW_ELEMENTS = 1 << 26
# The L2 that the bars were stated for, an H200's, and how many channels that lie side by side a program takes together.
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
    def text(self) -> str:
        low, high = self.columns
        is_rows = self.ops[0] in ROWS + RESIDUAL
        parts = [f"{low:g} to {high:g} columns"] if high < inf else []
        parts += [f"from {LEAST_ROW_ELEMENTS >> 20}M elements" if is_rows else f"above {LARGE_BYTES >> 20} MiB"]
        parts += ["a channel fits in L2"] if self.fits else []
        parts += ["bytes of two launches"] if self.two_launches else []
        return ", ".join(parts)

    def is_about(self, record: Timing) -> bool:
        if record["op"] not in self.ops or record["mode"] != self.mode:
            return False
        if record["op"].startswith("batch_norm"):
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
MEANS = {("layer_norm", "backward", "bf16"): 2.0, ("batch_norm", "forward", "bf16"): 2.0} | {
    ("batch_norm", "backward", "bf16"): 2.0
}
"""The least geometric mean of speed-ups over torch eager."""


class Case(NamedTuple):
    """One result that falls short: how bad it is, its figure, and the input."""

    badness: float
    figure: str
    where: str

    @property
    def line(self) -> str:
        return f"{self.where}: {self.figure}" if self.figure else self.where


class Cause(NamedTuple):
    """A reason for which results fall short, with all of them, the worst first; `of`: how many were held against it."""

    text: str
    cases: list[Case]
    of: int = 0

    @property
    def line(self) -> str:
        first, n = self.cases[0], len(self.cases)
        count = f" on {n} of {self.of}" if self.of else f" in {n} cases" if n > 1 else ""
        figure = f"{', at worst' if n > 1 else ':'} {first.figure}" if first.figure else ""
        return self.text + count + figure + (f" ({first.where})" if first.where else "")


def _causes(cases: Iterator[tuple[str, Case]], of: dict[str, int] | None = None) -> list[Cause]:
    """Returns cases by the text of their cause, the worst first."""
    found: dict[str, list[Case]] = {}
    for text, case in cases:
        found.setdefault(text, []).append(case)
    by_badness = [(text, sorted(mine, reverse=True, key=lambda case: case.badness)) for text, mine in found.items()]
    causes = [Cause(text, mine, (of or {}).get(text, 0)) for text, mine in by_badness]
    return sorted(causes, reverse=True, key=lambda cause: cause.cases[0].badness)


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
    found: dict[str, list[Cause]] = {}
    for run in findings.timed:
        where = f", {device_of(run)}, {run['environment'].get('date', '')}" if len(findings.timed) > 1 else ""
        found |= {f"{title}{where}": check(run) for title, check in OF_A_RUN.items()}
    found["The report"] = [Cause(problem, [Case(0, "", "")]) for problem in findings.problems]
    found["Exactness"] = _inexact(findings.numerics)
    found["Bytes moved"] = _traffic(findings.traffic)
    found["Machine code"] = _machine_code(findings.resources)
    return {title: causes for title, causes in found.items() if causes}


def _run_itself(run: Run) -> list[Cause]:
    texts = []
    tests = run.get("tests", {})
    if tests.get("passed") is False:
        texts.append(f"the tests did not pass: {tests['summary']}")
    if run.get("stopped"):
        texts.append(f"the run stopped early: {run['stopped']}")
    if run.get("unreached"):
        texts.append(f"{counted(len(run['unreached']), 'point')} not reached in the time given")
    texts += [f"{who}: {status}" for who, status in run.get("contenders", {}).items() if status.startswith("missing")]
    return [Cause(text, [Case(0, "", "")]) for text in texts]


def _failed(run: Run) -> list[Cause]:
    """Returns a cause for each contender that fails with one message, or is outside the tolerance; ours come first."""
    found: list[tuple[str, str, str, str]] = []
    for r in run["records"]:
        where = f"{TITLE[r['op']]} {MODE_TITLE[r['mode']]} {layout_text(r)} {r['dtype']}"
        found.append((r["contender"], r["status"], r["message"], where))
    for s in run["steps"]:
        where = f"training step of {s['model']} in {s['dtype']}"
        found.append((s["contender"], s["status"], s["message"], where))

    def cases() -> Iterator[tuple[str, Case]]:
        for who, status, message, where in found:
            if status == "error":
                yield f"{who}: {message}", Case(who.startswith(OURS), "", where)
            elif status == "wrong":
                yield f"{who} is outside our tolerance", Case(who.startswith(OURS), message, where)

    return _causes(cases())


def _slower(run: Run, over: str, least: float, chosen: Callable[[Timing], bool], where: str = "") -> list[Cause]:
    """Returns a cause for each op, pass and type on some of whose `chosen` points the speed-up is below `least`."""
    causes = []
    for op, mode, dtype, records in split(run["records"]):
        compared = [(record, ratio) for record, ratio in pairs(records, over) if chosen(record)]
        text = f"{TITLE[op]} {MODE_TITLE[mode]} {dtype}: slower than {over}{where}"
        cases = [(text, Case(1 / x, f"{x:.2f}× its speed", layout_text(r))) for r, x in compared if x < least]
        causes += _causes(iter(cases), {text: len(compared)})
    return causes


def _slower_than_torch(run: Run) -> list[Cause]:
    causes = _slower(run, "torch", 1.0, lambda record: True)
    for (op, mode, dtype), least in MEANS.items():
        ratios = speedups([r for r in run["records"] if (r["op"], r["mode"], r["dtype"]) == (op, mode, dtype)], "torch")
        if ratios and geometric_mean(ratios) < least:
            figure = f"{geometric_mean(ratios):.2f}× torch's speed where {least:g}× is wanted"
            case = Case(least / geometric_mean(ratios), figure, counted(len(ratios), "point"))
            causes.append(Cause(f"{TITLE[op]} {mode} {dtype}: geometric mean", [case]))
    return sorted(causes, reverse=True, key=lambda cause: cause.cases[0].badness)


def _slower_than_others(run: Run) -> list[Cause]:
    causes: list[Cause] = []
    for other in dict.fromkeys(r["contender"] for r in run["records"]):
        if other not in (OURS, "torch"):
            size = f"{LARGE_BYTES >> 20} MiB"
            causes += _slower(run, other, 1.0, lambda r: input_bytes(r) > LARGE_BYTES, f" above {size}")
            causes += _slower(run, other, LEVEL, lambda r: input_bytes(r) <= LARGE_BYTES, f" up to {size}")
    return sorted(causes, reverse=True, key=lambda cause: cause.cases[0].badness)


def _below_bars(run: Run) -> list[Cause]:
    copy = run.get("copy_gbps")
    causes: list[Cause] = []
    for op, mode, dtype, records in split(run["records"]):
        mine = [(r, bar) for r in ok(records) if r["contender"] == OURS and (bar := bar_of(r))]
        text = f"{TITLE[op]} {MODE_TITLE[mode]} {dtype}: below the bar"
        cases = []
        for r, bar in mine:
            if copy and is_short(r, copy):
                share, counting = bar.share(r, copy), " counted as two launches" if bar.two_launches else ""
                figure = f"{share:.0%} of the copy bandwidth{counting} where {bar.least:.0%} is wanted"
                cases.append((text, Case(bar.least / share, figure, layout_text(r))))
        causes += _causes(iter(cases), {text: len(mine)})
    return sorted(causes, reverse=True, key=lambda cause: cause.cases[0].badness)


def _slower_steps(run: Run) -> list[Cause]:
    return _causes(
        (f"a step with {r['contender']} slower than with {over}", Case(1 / x, f"{x:.2f}× its speed", r["model"]))
        for r, over, x in step_speedups(run["steps"])
        if x < 1
    )


OF_A_RUN: dict[str, Callable[[Run], list[Cause]]] = {
    "Failed or outside our tolerance": _failed,
    "The timed run": _run_itself,
    "Too slow against torch eager": _slower_than_torch,
    "Slower steps of whole models": _slower_steps,
    "Too slow against others": _slower_than_others,
    "Below the bars for a share of the copy bandwidth": _below_bars,
}


def _traffic(records: Sequence[Traffic]) -> list[Cause]:
    def cases() -> Iterator[tuple[str, Case]]:
        for r in records:
            name, where = f"{TITLE[r['op']]} {MODE_TITLE[r['mode']]}", f"{layout_text(r)} {r['dtype']}"
            if r["status"] != "ok":
                yield f"{name}: not counted", Case(inf, r["message"], where)
            elif uncached(r) > MOST_BYTES_OVER_FLOOR:
                text = f"{name} moves more than {MOST_BYTES_OVER_FLOOR:g} times the floor's bytes"
                yield text, Case(uncached(r), f"{uncached(r):.2f} times", where)

    return _causes(cases())


def _machine_code(records: Sequence[Resources]) -> list[Cause]:
    def cases() -> Iterator[tuple[str, Case]]:
        for r in records:
            where = f"{r['target']}, {TITLE[r['op']]} {MODE_TITLE[r['mode']]} {r['dtype']} {layout_text(r)}"
            if r["status"] != "ok":
                yield f"{TITLE[r['op']]} does not compile", Case(5e6, r["message"], where)
                continue
            if r["spill_stores"]:
                yield f"{r['kernel']} spills", Case(3e6 + r["spill_stores"], f"{r['spill_stores']} stores", where)
            warps = f"{r['resident_warps']} of {r['possible_warps']} warps, by {r['limited_by']}"
            if r["resident_warps"] == 0:
                yield f"{r['kernel']} cannot be launched", Case(4e6, r["limited_by"], where)
            elif r["resident_warps"] < FEW_WARPS * r["possible_warps"]:
                yield f"{r['kernel']} fills few warps", Case(1e6 - r["resident_warps"], warps, where)
            if access_bits(r) < NARROW_BITS:
                figure = f"{access_bits(r) // 8} bytes"
                yield f"{r['kernel']} moves few bytes an instruction", Case(2e6 - access_bits(r), figure, where)

    return _causes(cases())


def _inexact(records: Sequence[Numerics]) -> list[Cause]:
    """Returns outputs that are further off than torch's, and those that are far off as torch's are."""
    of: dict[str, int] = {}

    def cases() -> Iterator[tuple[str, Case]]:
        for r in records:
            if r["status"] != "ok":
                yield f"{TITLE[r['op']]} {r['dtype']}: not computed", Case(inf, r["message"], r["data"])
                continue
            for output in OUTPUTS:
                ulps, where = ulps_of(r, output), f"{r['data']}, {r['columns']} columns"
                ours = inf if ulps[OURS] is None else float(ulps[OURS] or 0)
                name = f"{TITLE[r['op']]} {r['dtype']} {output}"
                worse = f"{name}: less exact than torch"
                of[worse] = of.get(worse, 0) + 1
                figure = f"{ulps_text(ulps[OURS])} where torch has {ulps_text(ulps['torch'])}"
                if is_worse(ulps):
                    yield worse, Case(1e9 + ours - (ulps["torch"] or 0), figure, where)
                elif ours > FAR_ULP:
                    yield f"{name}: no worse than torch, and far from exact all the same", Case(ours, figure, where)

    return _causes(cases(), of)
