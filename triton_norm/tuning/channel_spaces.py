"""Lists the configs of the BatchNorm kernels, and plans how programs share channels."""

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
    return min(limits.channels_last_lanes, next_power_of_2(n_channels))


def folds(n_samples: int, n_positions: int, itemsize: int, limits: Limits) -> bool:
    """Decides whether to read samples as rows of whole channels, since each channel has few positions."""
    access = vector_width(itemsize, n_positions) * itemsize
    narrow = access < limits.narrow_access_bytes or n_positions * itemsize < limits.short_channel_bytes
    fits = _fold_unit(n_positions) * n_positions <= limits.most_folded_columns
    return narrow and fits and n_samples >= limits.least_folded_samples


def folds_groups(per_group: int, limits: Limits) -> bool:
    """Decides whether a program of a GroupNorm's backward has rows of whole groups of this many channels each."""
    return _fold_unit(per_group) * per_group <= limits.most_group_row_columns


def _fold_unit(n_positions: int) -> int:
    """Returns the fewest channels with a multiple of 8 positions together, so that their bits fill whole bytes."""
    return 8 // math.gcd(n_positions, 8)


def fold(n_channels: int, n_positions: int, limits: Limits, most_columns: int) -> tuple[int, int]:
    """Returns (lanes, channels) of a folded block, with the fewest idle lanes.

    Args:
        most_columns: most columns of a block, if the fewest channels that it may have are not more.
    """
    unit = _fold_unit(n_positions)
    widest = min(limits.most_folded_columns, max(most_columns, next_power_of_2(unit * n_positions)))
    most = -(-n_channels // unit) * unit
    lanes, channels = 0, 1
    for candidate in (widest, widest // 2, widest // 4):
        whole = min(candidate // n_positions // unit * unit, most)
        if whole and (not lanes or whole * n_positions * lanes >= channels * n_positions * candidate):
            lanes, channels = candidate, whole
    return lanes, channels


class Plan(NamedTuple):
    """Describes how programs share the groups of a channel.

    Args:
        tile: elements that stay resident in registers while a program waits; 0 if none waits.
        groups_per_split: groups of each program.
        tiles: tiles that a program has in registers, if it is a cluster with a whole block of channels; else 0.
    """

    tile: int
    groups_per_split: int
    tiles: int = 0


class SharedChannels(NamedTuple):
    """Describes blocks of channels that programs share.

    Args:
        kind: layout: "flat", "last" or "folded", see kernels/tiles.py.
        lanes: elements of a group.
        vector: elements of an access.
        n_groups: groups of each block.
        elements_per_group: elements of a group that belong to one channel.
        n_blocks: number of blocks.
        resident_bytes: bytes an element of the tensors that stay resident in registers; 0 for unfused launches.
        streamed_bytes: bytes an element of the tensors that are streamed twice.
        adds: the forward adds a residual.
        run: elements of an access with a common weight and bias, if blocks have whole groups of a GroupNorm; else None.
        curved: as in ChannelWork.
    """

    kind: str
    lanes: int
    vector: int
    n_groups: int
    elements_per_group: int
    n_blocks: int
    resident_bytes: int = 0
    streamed_bytes: float = 0
    adds: bool = False
    run: int | None = None
    curved: bool = False

    @property
    def streams(self) -> bool:
        return self.streamed_bytes > 0


def plan_channels_apart(work: SharedChannels, gpu: Gpu) -> Plan:
    """Returns the plan of launches whose programs don't wait for each other.

    The splits of all blocks fill the GPU, several times over if they are long enough. A split is a multiple of eight
    groups, so that no two programs write to one byte of bits.
    """
    limits, n_groups = gpu.limits, work.n_groups
    fills = -(-gpu.multiprocessors // work.n_blocks)
    economical = n_groups * work.elements_per_group // limits.economical_split_elements
    most = gpu.multiprocessors * limits.channel_programs_per_sm // work.n_blocks
    n_splits = max(1, min(most, max(fills, economical)))
    return Plan(0, -(-max(-(-n_groups // n_splits), limits.min_split_elements // work.lanes) // 8) * 8)


def _crowds(work: "SharedChannels | ChannelWork") -> bool:
    """Decides whether a tile has to be half as large, for lack of registers: in the flat layout if a residual is added,
    or each element of a group has a weight of its own; in the others if each element needs an address of its own, or a
    residual is added to groups."""
    if work.kind == "flat":
        return work.adds or work.run == 1
    return work.vector == 1 or (work.adds and work.run is not None)


def _largest_tile(work: SharedChannels, gpu: Gpu) -> int:
    """Returns the most elements that a program of a fused launch has in registers."""
    if gpu.interpreted:
        return gpu.limits.interpreted_tile_elements
    resident = gpu.limits.resident_bytes.of(work.kind) // work.resident_bytes
    return max(work.lanes, resident // (2 if _crowds(work) else 1))


def _tile_for(per_split: int, tile: int, work: SharedChannels, gpu: Gpu) -> int:
    """Returns the smallest of a few tile sizes that has room for the groups of a split, or else `tile`."""
    limits, step = gpu.limits, gpu.limits.resident_step_factor
    while not gpu.interpreted and tile // step >= max(per_split * work.lanes, limits.min_resident_elements, work.lanes):
        tile //= step
    return tile


def plan_channels(work: SharedChannels, gpu: Gpu) -> Plan | None:
    """Returns the plan of a fused launch, whose programs wait for each other, or None if two launches are better.

    A fused launch suits tensors that are small, if its programs fill the GPU, and if the elements that don't stay
    resident will still be in L2 when they are read again.
    """
    limits, lanes, resident = gpu.limits, work.lanes, work.resident_bytes
    elements, tile = work.n_groups * lanes, _largest_tile(work, gpu)
    at_once = limits.holding_programs_per_sm * gpu.multiprocessors
    enough = max(-(-at_once // work.n_blocks), -(-elements // tile))
    peers = max(1, min(gpu.most_peers, enough, elements // limits.min_resident_elements))
    per_split = -(-work.n_groups // peers)
    tile = _tile_for(per_split, tile, work, gpu)
    whole = max(8, tile // lanes) if per_split * lanes > tile else 8
    per_split = -(-per_split // whole) * whole
    n_programs = work.n_blocks * -(-work.n_groups // per_split)
    again = max(0, per_split * lanes - tile) * resident + per_split * lanes * work.streamed_bytes
    fits = again * min(n_programs, at_once) * limits.cache_bytes_per_reread_byte <= gpu.l2_bytes
    total = elements * work.n_blocks * resident
    fills = n_programs * limits.one_launch_sms_per_program >= gpu.multiprocessors or total <= limits.small_bytes
    return Plan(tile, per_split) if total <= limits.one_launch_bytes and fits and fills else None


def plan_groups(work: SharedChannels, gpu: Gpu) -> Plan | None:
    """Returns the plan of a fused launch on a GroupNorm's groups, or None if they don't fit into registers.

    The programs that share a block are as many as can keep it in registers. Their number depends on the block's size
    and on the GPU, and not on the number of samples. Tensors that are streamed twice have to be in L2 the second time.
    """
    tile, at_once = _largest_tile(work, gpu), gpu.limits.holding_programs_per_sm * gpu.multiprocessors
    peers = -(-work.n_groups * work.lanes // tile)
    again = tile * work.streamed_bytes * at_once * gpu.limits.cache_bytes_per_reread_byte
    if peers > gpu.most_peers or again > gpu.l2_bytes:
        return None
    per_split = -(-work.n_groups // peers)
    return Plan(_tile_for(per_split, tile, work, gpu), per_split)


class ChannelWork(NamedTuple):
    """Describes one launch on blocks of channels.

    Args:
        kernel: name of the kernel.
        role: "waits" (fused), "clusters" (fused, without waiting), "reduces" or "applies".
        kind, lanes, vector, adds, run: as in SharedChannels.
        width: channels of a block.
        types: names of the dtypes of the inputs of x's shape.
        resident: elements of a resident tile, or 0.
        resident_bytes: bytes an element of the resident tile.
        curved: an activation is computed whose derivative is more than a mask of two values, which takes registers.
        tiles: resident tiles of a cluster, or 0.
        streams: a cluster reads a residual or bits in each sweep.
    """

    kernel: str
    role: str
    kind: str
    lanes: int
    vector: int
    width: int
    types: tuple[str, ...]
    resident: int = 0
    resident_bytes: int = 0
    adds: bool = False
    curved: bool = False
    run: int | None = None
    tiles: int = 0
    streams: bool = False

    def merged(self, limits: Limits) -> int:
        return max(16, min(128, limits.merged_elements // self.width))

    def key(self, limits: Limits) -> str:
        named = f"{self.role}, {self.kind}, {self.lanes} lanes by {self.vector}, {', '.join(self.types)}"
        if self.tiles:
            named += f", {self.tiles} tiles of {self.resident}"
        elif self.resident:
            named += f", {self.resident} held"
        if self.streams:
            named += ", streamed"
        if self.curved:
            named += ", curved"
        if self.run is not None:
            named += f", weights by {self.run}"
        return f"{named}, {self.merged(limits)} merged" if self.kind == "folded" else named  # lanes decide otherwise


def _config_of(n_warps: int, tile: int, work: ChannelWork, gpu: Gpu) -> Config:
    """Returns a config that limits registers. Without a limit, NVIDIA's assembler spills a few to fit more warps.
    Folded, each column of a thread has moments of its own: up to eight warps may use all registers."""
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
    """Returns the config of programs that wait for each other, with the fewest threads that can hold the tile."""
    in_thread_bytes = gpu.limits.thread_resident_bytes.of(work.kind)
    most_elements = work.resident // (4 * gpu.warp)
    backward = work.kernel == BACKWARD
    if work.kind == "folded":
        # A thread has eight columns, with moments of their own; eight warps may use twice the registers.
        most_elements = min(most_elements, 8 * max(1, work.resident // work.lanes))
        if backward and work.vector > 1 and work.run is None:  # with weights of their own columns take more
            in_thread_bytes *= 2
    else:
        if work.vector * work.resident_bytes < VECTOR_BYTES * (2 if backward else 1):
            # Narrow accesses need more addresses: bf16, channels-last, one element an access spilled 149 registers.
            in_thread_bytes //= 2
        if _crowds(work):
            in_thread_bytes //= 2
        if work.curved or (work.run is not None and work.vector > 1):
            in_thread_bytes //= 2
    per_thread = max(1, min(most_elements, in_thread_bytes // work.resident_bytes))
    return _config_of(warps_for(work.resident, per_thread, gpu), work.resident, work, gpu)


def _sweeping_configs(work: ChannelWork, gpu: Gpu) -> list[Config]:
    """Returns the configs of programs that process their elements tile by tile, and wait for none."""
    reduces, last = work.role == "reduces", work.kind == "last"
    most_threads = MOST_THREADS // 4 if reduces else MOST_THREADS // 2
    tiles: tuple[int, ...] = (4096, 8192, 2048) if last else (4096, 2048, 8192)
    per_threads = (32, 16) if reduces else (16, 32)
    if last and reduces and work.kernel == BACKWARD:
        tiles, per_threads = (2048, 4096, 8192), (16, 32)
    if work.vector == 1:  # each element needs an address
        tiles, per_threads = (2048, 4096), (8, 16)
    elif work.kind == "folded":
        tiles = (4096, 8192) if work.curved else (8192, 16384)  # a thread has half as many elements of the former
    if work.curved:
        per_threads = per_threads[0] // 2, per_threads[1] // 2
    return [
        _config_of(warps_for(tile, per_thread, gpu), tile, work, gpu)
        for per_thread in per_threads
        for tile in tiles
        if tile <= most_threads * per_thread
    ]


@remembered
def channels(work: ChannelWork, gpu: Gpu) -> Space:
    """Returns the configs of a launch. T is the groups of a tile, BLOCK_K the splits merged at a time."""
    if gpu.interpreted:
        tile = work.resident or gpu.limits.interpreted_tile_elements // 4
        configs = [_config_of(warps_for(tile, 32, gpu), tile, work, gpu)]
    elif work.resident:
        configs = [_waiting_config(work, gpu)]
    else:
        configs = _sweeping_configs(work, gpu)
    return space_of(work.kernel, work.key(gpu.limits), configs)


@remembered
def merge_ranks(gpu: Gpu) -> Space:
    return space_of("merge_ranks_kernel", "", [config(4, BLOCK_K=8, BLOCK_C=1024 if gpu.interpreted else 128)])
