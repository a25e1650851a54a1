"""What compiled kernels take of a multiprocessor, as a table whose ground is coloured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from perf.charts.canvas import BLUE, FAINT, GRID, INK, ORANGE, VERMILION, WIDTH, Canvas, fitting, tinted
from perf.findings import Record, access_bits, lying
from perf.points import MODE_TITLE, PASSES, TITLE

ROW, SECTION, HEADER = 0.185, 0.27, 0.55  # inches
NAMES = 3.35  # inches, for the shape and the kernel
TEXT = 7.5
FEW, FEW_BYTES = 0.25, 8  # of the possible warps; of an access
COLUMNS = {"regs": 0.1, "spills": 0.31, "bytes": 0.53, "warps": 0.82}  # middles, of a target's width
WARPS_FROM = 0.66

Key = tuple[str, str, str, str, int]  # op, mode, shape, kernel, and which of a call's launches of it


def resources(records: Sequence[Record], machine: str, path: Path) -> Path:
    """A column a target, a line a kernel of an op, pass and shape: registers a thread, spills, bytes an access and the
    warps that are resident of those that are possible, which the ground's colour shows too."""
    targets = list(dict.fromkeys(record["target"] for record in records))
    found = _found(records)
    sections = {
        (op, mode): _rows(dict.fromkeys(key for key, _ in found if key[:2] == (op, mode)))
        for op in TITLE
        for mode in PASSES
    }
    sections = {key: rows for key, rows in sections.items() if rows}
    height = HEADER + sum(SECTION + ROW * len(rows) for rows in sections.values())
    title = "Compiled kernels, nothing run: registers a thread, spills, bytes an access, resident warps"
    legend: dict[str, Artist] = {
        f"{share:.0%} of the possible warps resident": Patch(facecolor=_ground(share)) for share in (0.25, 0.5, 1.0)
    }
    legend |= {
        f"< {FEW:.0%}, or accesses of < {FEW_BYTES} bytes": Patch(facecolor="white", edgecolor=ORANGE, linewidth=1.6),
        "spills, or does not compile": Patch(facecolor=VERMILION),
    }
    foot = ["spills: instructions that store + load", "bytes: widest access/narrowest of x, y and their like"]
    foot += ["warps: of one multiprocessor", "left blank: no such launch there"]
    canvas = Canvas(height, title, [*foot, machine], list(legend))
    ax = canvas.figure.add_subplot()
    ax.set(xlim=(0, WIDTH), ylim=(height, 0))
    ax.set_axis_off()
    width = (WIDTH - NAMES - 0.15) / max(len(targets), 1)
    for number, target in enumerate(targets):
        _header(ax, NAMES + number * width, width, target)
    y = HEADER
    for (op, mode), rows in sections.items():
        ax.text(0.05, y + SECTION - 0.06, f"{TITLE[op]}, {MODE_TITLE[mode]}", fontsize=9, color=INK, fontweight="bold")
        y += SECTION
        for key in rows:
            _row_names(ax, y, key)
            for number, target in enumerate(targets):
                if (key, target) in found:
                    _cell(ax, NAMES + number * width, y, width, found[key, target])
            y += ROW
    canvas.legend(legend)
    return canvas.save(path)


def _found(records: Sequence[Record]) -> dict[tuple[Key, str], Record]:
    found: dict[tuple[Key, str], Record] = {}
    for record in records:
        shape = f"{lying(record)} {record['dtype']}"
        for key in _keys(record, shape):
            if (key, record["target"]) not in found:
                found[key, record["target"]] = record
                break
    return found


def _rows(keys: Iterable[Key]) -> list[Key]:
    """All of one shape one below the other."""
    known = list(keys)
    shapes = list(dict.fromkeys(key[2] for key in known))
    return sorted(known, key=lambda key: shapes.index(key[2]))


def _keys(record: Record, shape: str) -> Iterator[Key]:
    number = 0
    while True:
        yield record["op"], record["mode"], shape, record["kernel"].removesuffix("_kernel"), number
        number += 1


def _ground(share: float) -> str:
    return tinted(BLUE, 0.06 + 0.5 * min(share, 1.0))


def _header(ax: Axes, x: float, width: float, target: str) -> None:
    ax.text(x + width * 0.45, 0.2, target, fontsize=10, fontweight="bold", color=INK, ha="center", va="center")
    for name, middle in COLUMNS.items():
        ax.text(x + middle * width, 0.43, name, fontsize=7.5, color=FAINT, ha="center", va="center")


def _row_names(ax: Axes, y: float, key: Key) -> None:
    ax.plot([0.05, WIDTH - 0.15], [y, y], color=GRID, linewidth=0.5, zorder=0)
    shape, kernel = key[2], f"{key[3] or '(none)'}{', again' if key[4] else ''}"
    ax.text(0.05, y + ROW / 2, fitting(shape, TEXT, 1.75), fontsize=TEXT, color=INK, va="center")
    ax.text(1.88, y + ROW / 2, fitting(kernel, TEXT, 1.42), fontsize=TEXT, color=FAINT, va="center")


def _widths(record: Record) -> tuple[str, bool]:
    widest = max(map(int, {**record["loads"], **record["stores"]}), default=0) // 8
    narrowest = access_bits(record) // 8
    text = f"{widest}" if narrowest >= widest else f"{widest}/{narrowest}"
    return text, narrowest < FEW_BYTES


def _cell(ax: Axes, x: float, y: float, width: float, record: Record) -> None:
    middle = y + ROW / 2

    def write(column: str, text: str, marked: bool = False) -> None:
        ax.text(
            x + COLUMNS[column] * width, middle, text, fontsize=TEXT, color=VERMILION if marked else INK, ha="center",
            va="center", fontweight="bold" if marked else "normal",
        )  # fmt: skip

    if record["status"] != "ok":
        text = fitting(f"× {record['message'] or record['status']}", TEXT, 0.92 * width)
        ax.text(x + 0.03, middle, text, fontsize=TEXT, color=VERMILION, va="center", parse_math=False)
        return
    share = record["resident_warps"] / record["possible_warps"]
    few = share < FEW
    left, right = x + WARPS_FROM * width, x + 0.98 * width
    ax.add_patch(Rectangle((left, y + 0.015), right - left, ROW - 0.03, facecolor=_ground(share), linewidth=0))
    write("regs", str(record["registers"]))
    spills = record["spill_stores"] + record["spill_loads"]
    write("spills", f"{record['spill_stores']}+{record['spill_loads']}" if spills else "·", spills > 0)
    text, narrow = _widths(record)
    write("bytes", text)
    write("warps", f"{record['resident_warps']} of {record['possible_warps']}")
    if few:
        _frame(ax, left, right, y)
    if narrow:
        centre = x + COLUMNS["bytes"] * width
        _frame(ax, centre - 0.18, centre + 0.18, y)


def _frame(ax: Axes, left: float, right: float, y: float) -> None:
    ax.add_patch(Rectangle((left, y + 0.02), right - left, ROW - 0.04, fill=False, edgecolor=ORANGE, linewidth=1.3))
