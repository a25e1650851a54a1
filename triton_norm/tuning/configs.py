"""Defines Config, the constants that a launch is compiled for, and Space, the candidates for one kernel and key."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from triton_norm.tuning.limits import MOST_THREADS, VECTOR_BYTES, Gpu


@dataclass(frozen=True)
class Config:
    """Holds a kernel's block sizes, its numbers of warps and stages, and its limit on registers a thread, if any.

    Args:
        num_warps: warps of a block.
        num_ctas: blocks of a program. Several form a cluster, and reduce through each other's shared memory.
    """

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int = 1
    maxnreg: int | None = None
    num_ctas: int = 1

    def __getitem__(self, block: str) -> int:
        return self.keywords[block]

    @functools.cached_property
    def span(self) -> int:
        """Returns the columns of a row that a program owns."""
        return self["BLOCK_N"] * self.keywords.get("PIECES", 1)

    @functools.cached_property
    def keywords(self) -> dict[str, int]:
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        cluster = {} if self.num_ctas == 1 else {"num_ctas": self.num_ctas}
        return {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages, **limit, **cluster}


def config(num_warps: int, num_stages: int = 1, maxnreg: int | None = None, num_ctas: int = 1, **blocks: int) -> Config:
    return Config(tuple(blocks.items()), num_warps, num_stages, maxnreg, num_ctas)


@dataclass(frozen=True)
class Space:
    """Holds the configs that a kernel may be launched with for one key, the best guess first."""

    kernel: str
    key: str
    configs: tuple[Config, ...]

    def find(self, keywords: Mapping[str, int]) -> Config | None:
        """Returns the config with these keywords, in any order, or None: no other config is ever launched."""
        return next((config for config in self.configs if config.keywords == keywords), None)


def space_of(kernel: str, key: str, configs: Sequence[Config]) -> Space:
    return Space(kernel, key, tuple(dict.fromkeys(configs)))


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def vector_width(itemsize: int, *extents: int) -> int:
    """Returns the widest access, in elements: a power of two that divides every extent, at most 16 bytes."""
    width = VECTOR_BYTES // itemsize
    for extent in extents:
        while extent % width:
            width //= 2
    return width


def warps_for(elements: int, per_thread: int, gpu: Gpu) -> int:
    """Returns the number of warps for `elements` at `per_thread` elements a thread, at most MOST_THREADS threads."""
    return min(MOST_THREADS, max(gpu.warp, next_power_of_2(elements) // per_thread)) // gpu.warp
