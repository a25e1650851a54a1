"""Two timed runs, point by point: what became faster, what slower, and what is no longer right.

A ratio is the old time over the new one: 1.10 is 10 % faster. The verdict goes by the ratio of the medians, on every
point; it is the threshold that allows for noise. Where the bands from 20 to 80 % of the two runs overlap, that is told
("within the spread") and excuses nothing: short calls scatter so much that their bands nearly always do. Where torch's
time has moved alike, it is the machine that has changed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.findings import Record

Key = tuple[Any, ...]
Say = Callable[[str], None]

REFERENCE = "torch"
OK, REGRESSED, NOT_COMPARABLE = 0, 1, 2
FAILURES = ("wrong", "error")
STEP = "step"
GPU_UNKNOWN = "an unknown GPU"


class NotComparable(ValueError):
    """Why two files can't be compared, in a sentence."""


@dataclass(frozen=True)
class Pair:
    """One point of one contender in both runs; `reference`: the ratio of torch's times there."""

    title: str
    group: str
    old: Record
    new: Record
    reference: float | None

    @property
    def broke(self) -> bool:
        """Whether it was right, and now fails."""
        return self.old["status"] == "ok" and self.new["status"] in FAILURES

    @property
    def ratio(self) -> float | None:
        return _ratio(self.old, self.new)

    @property
    def overlaps(self) -> bool:
        """Whether the bands of the two runs have a time in common."""
        bands = ("p20_us", "p80_us")
        if not all(name in run for name in bands for run in (self.old, self.new)):
            return False
        return bool(self.old["p20_us"] <= self.new["p80_us"] and self.new["p20_us"] <= self.old["p80_us"])


def _ratio(old: Record, new: Record) -> float | None:
    if old["status"] != "ok" or new["status"] != "ok":
        return None
    return float(old["median_us"] / new["median_us"])


def _timed_run(path: Path) -> Record:
    """The run in a results file: of a report the first, which is the one that the report was made for."""
    try:
        content = json.loads(path.read_text())
        run = content if content["kind"] == "timing" else content["timed"][0] if content["kind"] == "report" else None
        if run is not None and all(isinstance(record, dict) for record in _records(run)):
            return dict(run)
    except IndexError:
        raise NotComparable(f"{path} is a report in which nothing was timed.") from None
    except OSError as error:
        raise NotComparable(f"{path} can't be read: {error.strerror}.") from error
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise NotComparable(f"{path} holds no results of a timed run.")


def _records(run: Record) -> list[Record]:
    return [*run["records"], *run.get("steps", [])]


def _key(record: Record) -> Key:
    """What makes two records of one contender comparable; first the name of its group."""
    if "model" in record:
        return STEP, record["model"], record["dtype"]
    return f"{record['op']} {record['mode']}", record["dtype"], tuple(record["shape"]), record["layout"]


def _title(key: Key) -> str:
    if key[0] == STEP:
        return f"{STEP} {key[2]} {key[1]}"
    group, dtype, shape, layout = key
    return f"{group} {dtype} {'x'.join(map(str, shape))}" + ("" if layout == "contiguous" else f" {layout}")


def _by_point(run: Record, path: Path) -> dict[tuple[Key, str], Record]:
    """By point and contender, without what was not to be timed."""
    try:
        found = {(_key(record), record["contender"]): record for record in _records(run)}
        timed = {key: r for key, r in found.items() if r["status"] in ("ok", *FAILURES)}
        if all(r["median_us"] > 0 for r in timed.values() if r["status"] == "ok"):
            return timed
    except (KeyError, TypeError):
        pass
    raise NotComparable(f"{path} holds records that are not of timed points.")


def _gpu(run: Record) -> str:
    return str(run.get("environment", {}).get("GPU") or GPU_UNKNOWN)


def _pairs(
    old: dict[tuple[Key, str], Record], new: dict[tuple[Key, str], Record], contenders: Sequence[str]
) -> list[Pair]:
    pairs = []
    for (key, contender), before in old.items():
        after = new.get((key, contender))
        if contender not in contenders or after is None:
            continue
        torch_before, torch_after = old.get((key, REFERENCE)), new.get((key, REFERENCE))
        reference = None
        if torch_before and torch_after and contender != REFERENCE:
            reference = _ratio(torch_before, torch_after)
        title = _title(key) + (f", {contender}" if len(contenders) > 1 else "")
        pairs.append(Pair(title, str(key[0]), before, after, reference))
    return pairs


