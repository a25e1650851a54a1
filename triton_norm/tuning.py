"""Every number that picks a launch: the config spaces, their keys, and the choices that were measured.

A choice is found in this order: made before in this process; `tuned/<gpu>.json`, measured by the project; a search by
`triton.autotune` among the space's configs, which keeps its result on disk. Keys never hold the number of rows or
samples: another batch size compiles nothing, searches nothing, and rounds every row as before.
"""

import functools
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TUNED = Path(__file__).parent / "tuned"

VECTOR_BYTES = 16
THREADS = 1024  # of a program, at most
WARP = 64 if torch.version.hip else 32  # threads
LANES = 64  # channels side by side in a channels-last tile: 128 bytes of a 16-bit type
WHOLE_ROW_FORWARD_BYTES = 128 * 1024  # of one row in the type it is computed in: 32 registers for each of 1024 threads
WHOLE_ROW_BACKWARD_BYTES = 32 * 1024  # x, dy and the sums of dweight and dbias are held at once
CHANNEL_PROGRAMS_PER_SM = 16
MIN_SPLIT_ELEMENTS = 2048
SEARCH_WARMUP_MS, SEARCH_MS = 10, 40  # for each config
INTERPRETED_TILE = 16384  # elements; the interpreter's cost is per operation, not per element
INTERPRETED_SMS = 1


