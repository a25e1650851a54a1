"""Compares two timed runs, point by point.

A ratio is the old time over the new one: 1.10 is 10 % faster. Medians decide; the threshold allows for noise. Where the
bands from the 20th to the 80th percentile of the two runs overlap, "within the spread" says so and excuses nothing: for
short calls they nearly always do. Where torch's time has changed alike, the machine has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

from perf import records
from perf.records import FAILURES, Refused, Run, task_name

Key = tuple[str, str, str]
"""Group, title and contender of a point."""
REFERENCE = "torch"
OK, REGRESSED = 0, 1


class Pair(NamedTuple):
    """One point of one contender in both runs, and the ratio of torch's times there."""

    group: str
    title: str
    old: dict[str, Any]
    new: dict[str, Any]
    reference: float | None

    @property
    def broke(self) -> bool:
        """Returns whether it was right, and now fails."""
        return self.old["status"] == "ok" and self.new["status"] in FAILURES

    @property
    def ratio(self) -> float | None:
        return _ratio(self.old, self.new)

    @property
    def overlaps(self) -> bool:
        old, new = self.old, self.new
        return bool(old["p20_us"] <= new["p80_us"] and new["p20_us"] <= old["p80_us"])


def _ratio(old: dict[str, Any] | None, new: dict[str, Any] | None) -> float | None:
    if not old or not new or old["status"] != "ok" or new["status"] != "ok":
        return None
    return float(old["median_us"] / new["median_us"])


def _timed_run(path: Path) -> Run:
    try:
        run = records.read(path).run
    except ValueError as error:
        raise Refused(f"{path} holds no results of a timed run: {error}.") from error
    if not run["records"] and not run["steps"]:
        raise Refused(f"{path} holds nothing that was timed.")
    return run


def _key(record: dict[str, Any]) -> Key:
    group = "step" if "model" in record else f"{record['op']} {record['mode']}"
    return group, task_name(record), record["contender"]


def _by_point(run: Run, path: Path) -> dict[Key, dict[str, Any]]:
    """Returns the records by point and contender, without those that were not to be timed."""
    try:
        rows: list[dict[str, Any]] = [*map(dict, run["records"]), *map(dict, run["steps"])]
        by_key = {_key(record): record for record in rows}
        timed = {key: r for key, r in by_key.items() if r["status"] in ("ok", *FAILURES)}
        if all(r["median_us"] > 0 and r["p20_us"] and r["p80_us"] for r in timed.values() if r["status"] == "ok"):
            return timed
    except (KeyError, TypeError):
        pass
    raise Refused(f"{path} holds records that are not of timed points.")


def _gpu(run: Run) -> str:
    return run["environment"].get("GPU") or "an unknown GPU"


def _compared(old: Path, new: Path, contenders: Sequence[str], any_gpu: bool) -> tuple[list[Pair], int, int]:
    """Returns the pairs, and how many points only the old run and only the new one has."""
    runs = _timed_run(old), _timed_run(new)
    if _gpu(runs[0]) != _gpu(runs[1]) and not any_gpu:
        raise Refused(f"{old} was measured on {_gpu(runs[0])}, and {new} on {_gpu(runs[1])}.")
    before, after = (_by_point(run, path) for run, path in zip(runs, (old, new), strict=True))
    pairs = []
    for (group, title, who), record in before.items():
        if who in contenders and (group, title, who) in after:
            reference = _ratio(before.get((group, title, REFERENCE)), after.get((group, title, REFERENCE)))
            name = f"{title}, {who}" if len(contenders) > 1 else title
            new_record = after[group, title, who]
            pairs.append(Pair(group, name, record, new_record, None if who == REFERENCE else reference))
    if not pairs:
        raise Refused(f"{old} and {new} have no point of {' or '.join(contenders)} in common.")
    mine = [{key for key in run if key[-1] in contenders} for run in (before, after)]
    return pairs, len(mine[0] - mine[1]), len(mine[1] - mine[0])


def compare(
    old: Path,
    new: Path,
    fail_below: float,
    contenders: Sequence[str] = ("triton_norm",),
    any_gpu: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Says how the points of `contenders` differ, the worst first.

    Returns:
        0: all is well; 1: a ratio is below `fail_below`, or a point was right and now fails.

    Raises:
        Refused: if the files can't be compared.
    """
    pairs, only_old, only_new = _compared(old, new, contenders, any_gpu)
    ordered = sorted(pairs, key=_order)
    lines = _aligned([("point", "old µs", "new µs", "ratio", REFERENCE, ""), *(_row(p, fail_below) for p in ordered)])
    broke = sum(pair.broke for pair in pairs)
    slower = sum(pair.ratio is not None and pair.ratio < fail_below for pair in pairs)
    lines += ["", *_means(pairs), "", f"{len(pairs)} points paired, {only_old} only in {old}, {only_new} only in {new}"]
    for line in (*lines, f"{slower} below {fail_below:g}, {broke} that were right and now fail"):
        say(line)
    return REGRESSED if slower or broke else OK


def _order(pair: Pair) -> tuple[bool, bool, float]:
    """Puts new failures first, then the least ratios, then pairs without one."""
    return not pair.broke, pair.ratio is None, pair.ratio or 0.0


def _row(pair: Pair, fail_below: float) -> tuple[str, ...]:
    times = [f"{run['median_us']:.1f}" if run["status"] == "ok" else run["status"] for run in (pair.old, pair.new)]
    notes = ["was right"] if pair.broke else []
    if pair.ratio is not None:
        notes += ["BELOW"] if pair.ratio < fail_below else []
        notes += ["within the spread"] if pair.overlaps else []
    elif pair.new["status"] in FAILURES:
        notes.append(pair.new.get("message", ""))
    ratios = ("" if ratio is None else f"{ratio:.3f}" for ratio in (pair.ratio, pair.reference))
    return pair.title, *times, *ratios, ", ".join(filter(None, notes))


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Returns lines with the first and the last column to the left, and figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *figures, last in rows:
        numbers = (figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=False))
        lines.append("  ".join([first.ljust(widths[0]), *numbers, last]).rstrip())
    return lines


def _means(pairs: Sequence[Pair]) -> list[str]:
    """Returns geometric means of the ratios, ours and torch's, for each op and mode."""

    def mean(ratios: Sequence[float]) -> str:
        return f"{geometric_mean(ratios):.3f}" if ratios else ""

    rows: list[tuple[str, ...]] = [("geometric mean", "points", "ratio", REFERENCE, "")]
    for group in dict.fromkeys(pair.group for pair in pairs):
        mine = [pair for pair in pairs if pair.group == group]
        ratios = [pair.ratio for pair in mine if pair.ratio is not None]
        theirs = [pair.reference for pair in mine if pair.reference is not None]
        rows.append((group, str(len(ratios)), mean(ratios), mean(theirs), ""))
    return _aligned(rows)