def compare(
    old: Path,
    new: Path,
    fail_below: float,
    contenders: Sequence[str] = ("triton_norm",),
    any_gpu: bool = False,
    say: Say = print,
) -> int:
    """Tells the points of `contenders`, the worst first. 0: all is well; 1: a ratio is below `fail_below`, or a point
    was right and now fails; 2: the files can't be compared, for a reason told on stderr."""
    try:
        pairs, only_old, only_new = _compared(old, new, contenders, any_gpu)
    except NotComparable as error:
        print(f"perf compare: {error}", file=sys.stderr)
        return NOT_COMPARABLE
    for line in _table(pairs, fail_below):
        say(line)
    broke = sum(pair.broke for pair in pairs)
    slower = sum(pair.ratio is not None and pair.ratio < fail_below for pair in pairs)
    say("")
    for line in _means(pairs):
        say(line)
    say("")
    say(f"{len(pairs)} points paired, {only_old} only in {old}, {only_new} only in {new}")
    say(f"{slower} below {fail_below:g}, {broke} that were right and now fail")
    return REGRESSED if slower or broke else OK


def _compared(old: Path, new: Path, contenders: Sequence[str], any_gpu: bool) -> tuple[list[Pair], int, int]:
    """The pairs, and how many points only the old run and only the new one has."""
    runs = _timed_run(old), _timed_run(new)
    gpus = [_gpu(run) for run in runs]
    if gpus[0] != gpus[1] and not any_gpu:
        raise NotComparable(f"{old} was measured on {gpus[0]}, and {new} on {gpus[1]}.")
    before, after = (_by_point(run, path) for run, path in zip(runs, (old, new), strict=True))
    pairs = _pairs(before, after, contenders)
    if not pairs:
        raise NotComparable(f"{old} and {new} have no point of {' or '.join(contenders)} in common.")
    mine = [{key for key in run if key[1] in contenders} for run in (before, after)]
    return pairs, len(mine[0] - mine[1]), len(mine[1] - mine[0])


def _order(pair: Pair) -> tuple[int, float]:
    """Worst first: what fails now, then by ratio, then what can't have one."""
    if pair.broke:
        return 0, 0.0
    return (2, 0.0) if pair.ratio is None else (1, pair.ratio)


def _row(pair: Pair, fail_below: float) -> tuple[str, ...]:
    times = [f"{run['median_us']:.1f}" if run["status"] == "ok" else run["status"] for run in (pair.old, pair.new)]
    ratio = "" if pair.ratio is None else f"{pair.ratio:.3f}"
    reference = "" if pair.reference is None else f"{pair.reference:.3f}"
    notes = ["was right"] if pair.broke else []
    if pair.ratio is not None:
        notes += ["BELOW"] if pair.ratio < fail_below else []
        notes += ["within the spread"] if pair.overlaps else []
    elif pair.new["status"] in FAILURES:
        notes.append(pair.new.get("message", ""))
    return pair.title, *times, ratio, reference, ", ".join(note for note in notes if note)


def _table(pairs: Iterable[Pair], fail_below: float) -> list[str]:
    rows: list[tuple[str, ...]] = [("point", "old µs", "new µs", "ratio", REFERENCE, "")]
    rows += [_row(pair, fail_below) for pair in sorted(pairs, key=_order)]
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The first and the last column to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *figures, last in rows:
        numbers = (figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=False))
        lines.append("  ".join([first.ljust(widths[0]), *numbers, last]).rstrip())
    return lines


def _means(pairs: Sequence[Pair]) -> list[str]:
    """Geometric means of the ratios, ours and torch's, for each op and mode."""
    rows: list[tuple[str, ...]] = [("geometric mean", "points", "ratio", REFERENCE, "")]
    for group in dict.fromkeys(pair.group for pair in pairs):
        mine = [pair for pair in pairs if pair.group == group]
        ratios = [pair.ratio for pair in mine if pair.ratio is not None]
        theirs = [pair.reference for pair in mine if pair.reference is not None]
        rows.append((group, str(len(ratios)), _mean(ratios), _mean(theirs), ""))
    return _aligned(rows)


def _mean(ratios: Sequence[float]) -> str:
    return f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.3f}" if ratios else ""