@dataclass(frozen=True)
class Config:
    """What a launch is specialised by: the kernel's block sizes, and how many warps and stages run them."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int = 1

    def __getitem__(self, block: str) -> int:
        return dict(self.blocks)[block]

    @functools.cached_property
    def keywords(self) -> dict[str, int]:
        return {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Space:
    """The configs that one kernel may be launched with for one key, the best guess first."""

    kernel: str
    key: str
    configs: tuple[Config, ...]


def config(num_warps: int, num_stages: int = 1, **blocks: int) -> Config:
    return Config(tuple(blocks.items()), num_warps, num_stages)


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


def forget() -> None:
    """Makes every space anew: the numbers above have been changed."""
    for made in (rows_forward, rows_backward, rows_backward_finalise, channels, channels_finalise):
        made.cache_clear()


def _space(kernel: str, key: str, configs: list[Config]) -> Space:
    return Space(kernel, key, tuple(dict.fromkeys(configs)))


@functools.cache
def rows_forward(n_cols: int, dtype: str, compute_bytes: int, interpreted: bool) -> Space:
    """Several short rows a program, one row in registers, or pieces of a long one."""
    width = next_power_of_2(n_cols)
    whole = width * compute_bytes <= WHOLE_ROW_FORWARD_BYTES
    key = f"columns {width}, {dtype}"
    if interpreted:
        block = width if whole else INTERPRETED_TILE
        configs = [config(4, BLOCK_M=max(1, INTERPRETED_TILE // block), BLOCK_N=block, WHOLE_ROW=whole)]
    elif whole:
        tiles = sorted({max(width, tile) for tile in (1024, 2048, 4096)})
        configs = [
            config(warps(tile, per_thread), BLOCK_M=tile // width, BLOCK_N=width, WHOLE_ROW=True)
            for per_thread in (16, 8, 32)
            for tile in tiles
            if tile <= THREADS * per_thread
        ]
    else:
        configs = [
            config(warps(block, 16), BLOCK_M=1, BLOCK_N=block, WHOLE_ROW=False)
            for block in (8192, 16384, 4096)
            if block * compute_bytes <= WHOLE_ROW_FORWARD_BYTES // 2
        ]
    return _space("rows_forward_kernel", key, configs)


@functools.cache
def rows_backward(n_cols: int, dtype: str, compute_bytes: int, interpreted: bool) -> Space:
    """STAGES > 1 fetches the next rows through shared memory while this one is computed."""
    width = next_power_of_2(n_cols)
    whole = width * compute_bytes <= WHOLE_ROW_BACKWARD_BYTES
    key = f"columns {width}, {dtype}"
    if interpreted:
        block = width if whole else INTERPRETED_TILE // 4
        tile = INTERPRETED_TILE if whole else 4 * block
        configs = [config(4, BLOCK_M=max(1, tile // block), BLOCK_N=block, WHOLE_ROW=whole, STAGES=1)]
    elif whole:
        tile = max(width, 1024)
        configs = [
            config(warps(tile, per_thread), BLOCK_M=tile // width, BLOCK_N=width, WHOLE_ROW=True, STAGES=stages)
            for per_thread in (8, 16)
            for stages in (2, 1, 3)
            if tile <= THREADS * per_thread
        ]
    else:
        piece = 8192 // compute_bytes
        configs = [
            config(threads // WARP, BLOCK_M=rows, BLOCK_N=columns, WHOLE_ROW=False, STAGES=1)
            for threads, rows, columns in (
                (512, 4, piece),
                (256, 4, piece),
                (512, 2, 2 * piece),
                (256, 2, piece),
                (512, 1, 2 * piece),
            )
        ]
    return _space("rows_backward_kernel", key, configs)


def rows_backward_programs(n_rows: int, n_cols: int, multiprocessors: int) -> int:
    """Programs that share the rows, and rows of partial sums; apart from the space, which searches with these fixed."""
    per_sm = min(8, max(1, 8192 // next_power_of_2(n_cols)))
    return max(1, min(n_rows, multiprocessors * per_sm))


@functools.cache
def rows_backward_finalise(interpreted: bool) -> Space:
    shapes = ((64, 512),) if interpreted else ((64, 32), (128, 16), (32, 64))
    configs = [config(4, BLOCK_M=rows, BLOCK_N=columns) for rows, columns in shapes]
    return _space("rows_backward_finalise_kernel", "", configs)


def channel_lanes(vector: int, n_channels: int, channels_last: bool) -> int:
    return min(LANES, next_power_of_2(n_channels)) if channels_last else vector


@functools.cache
def channels(kernel: str, lanes: int, vector: int, dtype: str, channels_last: bool, interpreted: bool) -> Space:
    """T, the groups of a tile, for any of the kernels that sweep x."""
    layout = "last" if channels_last else "first"
    tiles: tuple[int, ...] = (2048, 4096, 8192) if channels_last else (4096, 2048, 8192)
    per_threads = (16, 32)
    if interpreted:
        tiles = (INTERPRETED_TILE // 4,)
    elif vector == 1:  # an address for each element
        tiles, per_threads = (2048, 4096), (8, 16)
    configs = [config(warps(tile, per_thread), T=tile // lanes) for per_thread in per_threads for tile in tiles]
    return _space(kernel, f"channels {layout}, {lanes} lanes by {vector}, {dtype}", configs)


@functools.cache
def channels_finalise(kernel: str) -> Space:
    return _space(kernel, "", [config(4, BLOCK_K=32, BLOCK_C=32)])


def groups_per_split(n_groups: int, lanes: int, n_blocks: int, multiprocessors: int) -> int:
    """Groups of a channel that one program sweeps, so that every block of channels together fills the GPU."""
    n_splits = max(1, multiprocessors * CHANNEL_PROGRAMS_PER_SM // n_blocks)
    return max(-(-n_groups // n_splits), MIN_SPLIT_ELEMENTS // lanes)


_chosen: dict[tuple[str, str, str], Config] = {}


def chosen(space: Space, gpu: str | None) -> Config | None:
    """The config for a space on a GPU (None: no GPU, the best guess), or None where a search has to find it."""
    if gpu is None or len(space.configs) == 1:
        return space.configs[0]
    key = (gpu, space.kernel, space.key)
    found = _chosen.get(key) or measured(gpu).get(space.kernel, {}).get(space.key)
    if found is not None:
        _chosen[key] = found
    return found


def choose(space: Space, gpu: str, choice: Config) -> None:
    """Keep what a search found."""
    _chosen[gpu, space.kernel, space.key] = choice


def choices(gpu: str | None) -> dict[str, dict[str, dict[str, Any]]]:
    """What was chosen on a GPU so far, in the form of `tuned/<gpu>.json`."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (name, kernel, key), choice in _chosen.items():
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
        kernels = json.loads(file.read_text())["choices"]
        return {
            kernel: {key: config(**{name: int(value) for name, value in found.items()}) for key, found in keys.items()}
            for kernel, keys in kernels.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"triton_norm: {file.name} is left out, launches are searched for: {error!r}", stacklevel=2)
        return {}
