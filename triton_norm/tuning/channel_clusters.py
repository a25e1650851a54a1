"""Plans BatchNorms and GroupNorms whose programs are clusters with whole channels in registers, and lists configs.

Compiled by Triton 3.9 for sm_90 and sm_100 these don't spill; no GPU has run them.
"""

from typing import NamedTuple

from triton_norm.tuning.channel_spaces import BACKWARD, ChannelWork, Plan, SharedChannels
from triton_norm.tuning.configs import Config, Space, config, next_power_of_2, space_of
from triton_norm.tuning.limits import MOST_REGISTERS_PER_THREAD, REGISTERS_PER_SM, Gpu
from triton_norm.tuning.memory import remembered

APART, CLUSTERS = config(1, CLUSTERS=0), config(1, CLUSTERS=1)
"""The choice between two forms is stored as that of a config: the launches without clusters, or that of clusters."""

MOST_WARPS = 16
"""A block has this many warps at most, of up to 128 registers a thread, or half as many, to share a multiprocessor."""
# Folded, each column of a thread has means of its own: these many warps have up to 255 registers a thread.
_MOST_FOLDED_WARPS = 8
# Twice as wide, a backward of 15 × 15 positions spilled 5 registers (sm_100).
_MOST_FOLDED_LANES = 1024
# A block has at least this many warps.
_LEAST_WARPS = 4
# Channels-last, Triton 3.9 fails to compile clusters for 2 and 4 columns.
_LEAST_COLUMNS = 8


class Clusters(NamedTuple):
    """Describes a launch of clusters, each with a whole block of channels.

    Args:
        plan: tile and tiles of a program.
        portable: clusters of as many blocks run on every GPU that has clusters.
    """

    plan: Plan
    portable: bool


def _most_warps(work: SharedChannels | ChannelWork) -> int:
    return _MOST_FOLDED_WARPS if work.kind == "folded" else MOST_WARPS


def _of_thread(work: SharedChannels | ChannelWork, backward: bool, gpu: Gpu) -> tuple[int, int]:
    """Returns the elements of a tile that a thread has, and the most tiles that fit into its registers."""
    if backward:
        per_thread = gpu.limits.thread_resident_bytes.of(work.kind) // work.resident_bytes
        per_thread *= MOST_WARPS // _most_warps(work)
        # A derivative of z takes registers: channels-first GELU's spilled 21, and channels-last ReLU's one (sm_100).
        per_thread //= 2 if (work.streams if work.kind == "last" else work.curved) else 1
        return 1 << per_thread.bit_length() - 1, 1
    # A weight for each element takes registers, and a residual beside a GELU: 56 elements a thread spilled one.
    few = work.kind != "folded" and (work.run == 1 or (work.curved and work.adds))
    most = gpu.limits.cluster_elements.of("last" if few else work.kind)
    return work.vector, most // work.vector


def warps_of(threads: int, most: int, gpu: Gpu) -> list[int]:
    """Returns the warps that a block may have, if any: of a cluster of at most 8 blocks, or else of 16.

    The first have a multiprocessor to themselves, the second share it.

    Args:
        threads: those of the cluster.
        most: warps that a block has at most.
    """
    if gpu.most_blocks == 1:
        return []
    most_blocks = gpu.most_blocks if threads <= most * gpu.warp * gpu.most_blocks else 2 * gpu.most_blocks
    blocks = {n: threads // (n * gpu.warp) for n in (most, most // 2, _LEAST_WARPS)}
    return [n for n, count in blocks.items() if 2 <= count <= most_blocks][:2]


def cluster_of(n_warps: int, threads: int, most: int, gpu: Gpu, **constants: int) -> Config:
    """Returns the config of clusters whose blocks have n_warps; arguments as in `warps_of`."""
    limit = min(REGISTERS_PER_SM // (most * gpu.warp), MOST_REGISTERS_PER_THREAD)
    return config(n_warps, maxnreg=limit, num_ctas=threads // (n_warps * gpu.warp), **constants)


def _warps(work: SharedChannels | ChannelWork, threads: int, per_thread: int, gpu: Gpu) -> list[int]:
    """Returns `warps_of` blocks that have whole rows of a folded tile, or any part of another.

    Args:
        per_thread: elements of a tile that a thread has.
    """
    warps = warps_of(threads, _most_warps(work), gpu)
    return [n for n in warps if work.kind != "folded" or n * gpu.warp * per_thread >= work.lanes]


def plan_clusters(work: SharedChannels, kernel: str, is_group: bool, gpu: Gpu) -> Clusters | None:
    """Returns the plan of a launch whose programs have whole blocks of channels, or None if there are no clusters, or
    a block is too small or too large for one.

    Args:
        is_group: blocks are groups of a GroupNorm, whose launches don't depend on the number of samples.
    """
    limits, backward = gpu.limits, kernel == BACKWARD
    elements = work.n_groups * work.lanes
    n_resident = 2 if backward else 1
    fits = 0 < work.resident_bytes <= 4 * n_resident
    fits = fits and work.vector * work.resident_bytes >= limits.narrow_access_bytes * n_resident
    fits = fits and (work.kind == "flat" or work.lanes >= _LEAST_COLUMNS)
    fits = fits and (work.kind != "folded" or work.lanes <= _MOST_FOLDED_LANES)
    if not fits or elements * work.resident_bytes < limits.cluster_least_bytes:
        return None
    per_thread, most_tiles = _of_thread(work, backward, gpu)
    threads = next_power_of_2(-(-elements // (per_thread * most_tiles)))
    tile = max(threads * per_thread, work.lanes)
    warps = _warps(work, threads, per_thread, gpu)
    if not warps:
        return None
    total = elements * work.n_blocks * work.resident_bytes
    blocks = threads // (warps[0] * gpu.warp)
    fills = blocks * work.n_blocks * limits.one_launch_sms_per_program >= gpu.multiprocessors
    if not (is_group or fills or total <= limits.small_bytes):
        return None
    return Clusters(Plan(tile, work.n_groups, -(-elements // tile)), blocks <= gpu.most_blocks)


@remembered
def clusters(work: ChannelWork, gpu: Gpu) -> Space:
    """Returns the configs of a launch. T and BLOCK_K are as in channel_spaces.channels."""
    per_thread, _ = _of_thread(work, work.kernel == BACKWARD, gpu)
    threads, tile = work.resident // per_thread, {"T": work.resident // work.lanes, "BLOCK_K": work.merged(gpu.limits)}
    configs = [
        cluster_of(n, threads, _most_warps(work), gpu, **tile, BLOCKS=threads // (n * gpu.warp))
        for n in _warps(work, threads, per_thread, gpu)
    ]
    return space_of(work.kernel, work.key(gpu.limits), configs)


def forms(space: Space, n_launches: int, portable: bool) -> Space:
    """Returns the forms that a search tries. Clusters are the best guess if they are portable, the last resort if not.

    Args:
        space: the configs of the clusters.
        n_launches: launches without clusters.
    """
    order = (CLUSTERS, APART) if portable else (APART, CLUSTERS)
    return space_of(space.kernel, f"{n_launches} launches or {space.key}", order)
