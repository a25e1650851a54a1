"""What is not as it should be: results held against the bars that the design states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf, prod
from statistics import geometric_mean
from typing import Any

from perf.findings import (
    OUTPUTS,
    Findings,
    Record,
    access_bits,
    device_of,
    input_bytes,
    is_worse,
    lying,
    ok,
    pairs,
    speedups,
    split,
    step_speedups,
    ulps_text,
    uncached,
)
from perf.points import MODE_TITLE, TITLE

Ranked = list[tuple[float, str]]
"""Sentences, each with how bad it is."""

FAR = 16  # ulp
MOVES_TOO_MUCH = 1.25  # times the floor's bytes
FEW_WARPS = 0.25  # of those that a multiprocessor holds
NARROW = 64  # bits an access
LARGE = 16 << 20  # bytes of x above which all others are to be beaten
LEVEL = 0.95  # of another's speed: as fast, for inputs that are smaller
LEAST_ELEMENTS = 1 << 26  # of rows that a share of the copy bandwidth is asked for
CACHE = 50 << 20  # bytes of the L2 that the bars were stated for, an H200's
SLAB = 32  # channels that lie side by side, which one program takes together

ROWS, RESIDUAL = ("layer_norm", "rms_norm"), ("layer_norm_residual", "rms_norm_residual")


@dataclass(frozen=True)
class Bar:
    """The least share of the copy bandwidth, bytes counted at `floor`; the first that is about a point holds."""

    ops: tuple[str, ...]
    mode: str
    least: float
    columns: tuple[float, float] = (1, inf)
    fits: bool = False  # only where what is reduced fits in cache, channel by channel
    floor: str = "floor_bytes"

    @property
    def text(self) -> str:
        low, high = self.columns
        parts = [f"{low:g} to {high:g} columns"] if high < inf else []
        parts += [f"from {LEAST_ELEMENTS >> 20}M elements"] if self.ops[0] in ROWS + RESIDUAL else []
        parts += [f"above {LARGE >> 20} MiB"] if self.ops[0] not in ROWS + RESIDUAL else []
        parts += ["a channel fits in L2"] if self.fits else []
        parts += ["bytes of two launches"] if self.floor == "apart_floor_bytes" else []
        return ", ".join(parts)

    def is_about(self, record: Record) -> bool:
        if record["op"] not in self.ops or record["mode"] != self.mode:
            return False
        if record["op"].startswith("batch_norm"):
            return input_bytes(record) > LARGE and (not self.fits or slab_bytes(record) <= CACHE)
        low, high = self.columns
        return prod(record["shape"]) >= LEAST_ELEMENTS and low <= record["shape"][-1] <= high


BARS = (
    Bar(ROWS, "forward", 0.95, (1 << 10, 1 << 16)),
    Bar(ROWS, "forward", 0.90, (1 << 7, 1 << 18)),
    Bar(RESIDUAL, "forward", 0.95),
    Bar(ROWS, "backward", 0.85, (1 << 10, 1 << 14)),
    Bar(ROWS, "backward", 0.75),
    Bar(("batch_norm",), "forward", 0.80, fits=True),
    Bar(("batch_norm",), "forward", 0.90, floor="apart_floor_bytes"),
    Bar(("batch_norm", "batch_norm_add_relu"), "backward", 0.75, fits=True),
    Bar(("batch_norm", "batch_norm_add_relu"), "backward", 0.90, floor="apart_floor_bytes"),
    Bar(("batch_norm_eval",), "forward", 0.95),
    Bar(("batch_norm_eval",), "backward", 0.90),
)
MEANS = {("layer_norm", "backward", "bf16"): 2.0, ("batch_norm", "forward", "bf16"): 2.0} | {
    ("batch_norm", "backward", "bf16"): 2.0
}
"""The least geometric mean of speed-ups over torch eager."""


def slab_bytes(record: Record) -> int:
    """What the programs of one channel read, or of as many as lie side by side, before they write."""
    together = SLAB if record["layout"] == "channels_last" or len(record["shape"]) == 2 else 1
    tensors = 2 if record["mode"] == "backward" else 1
    channels: int = record["shape"][1]
    return input_bytes(record) // channels * min(together, channels) * tensors


def bar_of(record: Record) -> Bar | None:
    return next((bar for bar in BARS if bar.is_about(record)), None)


def short_of(record: Record, copy_gbps: float | None) -> tuple[Bar, float] | None:
    """The bar that a timed record of ours is below, and its share of the copy bandwidth."""
    bar = bar_of(record)
    if not bar or not copy_gbps or record["status"] != "ok" or record["contender"] != "triton_norm":
        return None
    share = record[bar.floor] / record["median_us"] / 1e3 / copy_gbps
    return (bar, share) if share < bar.least else None


def shortfalls(findings: Findings) -> dict[str, list[str]]:
    """Everything that is not as it should be, in words: under each title the worst first."""
    found: dict[str, Ranked] = {}
    for run in findings.timed:
        where = f", {device_of(run)}, {run['environment'].get('date', '')}" if len(findings.timed) > 1 else ""
        found |= {f"{title}{where}": check(run) for title, check in OF_A_RUN.items()}
    found["The report"] = [(0, problem) for problem in findings.problems]
    found["Exactness"] = _inexact(findings.numerics)
    found["Bytes moved"] = _traffic(findings.traffic)
    found["Machine code"] = _machine_code(findings.resources)
    return {title: [words for _, words in _worst_first(ranked)] for title, ranked in found.items() if ranked}


def _worst_first(ranked: Ranked) -> Ranked:
    return sorted(ranked, key=lambda entry: entry[0], reverse=True)


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _name(record: Record) -> str:
    return f"{TITLE[record['op']]} {MODE_TITLE[record['mode']]} {record['dtype']} {lying(record)}"


def _run_itself(run: Record) -> Ranked:
    found: Ranked = []
    tests = run.get("tests", {})
    if tests.get("passed") is False:
        found.append((3, f"the tests did not pass: {tests['summary']}"))
    if run.get("stopped"):
        found.append((2, f"the run stopped early: {run['stopped']}"))
    if run.get("unreached"):
        found.append((1, f"{counted(len(run['unreached']), 'point')} not reached in the time given"))
    missing = [f"{who}: {status}" for who, status in run.get("contenders", {}).items() if status.startswith("missing")]
    return found + [(0, words) for words in missing]


def _failed(run: Record) -> Ranked:
    """One sentence for each contender, op and message; ours are the worst."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for r in run["records"] + run.get("steps", []):
        if r["status"] in ("wrong", "error"):
            what = _name(r) if "op" in r else f"a training step of {r['model']} in {r['dtype']}"
            kind = f"{r['op']} {r['mode']}" if "op" in r else "step"
            message = r["message"] if r["status"] == "error" else kind
            groups.setdefault((r["contender"], r["status"], kind, message), []).append(f"{what}: {r['message']}")
    found: Ranked = []
    for (who, status, _, _), members in groups.items():
        more = f" ({counted(len(members) - 1, 'other')} like it)" if len(members) > 1 else ""
        found.append((len(members) + 1e6 * who.startswith("triton_norm"), f"{who}, {status}: {members[0]}{more}"))
    return found


