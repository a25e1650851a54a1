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

# A block has this many warps at most, of up to 128 registers a thread, or half as many, to share a multiprocessor.
_MOST_WARPS = 16
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


def _of_thread(work: SharedChannels | ChannelWork, backward: bool, gpu: Gpu) -> tuple[int, int]:
    """Returns the elements of a tile that a thread has, and the most tiles that fit into its registers."""
    if backward:
        per_thread = gpu.limits.thread_resident_bytes.of(work.kind) // work.resident_bytes
        # A derivative of z takes registers: channels-first GELU's spilled 21, and channels-last ReLU's one (sm_100).
        per_thread //= 2 if (work.curved if work.kind == "flat" else work.streams) else 1
        return 1 << per_thread.bit_length() - 1, 1
    # A weight for each element takes registers, and a residual beside a GELU: 56 elements a thread spilled one.
    few = work.run == 1 or (work.curved and work.adds)
    most = gpu.limits.cluster_elements.of("last" if few else work.kind)
    return work.vector, most // work.vector


def blocks_of(threads: int, gpu: Gpu) -> int | None:
    """Returns the fewest blocks of a cluster with these threads, or None if it would have too few or too many, or there
    are no clusters."""
    blocks = max(2, -(-threads // (_MOST_WARPS * gpu.warp)))
    too_few, too_many = threads < 2 * _LEAST_WARPS * gpu.warp, blocks > 2 * gpu.most_blocks
    return None if gpu.most_blocks == 1 or too_few or too_many else blocks


def plan_clusters(work: SharedChannels, kernel: str, is_group: bool, gpu: Gpu) -> Clusters | None:
    """Returns the plan of a launch whose programs have whole blocks of channels, or None if there are no clusters, or
    a block is too small or too large for one.

    Args:
        is_group: blocks are groups of a GroupNorm, whose launches don't depend on the number of samples.
    """
    limits, backward = gpu.limits, kernel == BACKWARD
    elements = work.n_groups * work.lanes
    n_resident = 2 if backward else 1
    fits = work.kind != "folded" and 0 < work.resident_bytes <= 4 * n_resident
    fits = fits and work.vector * work.resident_bytes >= limits.narrow_access_bytes * n_resident
    fits = fits and (work.kind == "flat" or work.lanes >= _LEAST_COLUMNS)
    if not fits or elements * work.resident_bytes < limits.cluster_least_bytes:
        return None
    per_thread, most_tiles = _of_thread(work, backward, gpu)
    threads = next_power_of_2(-(-elements // (per_thread * most_tiles)))
    tile = max(threads * per_thread, work.lanes)
    blocks = blocks_of(threads, gpu)
    if blocks is None:
        return None
    total = elements * work.n_blocks * work.resident_bytes
    fills = blocks * work.n_blocks * limits.one_launch_sms_per_program >= gpu.multiprocessors
    if not (is_group or fills or total <= limits.small_bytes):
        return None
    return Clusters(Plan(tile, work.n_groups, -(-elements // tile)), blocks <= gpu.most_blocks)


def configs_of(threads: int, gpu: Gpu, **constants: int) -> list[Config]:
    """Returns the configs of clusters with these threads. A block has a multiprocessor to itself, or shares it."""
    warps = threads // gpu.warp
    fitting = [n for n in (_MOST_WARPS, _MOST_WARPS // 2, _LEAST_WARPS) if 2 <= warps // n <= gpu.most_blocks]
    limit = min(REGISTERS_PER_SM // (_MOST_WARPS * gpu.warp), MOST_REGISTERS_PER_THREAD)
    return [config(n, maxnreg=limit, num_ctas=warps // n, **constants) for n in fitting[:2] or [_MOST_WARPS]]


@remembered
def clusters(work: ChannelWork, gpu: Gpu) -> Space:
    """Returns the configs of a launch. T and BLOCK_K are as in channel_spaces.channels."""
    per_thread, _ = _of_thread(work, work.kernel == BACKWARD, gpu)
    tile = {"T": work.resident // work.lanes, "BLOCK_K": work.merged(gpu.limits)}
    return space_of(work.kernel, work.key(gpu.limits), configs_of(work.resident // per_thread, gpu, **tile))


def forms(space: Space, n_launches: int, portable: bool) -> Space:
    """Returns the forms that a search tries. Clusters are the best guess if they are portable, the last resort if not.

    Args:
        space: the configs of the clusters.
        n_launches: launches without clusters.
    """
    order = (CLUSTERS, APART) if portable else (APART, CLUSTERS)
    return space_of(space.kernel, f"{n_launches} launches or {space.key}", order)
