"""The configs of BatchNorm's kernels, the blocks that they go through memory in, and how programs share channels."""

import math
from typing import NamedTuple

from triton_norm.tuning.configs import Config, Space, config, next_power_of_2, space_of, vector_width, warps_for
from triton_norm.tuning.limits import (
    MOST_REGISTERS_PER_THREAD,
    MOST_THREADS,
    REGISTERS_PER_SM,
    VECTOR_BYTES,
    Gpu,
    Limits,
)
from triton_norm.tuning.memory import remembered

BACKWARD = "channels_backward_kernel"


def channel_lanes(n_channels: int, limits: Limits) -> int:
    """Returns how many channels wide a channels-last tile is."""
    return min(limits.channels_last_lanes, next_power_of_2(n_channels))


def folds(n_samples: int, n_positions: int, itemsize: int, limits: Limits) -> bool:
    """Returns whether samples are better read as rows of whole channels, of which each has few positions."""
    access = vector_width(itemsize, n_positions) * itemsize
    narrow = access < limits.narrow_access_bytes or n_positions * itemsize < limits.short_channel_bytes
    fits = _fold_unit(n_positions) * n_positions <= limits.most_folded_columns
    return narrow and fits and n_samples >= limits.least_folded_samples


def _fold_unit(n_positions: int) -> int:
    """Returns how many channels together have a multiple of eight positions, so that their bits are whole bytes."""
    return 8 // math.gcd(n_positions, 8)