def _slower(run: Record, over: str, least: float, chosen: Callable[[Record], bool], where: str = "") -> Ranked:
    """Of each op, pass and type, on how many of the points `chosen` the speed-up is below `least`."""
    found: Ranked = []
    for op, mode, dtype, records in split(run["records"]):
        compared = [(record, ratio) for record, ratio in pairs(records, over) if chosen(record)]
        behind = [(record, ratio) for record, ratio in compared if ratio < least]
        if behind:
            worst, ratio = min(behind, key=lambda pair: pair[1])
            of = f"{len(behind)} of {counted(len(compared), 'point')}{where}"
            text = f"{TITLE[op]} {MODE_TITLE[mode]} {dtype}: slower than {over} on {of}"
            found.append((1 / ratio, f"{text}, at worst {ratio:.2f}× its speed ({lying(worst)})"))
    return found


def _slower_than_torch(run: Record) -> Ranked:
    found = _slower(run, "torch", 1.0, lambda record: True)
    for (op, mode, dtype), least in MEANS.items():
        mine = [r for r in run["records"] if (r["op"], r["mode"], r["dtype"]) == (op, mode, dtype)]
        ratios = speedups(mine, "torch")
        if ratios and geometric_mean(ratios) < least:
            mean = f"geometric mean {geometric_mean(ratios):.2f}× torch's speed, where {least:g}× is wanted"
            found.append((least / geometric_mean(ratios), f"{TITLE[op]} {mode} {dtype}: {mean}"))
    return found


def _slower_than_others(run: Record) -> Ranked:
    found: Ranked = []
    others = dict.fromkeys(r["contender"] for r in run["records"])
    for other in others:
        if other not in ("triton_norm", "torch"):
            found += _slower(run, other, 1.0, lambda r: input_bytes(r) > LARGE, f" above {LARGE >> 20} MiB")
            found += _slower(run, other, LEVEL, lambda r: input_bytes(r) <= LARGE, f" up to {LARGE >> 20} MiB")
    return found


def _below_bars(run: Record) -> Ranked:
    found: Ranked = []
    for op, mode, dtype, records in split(run["records"]):
        short = [(record, below) for record in records if (below := short_of(record, run.get("copy_gbps")))]
        if short:
            about = sum(
                r["status"] == "ok" and r["contender"] == "triton_norm" and bar_of(r) is not None for r in records
            )
            worst, (bar, share) = min(short, key=lambda entry: entry[1][1] / entry[1][0].least)
            text = f"{TITLE[op]} {MODE_TITLE[mode]} {dtype}: below the bar on {len(short)} of {counted(about, 'point')}"
            counting = " counted as two launches" if bar.floor == "apart_floor_bytes" else ""
            where = f"{share:.0%} of the copy bandwidth{counting} where {bar.least:.0%} is wanted ({lying(worst)})"
            found.append((bar.least / share, f"{text}, at worst {where}"))
    return found


