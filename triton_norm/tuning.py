"""Every number that picks a launch: the config spaces, their keys, and the choices that were measured.

A choice is found in this order: made before in this process; `tuned/<gpu>.json`, measured by the project; a search by
`triton.autotune` among the space's configs, which keeps its result on disk. Keys never hold the number of rows or
samples: another batch size compiles nothing, searches nothing, and rounds every row as before. A file that can't be
used, and a choice in it that is not among its space's configs, is left out with one warning.
"""

import functools
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
T = TypeVar("T")

TUNED = Path(__file__).parent / "tuned"

VECTOR_BYTES = 16
THREADS = 1024  # of a program, at most
WARP = 64 if torch.version.hip else 32  # threads
LANES = 32  # channels side by side in a channels-last tile: 64 bytes of a 16-bit type
MOST_COLUMNS = 2**20  # of a row; Triton's largest tile, which is one backward program's where nothing shares a row
WHOLE_ROW_BYTES = 64 * 1024  # of a row in its widest stored type: what is left of 1024 threads' registers
FORWARD_PIECE_BYTES = 64 * 1024  # of a longer row in the type it is computed in: 16 registers for each of 1024 threads
BACKWARD_SPAN_BYTES = 32 * 1024  # x, dy and the sums of dweight and dbias are held at once
ROWS_BACKWARD_ELEMENTS = 8 * 1024  # of a multiprocessor's programs at once; each has x, dy and two sums in registers
PEERS_SHARE = 3  # programs of a row or channel are one multiprocessor in so many: as many launches at once can wait
MOST_FOLDED = 2048  # columns of a block of whole channels
LEAST_FOLDED_SAMPLES = 8  # below, most rows of a folded tile would be empty
NARROW_BYTES, SHORT_BYTES = 8, 128  # folded are fewer bytes an access, or of a channel's positions in a sample
CHANNEL_PROGRAMS_PER_SM = 16
MIN_SPLIT_ELEMENTS = 2048
ECONOMICAL_ELEMENTS = 512  # of a channel in a split: what splits leave and read is 2 % of that, or less
ONE_LAUNCH_BYTES = 8 * 1024 * 1024  # of what programs that wait for each other would read again, at most
HELD_BYTES = {"flat": 32 * 1024, "last": 16 * 1024, "folded": 32 * 1024}  # of what a program keeps while it waits
THREAD_HELD_BYTES = {"flat": 128, "last": 64, "folded": 64}  # of that, a thread's
REGISTERS = 64 * 1024  # of a multiprocessor
MOST_REGISTERS = 255  # of a thread
CHANNEL_WARPS = 16  # of a multiprocessor at least, whatever registers their threads need
HELD_STEP = 4  # tiles that are kept differ in size by so many times, for few of them to be compiled
HOLDING_PROGRAMS_PER_SM = 2  # that keep a tile, at once
MIN_HELD_ELEMENTS = 1024  # of a program that waits for others
CACHED_SHARE = 2  # what all programs that run at once read again may take one byte of cache in so many
FULL_SHARE = 2  # one launch needs a program for one multiprocessor in so many, or no more than
SMALL_BYTES = 4 * 1024 * 1024  # of x
MERGED_ELEMENTS = 2048  # of what splits leave, that are merged at a time
MOST_REMEMBERED = 4096
LEAST_ZEROS = 4096  # kept for each stream
MOST_STREAMS = 1024  # that zeros are kept for
SEARCH_WARMUP_MS, SEARCH_MS = 10, 40  # for each config
INTERPRETED_TILE = 16384  # elements; the interpreter's cost is per operation, not per element
INTERPRETED_SMS = 1
INTERPRETED_CACHE = 50 * 1024 * 1024  # bytes, as of an H100