def fold(n_channels: int, n_positions: int, limits: Limits) -> tuple[int, int]:
    """Returns (lanes, channels) of a block, with the fewest lanes idle."""
    unit, widest = _fold_unit(n_positions), limits.most_folded_columns
    most = -(-n_channels // unit) * unit
    lanes, channels = 0, 1
    for candidate in (widest, widest // 2, widest // 4):
        whole = min(candidate // n_positions // unit * unit, most)
        if whole and (not lanes or whole * n_positions * lanes >= channels * n_positions * candidate):
            lanes, channels = candidate, whole
    return lanes, channels


class Plan(NamedTuple):
    """How programs share the groups of a channel.

    Args:
        tile: elements that each program keeps while it waits for the others, 0 where none waits.
        groups_per_split: groups that each program has.
    """

    tile: int
    groups_per_split: int


class SharedChannels(NamedTuple):
    """Blocks of channels that programs share.

    Args:
        kind: "flat", "last" or "folded".
        lanes: elements of a block in a group.
        vector: elements of an access.
        n_groups: groups of each block.
        elements_per_group: of one channel.
        n_blocks: blocks of all channels.
        held_bytes: of an element of the tensors that programs keep in registers; 0 where none waits for others.
        beside_bytes: of an element of the tensors that they read twice and don't keep.
        adds: the forward adds a residual.
    """

    kind: str
    lanes: int
    vector: int
    n_groups: int
    elements_per_group: int
    n_blocks: int
    held_bytes: int = 0
    beside_bytes: float = 0
    adds: bool = False


def plan_channels_apart(work: SharedChannels, gpu: Gpu) -> Plan:
    """Returns the plan of programs of which none waits for another.

    The splits of all blocks fill the GPU, many times over where they stay long enough. A split is a multiple of eight
    groups, so that no two programs write one byte of bits.
    """
    limits, n_groups = gpu.limits, work.n_groups
    fills = -(-gpu.multiprocessors // work.n_blocks)
    economical = n_groups * work.elements_per_group // limits.economical_split_elements
    most = gpu.multiprocessors * limits.channel_programs_per_sm // work.n_blocks
    n_splits = max(1, min(most, max(fills, economical)))
    return Plan(0, -(-max(-(-n_groups // n_splits), limits.min_split_elements // work.lanes) // 8) * 8)


def _crowds(work: "SharedChannels | ChannelWork") -> bool:
    """Returns whether registers are left for half as large a tile only: beside a residual that is added to a flat one,
    and in others where each element has an access, and so addresses, of its own."""
    return work.adds if work.kind == "flat" else work.vector == 1


def plan_channels(work: SharedChannels, gpu: Gpu) -> Plan | None:
    """Returns the plan of one launch whose programs wait for each other, or None where two launches are better.

    One launch is for tensors that are small, by programs that fill the GPU, where the elements that they can't keep
    will still be in cache when they read them again.
    """
    limits, lanes, held = gpu.limits, work.lanes, work.held_bytes
    elements = work.n_groups * lanes
    tile = limits.interpreted_tile_elements
    if not gpu.interpreted:
        tile = max(lanes, limits.held_bytes.of(work.kind) // held // (2 if _crowds(work) else 1))
    at_once = limits.holding_programs_per_sm * gpu.multiprocessors
    enough = max(-(-at_once // work.n_blocks), -(-elements // tile))
    peers = max(1, min(gpu.most_peers, enough, elements // limits.min_held_elements))
    per_split = -(-work.n_groups // peers)
    step = limits.held_step_factor
    while not gpu.interpreted and tile // step >= max(per_split * lanes, limits.min_held_elements, lanes):
        tile //= step
    whole = max(8, tile // lanes) if per_split * lanes > tile else 8
    per_split = -(-per_split // whole) * whole
    n_programs = work.n_blocks * -(-work.n_groups // per_split)
    again = max(0, per_split * lanes - tile) * held + per_split * lanes * work.beside_bytes
    fits = again * min(n_programs, at_once) * limits.cache_bytes_per_reread_byte <= gpu.l2_bytes
    total = elements * work.n_blocks * held
    fills = n_programs * limits.one_launch_sms_per_program >= gpu.multiprocessors or total <= limits.small_bytes
    return Plan(tile, per_split) if total <= limits.one_launch_bytes and fits and fills else None


class ChannelWork(NamedTuple):
    """One launch on blocks of channels.

    Args:
        kernel: its name.
        role: "waits" for other programs, or else "reduces" or "applies" alone.
        kind: "flat", "last" or "folded".
        lanes: elements of a block in a group.
        vector: elements of an access.
        width: channels of a block.
        types: names of the types of the tensors of x's shape that are read.
        held: elements of the tile that a program keeps while it waits, or 0.
        held_bytes: of an element of that tile.
        adds: the forward adds a residual.
    """

    kernel: str
    role: str
    kind: str
    lanes: int
    vector: int
    width: int
    types: tuple[str, ...]
    held: int = 0
    held_bytes: int = 0
    adds: bool = False

    def merged(self, limits: Limits) -> int:
        """Returns how many splits are merged at a time."""
        return max(16, min(128, limits.merged_elements // self.width))

    def key(self, limits: Limits) -> str:
        named = f"{self.role}, {self.kind}, {self.lanes} lanes by {self.vector}, {', '.join(self.types)}"
        if self.held:
            named += f", {self.held} held"
        return f"{named}, {self.merged(limits)} merged" if self.kind == "folded" else named  # else the lanes decide


def _config_of(n_warps: int, tile: int, work: ChannelWork, gpu: Gpu) -> Config:
    """Returns a config with a limit on registers: left to itself, NVIDIA's assembler spills a few to fit more warps.
    Folded, each of a thread's columns has moments of its own, and eight warps may have all registers."""
    least_warps = gpu.limits.channel_warps_per_sm
    if work.kind == "folded" and n_warps <= 8:
        least_warps //= 2
    limit = min(MOST_REGISTERS_PER_THREAD, REGISTERS_PER_SM // (least_warps * gpu.warp))
    return config(
        n_warps,
        maxnreg=limit if gpu.limits_registers else None,
        T=max(1, tile // work.lanes),
        BLOCK_K=work.merged(gpu.limits),
    )


def _waiting_config(work: ChannelWork, gpu: Gpu) -> Config:
    """Returns the config of programs that wait for each other: as few threads as can keep a tile of theirs."""
    in_thread_bytes = gpu.limits.thread_held_bytes.of(work.kind)
    most_elements = work.held // (4 * gpu.warp)
    backward = work.kernel == BACKWARD
    if work.kind == "folded":
        # Eight columns, each of which has moments of its own; eight warps may have twice the registers.
        most_elements = min(most_elements, 8 * max(1, work.held // work.lanes))
        if backward and work.vector > 1:
            in_thread_bytes *= 2
    else:
        if work.vector * work.held_bytes < VECTOR_BYTES * (2 if backward else 1):
            # More addresses: 149 registers were spilled for bf16, channels-last, one element an access.
            in_thread_bytes //= 2
        if _crowds(work):
            in_thread_bytes //= 2
    per_thread = max(1, min(most_elements, in_thread_bytes // work.held_bytes))
    return _config_of(warps_for(work.held, per_thread, gpu), work.held, work, gpu)


def _sweeping_configs(work: ChannelWork, gpu: Gpu) -> list[Config]:
    """Returns the configs of programs that go through their elements tile by tile, and wait for no other."""
    reduces, last = work.role == "reduces", work.kind == "last"
    most_threads = MOST_THREADS // 4 if reduces else MOST_THREADS // 2
    tiles: tuple[int, ...] = (4096, 8192, 2048) if last else (4096, 2048, 8192)
    per_threads = (32, 16) if reduces else (16, 32)
    if last and reduces and work.kernel == BACKWARD:
        tiles, per_threads = (2048, 4096, 8192), (16, 32)
    if work.vector == 1:  # an address for each element
        tiles, per_threads = (2048, 4096), (8, 16)
    elif work.kind == "folded":
        tiles = (8192, 16384)
    return [
        _config_of(warps_for(tile, per_thread, gpu), tile, work, gpu)
        for per_thread in per_threads
        for tile in tiles
        if tile <= most_threads * per_thread
    ]


@remembered
def channels(work: ChannelWork, gpu: Gpu) -> Space:
    """Returns the configs of a launch; T is the groups of a tile, BLOCK_K the splits that are merged at a time."""
    if gpu.interpreted:
        tile = work.held or gpu.limits.interpreted_tile_elements // 4
        configs = [_config_of(warps_for(tile, 32, gpu), tile, work, gpu)]
    elif work.held:
        configs = [_waiting_config(work, gpu)]
    else:
        configs = _sweeping_configs(work, gpu)
    return space_of(work.kernel, work.key(gpu.limits), configs)


@remembered
def merge_ranks(gpu: Gpu) -> Space:
    """Returns the config of the launch that merges processes' moments: BLOCK_K ranks of BLOCK_C channels at a time."""
    return space_of("merge_ranks_kernel", "", [config(4, BLOCK_K=8, BLOCK_C=1024 if gpu.interpreted else 128)])