def _slower_steps(run: Record) -> Ranked:
    return [
        (1 / ratio, f"{r['model']} {r['dtype']}: a step with {r['contender']} at {ratio:.2f}× the speed of {over}")
        for r, over, ratio in step_speedups(run.get("steps", []))
        if ratio < 1
    ]


OF_A_RUN: dict[str, Callable[[Record], Ranked]] = {
    "Wrong or failed": _failed,
    "The timed run": _run_itself,
    "Too slow against torch eager": _slower_than_torch,
    "Slower steps of whole models": _slower_steps,
    "Too slow against others": _slower_than_others,
    "Below the bars for a share of the copy bandwidth": _below_bars,
}


def _traffic(records: Sequence[Record]) -> Ranked:
    found: Ranked = [(inf, f"{_name(r)}: {r['status']}, {r['message']}") for r in records if r["status"] != "ok"]
    found += [
        (uncached(r), f"{_name(r)}: moves {uncached(r):.2f} times the floor's bytes, weights counted once")
        for r in ok(records)
        if uncached(r) > MOVES_TOO_MUCH
    ]
    return found


def _complaints(r: Record) -> Iterator[tuple[float, str, str]]:
    """How bad, what, and by how much on its target."""
    where = f"{r.get('kernel', '')} ({_name(r)})"
    if r["status"] != "ok":
        yield 5, f"{_name(r)} does not compile: {r['message']}", r["target"]
        return
    if r["spill_stores"]:
        yield 3, f"{where} spills, stores", f"{r['target']}: {r['spill_stores']}"
    if r["resident_warps"] == 0:
        yield 4, f"{where} cannot be launched", f"{r['target']}: {r['limited_by']}"
    elif r["resident_warps"] < FEW_WARPS * r["possible_warps"]:
        held = f"{r['resident_warps']} of {r['possible_warps']} warps, by {r['limited_by']}"
        yield 1, f"{where} fills few warps", f"{r['target']}: {held}"
    if access_bits(r) < NARROW:
        yield 2, f"{where} moves few bytes an instruction", f"{r['target']}: {access_bits(r) // 8}"


def _machine_code(records: Sequence[Record]) -> Ranked:
    """One line for each kernel, shape and complaint, with the targets that it is true of."""
    found: dict[tuple[float, str], list[str]] = {}
    for record in records:
        for bad, what, target in _complaints(record):
            found.setdefault((bad, what), []).append(target)
    return [(bad, f"{what} ({'; '.join(dict.fromkeys(targets))})") for (bad, what), targets in found.items()]


def _inexact(records: Sequence[Record]) -> Ranked:
    """Outputs that are further off than torch's, and those that are far off as torch's are."""
    found: Ranked = [
        (inf, f"{TITLE[r['op']]} {r['dtype']} on {r['data']}: {r['status']}, {r['message']}")
        for r in records
        if r["status"] != "ok"
    ]
    groups: dict[str, list[Record]] = {}
    for r in ok(records):
        for output in OUTPUTS:
            about = {"data": r["data"], "columns": r["columns"], **r[output]}
            groups.setdefault(f"{TITLE[r['op']]} {r['dtype']} {output}", []).append(about)
    for name, members in groups.items():
        found += _less_exact(name, members)
    return found


def _less_exact(name: str, members: Sequence[dict[str, Any]]) -> Ranked:
    found: Ranked = []
    worse = [member for member in members if is_worse(member)]
    if worse:
        worst = max(worse, key=lambda member: _off(member["triton_norm"]) - _off(member["torch"]))
        ours, theirs = ulps_text(worst["triton_norm"]), ulps_text(worst["torch"])
        where = f"{ours} where torch has {theirs} ({worst['data']}, {worst['columns']} columns)"
        count = f"{len(worse)} of {len(members)} inputs"
        found.append((1e6 + _off(worst["triton_norm"]), f"{name}: less exact than torch on {count}, at worst {where}"))
    far: dict[str, float] = {}
    for member in members:
        if _off(member["triton_norm"]) > FAR and member not in worse:
            far[member["data"]] = max(far.get(member["data"], 0.0), _off(member["triton_norm"]))
    if far:
        listed = ", ".join(f"{data} (up to {ulps_text(ulps)})" for data, ulps in far.items())
        text = f"{name}: no worse than torch, and far from exact all the same: {listed}"
        found.append((min(max(far.values()), 1e5), text))
    return found


def _off(ulps: float | None) -> float:
    return inf if ulps is None else ulps