@dataclass(frozen=True)
class Config:
    """What a launch is specialised by: the kernel's block sizes, how many warps and stages run them, and how many
    registers a thread may have, where that is limited."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int = 1
    maxnreg: int | None = None

    def __getitem__(self, block: str) -> int:
        return self.keywords[block]

    @functools.cached_property
    def span(self) -> int:
        """Columns that a program owns of a row."""
        return self["BLOCK_N"] * self.keywords.get("PIECES", 1)

    @functools.cached_property
    def keywords(self) -> dict[str, int]:
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


@dataclass(frozen=True)
class Space:
    """The configs that one kernel may be launched with for one key, the best guess first."""

    kernel: str
    key: str
    configs: tuple[Config, ...]

    def find(self, keywords: Mapping[str, int]) -> Config | None:
        """The config that has these keywords, in whatever order, or None: what is not among them is never launched."""
        return next((config for config in self.configs if config.keywords == keywords), None)


def config(num_warps: int, num_stages: int = 1, maxnreg: int | None = None, **blocks: int) -> Config:
    return Config(tuple(blocks.items()), num_warps, num_stages, maxnreg)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def vector_width(itemsize: int, *extents: int) -> int:
    """Elements an access can move: the largest power of two that divides every extent, up to 16 bytes."""
    width = VECTOR_BYTES // itemsize
    for extent in extents:
        while extent % width:
            width //= 2
    return width


def warps(elements: int, per_thread: int) -> int:
    return min(THREADS, max(WARP, next_power_of_2(elements) // per_thread)) // WARP


_forgets: list[Callable[[], object]] = []


def when_forgotten(clear: Callable[[], object]) -> None:
    """`clear` empties what remembers something that follows from the numbers above."""
    _forgets.append(clear)


def remembered(function: Callable[P, T]) -> Callable[P, T]:
    """What follows from the numbers above, computed once for the latest arguments."""
    cached = functools.lru_cache(MOST_REMEMBERED)(function)
    when_forgotten(cached.cache_clear)
    return cast("Callable[P, T]", cached)


def forget() -> None:
    """Makes everything anew that follows from the numbers above: they have been changed."""
    for clear in _forgets:
        clear()


def _space(kernel: str, key: str, configs: list[Config]) -> Space:
    return Space(kernel, key, tuple(dict.fromkeys(configs)))


def most_peers(multiprocessors: int) -> int:
    """Programs that may share a row, a power of two."""
    return next_power_of_2(multiprocessors // PEERS_SHARE + 1) // 2 or 1


def _shared(width: int, block: int, peers: int) -> dict[str, int]:
    """Pieces of `block` columns, and programs to share them, for a row of `width` columns; powers of two all."""
    members = min(peers, width // block)
    return {"PIECES": width // block // members, "PEERS": members}


@remembered
def rows_forward(
    n_cols: int, types: str, stored_bytes: int, compute_bytes: int, multiprocessors: int, interpreted: bool
) -> Space:
    """Several short rows a program, one row in registers, or spans of a long one for programs that exchange moments."""
    width = next_power_of_2(n_cols)
    whole = width * stored_bytes <= WHOLE_ROW_BYTES
    if interpreted:
        block = width if whole else INTERPRETED_TILE
        configs = [config(4, BLOCK_M=max(1, INTERPRETED_TILE // block), BLOCK_N=block, **_shared(width, block, 1))]
    elif whole:
        tiles = sorted({max(width, tile) for tile in (1024, 2048, 4096)}, reverse=True)
        configs = [
            config(warps(tile, per_thread), BLOCK_M=tile // width, BLOCK_N=width, **_shared(width, width, 1))
            for per_thread in ((32, 16) if width <= 8192 else (16, 32))  # else the first would spill a register
            for tile in tiles
            if tile <= THREADS * per_thread
        ]
    else:
        piece = FORWARD_PIECE_BYTES // compute_bytes
        configs = [
            config(warps(block, per_thread), BLOCK_M=1, BLOCK_N=block, **_shared(width, block, peers))
            for peers in [most_peers(multiprocessors)]
            for block, per_thread in ((piece // 2, 32), (piece // 4, 32), (piece, 32), (piece // 2, 16))
        ]
    return _space("rows_forward_kernel", f"columns {width}, {types}", configs)


def _of_rows_backward(elements: int, per_thread: int, **blocks: Any) -> Config:
    """With as many registers a thread as leave a multiprocessor room for all that it is to run at once."""
    n_warps = warps(elements, per_thread)
    share = REGISTERS // ROWS_BACKWARD_ELEMENTS * per_thread
    limit = min(share, REGISTERS // (n_warps * WARP), MOST_REGISTERS) if WARP == 32 else None
    return config(n_warps, maxnreg=limit, **blocks)


@remembered
def rows_backward(
    n_cols: int, types: str, stored_bytes: int, compute_bytes: int, multiprocessors: int, interpreted: bool
) -> Space:
    """STAGES > 1 fetches the next rows through shared memory while these are computed."""
    width = next_power_of_2(n_cols)
    span = BACKWARD_SPAN_BYTES // compute_bytes
    if interpreted:
        configs = [
            config(4, BLOCK_M=max(1, INTERPRETED_TILE // width), BLOCK_N=width, PEERS=1, STAGES=1, HOLD_WEIGHT=True)
        ]
    elif width <= span:
        tiles = ((span // 4, 16), (span // 2, 16), (span // 8, 8), (span // 2, 8)) if width < span else ((span, 8),)
        configs = [
            _of_rows_backward(
                tile,
                per_thread,
                BLOCK_M=tile // width,
                BLOCK_N=width,
                PEERS=1,
                STAGES=stages,
                HOLD_WEIGHT=tile < span,
            )
            for tile, per_thread in tiles
            if tile >= width
            for stages in ((3, 1) if 256 < width < span else (1, 3))
        ]
    else:
        narrowest = width // most_peers(multiprocessors)
        # Addresses of wide blocks take registers of every thread: with 16 elements each, unless they are stored in
        # fewer bytes than they are computed in, 5 to 26 registers were spilled (sm_90, Triton 3.7.1 to 3.9.0).
        fewer_threads = ((4, 32),) if span // 4 < narrowest <= span and stored_bytes >= compute_bytes else ()
        configs = [
            _of_rows_backward(
                block,
                per_thread,
                BLOCK_M=1,
                BLOCK_N=block,
                PEERS=width // block,
                STAGES=1,
                HOLD_WEIGHT=False,
            )
            for share, per_thread in (*fewer_threads, (4, 16), (4, 8), (2, 16), (2, 8), (1, 8))
            for block in [max(narrowest, span // share)]
        ]
        if width == 2 * span:  # which spills, and is faster in 16-bit types even so
            configs += [config(32, BLOCK_M=1, BLOCK_N=width, PEERS=1, STAGES=1, HOLD_WEIGHT=False)]
    return _space("rows_backward_kernel", f"columns {width}, {types}", configs)


def rows_backward_teams(config: Mapping[str, Any], n_rows: int, n_cols: int, multiprocessors: int) -> int:
    """Teams that share the rows, each of which leaves a row of sums: as many as run at once."""
    per_sm: int = max(1, ROWS_BACKWARD_ELEMENTS // (config["BLOCK_M"] * config["BLOCK_N"]))
    n_peers: int = -(-n_cols // config["BLOCK_N"])
    n_groups: int = -(-n_rows // config["BLOCK_M"])
    return max(1, min(n_groups, multiprocessors * per_sm // n_peers))


def rows_backward_programs(config: Mapping[str, Any], n_rows: int, n_cols: int, multiprocessors: int) -> int:
    n_peers: int = -(-n_cols // config["BLOCK_N"])
    return rows_backward_teams(config, n_rows, n_cols, multiprocessors) * n_peers


@remembered
def rows_backward_finalise(interpreted: bool) -> Space:
    shapes = ((4, 64, 512),) if interpreted else ((4, 128, 16), (4, 256, 8), (8, 128, 16), (8, 256, 16))
    configs = [config(n_warps, BLOCK_M=rows, BLOCK_N=columns) for n_warps, rows, columns in shapes]
    return _space("rows_backward_finalise_kernel", "", configs)


def channel_lanes(n_channels: int) -> int:
    return min(LANES, next_power_of_2(n_channels))


def folds(n_samples: int, n_positions: int, itemsize: int) -> bool:
    """Whether samples of so many positions a channel are better read as rows of whole channels."""
    access = vector_width(itemsize, n_positions) * itemsize
    narrow = access < NARROW_BYTES or n_positions * itemsize < SHORT_BYTES
    return narrow and _fold_unit(n_positions) * n_positions <= MOST_FOLDED and n_samples >= LEAST_FOLDED_SAMPLES


def _fold_unit(n_positions: int) -> int:
    """Channels that together have a multiple of eight positions, so that their bits are whole bytes."""
    return 8 // math.gcd(n_positions, 8)


@remembered
def fold(n_channels: int, n_positions: int) -> tuple[int, int]:
    """(lanes, channels) of a block, with the fewest lanes idle."""
    unit = _fold_unit(n_positions)
    most = -(-n_channels // unit) * unit
    lanes, channels = 0, 1
    for candidate in (MOST_FOLDED, MOST_FOLDED // 2, MOST_FOLDED // 4):
        whole = min(candidate // n_positions // unit * unit, most)
        if whole and (not lanes or whole * n_positions * lanes >= channels * n_positions * candidate):
            lanes, channels = candidate, whole
    return lanes, channels


class Plan(NamedTuple):
    """How programs share the groups of a channel; `tile`: the elements that each keeps while it waits for the others,
    0 where none waits."""

    tile: int
    groups_per_split: int


def plan_channels_apart(n_groups: int, lanes: int, per_group: int, n_blocks: int, multiprocessors: int) -> Plan:
    """Every block of channels together fills the GPU, many times over where the splits stay long enough; they are whole
    bytes of one bit an element. `per_group`: the elements of a channel in a group."""
    fills = -(-multiprocessors // n_blocks)
    economical = n_groups * per_group // ECONOMICAL_ELEMENTS
    n_splits = max(1, min(multiprocessors * CHANNEL_PROGRAMS_PER_SM // n_blocks, max(fills, economical)))
    return Plan(0, -(-max(-(-n_groups // n_splits), MIN_SPLIT_ELEMENTS // lanes) // 8) * 8)


def crowds(kind: str, vector: int, adds: bool) -> bool:
    """Whether registers are left for half as large a tile only: beside a residual that is added to a flat one, and in
    others where each element has an access, and so addresses, of its own."""
    return adds if kind == "flat" else vector == 1


@remembered
def plan_channels(
    kind: str,
    n_groups: int,
    lanes: int,
    n_blocks: int,
    held: int,
    beside: float,
    crowded: bool,
    multiprocessors: int,
    cache: int,
    interpreted: bool,
) -> Plan | None:
    """One launch, if there is little to read, if its programs fill the GPU, and if what they can't keep will still be
    in cache when they read it again: of all that run at once. `held`: bytes of an element of what they keep; `beside`:
    of what they read twice. If `crowded`, registers are left for half of the tile.
    """
    elements = n_groups * lanes
    tile = INTERPRETED_TILE if interpreted else max(lanes, HELD_BYTES[kind] // held // (2 if crowded else 1))
    enough = max(-(-multiprocessors * HOLDING_PROGRAMS_PER_SM // n_blocks), -(-elements // tile))
    peers = max(1, min(most_peers(multiprocessors), enough, elements // MIN_HELD_ELEMENTS))
    per_split = -(-n_groups // peers)
    while not interpreted and tile // HELD_STEP >= max(per_split * lanes, MIN_HELD_ELEMENTS, lanes):
        tile //= HELD_STEP
    step = max(8, tile // lanes) if per_split * lanes > tile else 8
    per_split = -(-per_split // step) * step
    n_programs = n_blocks * -(-n_groups // per_split)
    again = max(0, per_split * lanes - tile) * held + per_split * lanes * beside
    fits = again * min(n_programs, HOLDING_PROGRAMS_PER_SM * multiprocessors) * CACHED_SHARE <= cache
    total = elements * n_blocks * held
    fills = n_programs * FULL_SHARE >= multiprocessors or total <= SMALL_BYTES
    return Plan(tile, per_split) if total <= ONE_LAUNCH_BYTES and fits and fills else None


def _of_channels(n_warps: int, kind: str, **blocks: int) -> Config:
    """With a limit on registers: left to itself, NVIDIA's assembler spills a few to fit more warps. Folded, each of a
    thread's columns has moments of its own, and eight warps may have all registers."""
    least_warps = CHANNEL_WARPS // 2 if kind == "folded" and n_warps <= 8 else CHANNEL_WARPS
    limit = min(MOST_REGISTERS, REGISTERS // (least_warps * WARP)) if WARP == 32 else None
    return config(n_warps, maxnreg=limit, **blocks)


def _holding(
    kernel: str, kind: str, lanes: int, vector: int, held: int, held_bytes: int, adds: bool, merged: int
) -> Config:
    """For programs that wait: as few threads as can keep a tile of theirs."""
    in_thread = THREAD_HELD_BYTES[kind]
    backward = kernel == "channels_backward_kernel"
    if kind == "folded" and backward and vector > 1:
        in_thread *= 2
    if kind != "folded" and vector * held_bytes < VECTOR_BYTES * (2 if backward else 1):
        in_thread //= 2  # more addresses: 149 registers were spilled for bf16, channels-last, one element an access
    if kind != "folded" and crowds(kind, vector, adds):  # folded, eight warps may have twice the registers
        in_thread //= 2
    most = held // (4 * WARP)
    if kind == "folded":
        most = min(most, 8 * max(1, held // lanes))  # eight columns, each of which has moments of its own
    n_warps = warps(held, max(1, min(most, in_thread // held_bytes)))
    return _of_channels(n_warps, kind, T=max(1, held // lanes), BLOCK_K=merged)


@remembered
def channels(
    kernel: str,
    role: str,
    kind: str,
    lanes: int,
    vector: int,
    width: int,
    types: str,
    held: int,
    held_bytes: int,
    adds: bool,
    interpreted: bool,
) -> Space:
    """T, the groups of a tile; `held`: the elements of one that is kept, of so many bytes each, or 0; `adds`: a
    residual, before an activation; `width`: the channels of a block."""
    merged = max(16, min(128, MERGED_ELEMENTS // width))
    if held and not interpreted:
        configs = [_holding(kernel, kind, lanes, vector, held, held_bytes, adds, merged)]
    else:
        most = THREADS // 4 if role == "reduces" else THREADS // 2  # threads
        tiles: tuple[int, ...] = (4096, 8192, 2048) if kind == "last" else (4096, 2048, 8192)
        per_threads: tuple[int, ...] = (32, 16) if role == "reduces" else (16, 32)
        if kind == "last" and role == "reduces" and kernel == "channels_backward_kernel":
            tiles, per_threads = (2048, 4096, 8192), (16, 32)
        if interpreted:
            tiles, per_threads = (held or INTERPRETED_TILE // 4,), (32,)
        elif vector == 1:  # an address for each element
            tiles, per_threads = (2048, 4096), (8, 16)
        elif kind == "folded":
            tiles = (8192, 16384)
        configs = [
            _of_channels(warps(tile, per_thread), kind, T=max(1, tile // lanes), BLOCK_K=merged)
            for per_thread in per_threads
            for tile in tiles
            if interpreted or tile <= most * per_thread
        ]
    key = f"{role}, {kind}, {lanes} lanes by {vector}, {types}" + (f", {held} held" if held else "")
    if kind == "folded":  # otherwise the lanes decide
        key += f", {merged} merged"
    return _space(kernel, key, configs)


@remembered
def merge_ranks(interpreted: bool) -> Space:
    """BLOCK_K ranks of BLOCK_C channels are read at a time."""
    return _space("merge_ranks_kernel", "", [config(4, BLOCK_K=8, BLOCK_C=1024 if interpreted else 128)])


_chosen: dict[tuple[str, str, str], Config] = {}
_with_foreign_choices: set[str] = set()
"""GPUs whose file has been warned of."""


def chosen(space: Space, gpu: str | None) -> Config | None:
    """The config for a space on a GPU (None: no GPU, the best guess), or None where a search has to find it."""
    if gpu is None or len(space.configs) == 1:
        return space.configs[0]
    key = (gpu, space.kernel, space.key)
    found = _chosen.get(key)
    if found is None:
        stored = measured(gpu).get(space.kernel, {}).get(space.key)
        found = None if stored is None else space.find(stored.keywords)
        if found is not None:
            _chosen[key] = found
        elif stored is not None:
            _warn_of_foreign_choices(gpu, space, stored)
    return found


def _warn_of_foreign_choices(gpu: str, space: Space, choice: Config) -> None:
    if gpu in _with_foreign_choices:
        return
    _with_foreign_choices.add(gpu)
    what = f"{choice.keywords} for {space.kernel} ({space.key or 'any columns'})"
    message = f"triton_norm: {tuned_file(gpu).name} has choices that can't be launched, such as {what}"
    warnings.warn(f"{message}; these launches are searched for", stacklevel=3)


def choose(space: Space, gpu: str, choice: Config) -> None:
    """Keep what a search found."""
    _chosen[gpu, space.kernel, space.key] = choice


def choices(gpu: str | None) -> dict[str, dict[str, dict[str, Any]]]:
    """What was chosen on a GPU so far, in the form of `tuned/<gpu>.json`."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (name, kernel, key), choice in list(_chosen.items()):  # another thread may choose meanwhile
        if name == gpu:
            found.setdefault(kernel, {})[key] = choice.keywords
    return found


def tuned_file(gpu: str) -> Path:
    return TUNED / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


@functools.cache
def measured(gpu: str) -> Mapping[str, Mapping[str, Config]]:
    """The choices shipped for a GPU by kernel and key; a file that can't be used is left out with one warning."""
    file = tuned_file(gpu)
    try:
        content = json.loads(file.read_text())
        measured_on = content.get("environment", {}).get("GPU", gpu)
        if measured_on != gpu:
            raise ValueError(f"measured on {measured_on}")
        return {
            kernel: {key: config(**{name: int(value) for name, value in found.items()}) for key, found in keys.items()}
            for kernel, keys in content["choices"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        warnings.warn(f"triton_norm: {file.name} is left out, launches are searched for: {error!r}", stacklevel=2)
        return {}
