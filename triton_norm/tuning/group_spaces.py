"""Lists the configs of GroupNorm's own kernels."""

from typing import NamedTuple

from triton_norm.tuning import channel_clusters
from triton_norm.tuning.configs import Config, Space, config, next_power_of_2, space_of, warps_for
from triton_norm.tuning.limits import MOST_REGISTERS_PER_THREAD, MOST_THREADS, REGISTERS_PER_SM, Gpu
from triton_norm.tuning.memory import remembered

# A program's elements and a thread's, in the order in which a search tries them. None of them has been measured.
_TILES = 4096, 8192, 2048
_PER_THREAD = 16, 32


class WholeWork(NamedTuple):
    """Describes groups of which a program has several, whole in registers.

    Args:
        accesses: accesses that read a group, a power of two.
        vector: elements of an access.
        run: elements of an access with a common weight and bias.
        types: names of the dtypes of the inputs of x's shape.
        curved: an activation is computed, which takes registers.
        windows: a group begins and ends within accesses.
    """

    accesses: int
    vector: int
    run: int
    types: tuple[str, ...]
    curved: bool
    windows: bool = False

    @property
    def elements(self) -> int:
        return self.accesses * self.vector

    @property
    def key(self) -> str:
        named = f"{self.elements} elements by {self.vector}, weights by {self.run}, {', '.join(self.types)}"
        if self.windows:
            named += ", windows"
        return f"{named}, curved" if self.curved else named


def fits(work: WholeWork, gpu: Gpu) -> bool:
    """Decides whether a program has whole groups. This depends on a group's size, and not on the number of samples."""
    if gpu.interpreted:
        return work.elements <= gpu.limits.interpreted_tile_elements
    return work.elements <= gpu.limits.whole_group_elements // (2 if work.vector == 1 else 1)


def _config_of(tile: int, per_thread: int, work: "WholeWork | GradientWork", gpu: Gpu) -> Config:
    """Returns a config that limits registers. Without a limit, NVIDIA's assembler spills a few to fit more warps."""
    n_warps = warps_for(max(tile, work.elements), per_thread, gpu)
    threads = max(gpu.limits.channel_warps_per_sm, n_warps) * gpu.warp
    limit = min(MOST_REGISTERS_PER_THREAD, REGISTERS_PER_SM // threads) if gpu.limits_registers else None
    return config(n_warps, maxnreg=limit, M=max(1, tile // work.elements))


@remembered
def whole(work: WholeWork, gpu: Gpu) -> Space:
    """Returns the configs of a launch. M is the groups of a program."""
    if gpu.interpreted:
        groups = max(1, gpu.limits.interpreted_tile_elements // work.elements)
        return space_of("groups_forward_kernel", work.key, [config(4, M=groups)])
    per_threads: tuple[int, ...] = _PER_THREAD
    if work.curved or work.windows or len(work.types) > 1 or work.run < work.vector:
        per_threads = per_threads[:1]
    if work.vector == 1:  # each element needs an address: with 16 a thread a few registers were spilled
        per_threads = (per_threads[0] // 2,)
    configs = [
        _config_of(tile, per_thread, work, gpu)
        for per_thread in per_threads
        for tile in _TILES
        if tile <= MOST_THREADS // 2 * per_thread
    ]
    return space_of("groups_forward_kernel", work.key, configs)


class GradientWork(NamedTuple):
    """Describes groups whose gradient is computed in registers, by one program, by members of a team, or by a cluster.

    Args:
        members: programs that share a group.
        chunks: programs that share a channel.
        channels: channels of a group, or of a member's part of it, padded to a power of two.
        accesses: accesses that read a channel, or a member's part of it, a power of two.
        vector: elements of an access.
        types: names of the dtypes of the inputs of x's shape.
        curved: an activation is computed, which takes registers; of a cluster one whose derivative is more than a mask
            of two values.
        windows: a channel begins and ends within accesses.
        blocks: the fewest blocks of a cluster; 1: a program is one block.
    """

    members: int
    chunks: int
    channels: int
    accesses: int
    vector: int
    types: tuple[str, ...]
    curved: bool
    windows: bool = False
    blocks: int = 1

    @property
    def elements(self) -> int:
        return self.channels * self.accesses * self.vector

    @property
    def key(self) -> str:
        role = "clusters" if self.blocks > 1 else "waits" if self.members > 1 else "alone"
        named = f"{role}, {self.channels} channels of {self.accesses} by {self.vector}, {', '.join(self.types)}"
        if self.windows:
            named += ", windows"
        return f"{named}, curved" if self.curved else named


def _read(n_positions: int, vector: int) -> tuple[int, bool]:
    """Returns the elements of the accesses that read a channel at most, and whether it is read as windows, of which the
    first access may begin with all but one element of another channel."""
    windows = n_positions % vector > 0
    return n_positions + (vector - 1 if windows else 0), windows


def gradient_work(
    shape: tuple[int, int], vector: int, types: tuple[str, ...], itemsize: int, curved: bool, gpu: Gpu
) -> GradientWork | None:
    """Returns the work of a program, or None if a group does not fit into the registers of a team.

    It depends on the group's size and on the GPU, and not on the number of samples.

    Args:
        shape: channels of a group, and their positions.
        itemsize: bytes of an element of x and one of dy together.
    """
    per_group, n_positions = shape
    n_positions, windows = _read(n_positions, vector)
    most = gpu.limits.interpreted_tile_elements
    if not gpu.interpreted:
        most = min(gpu.limits.whole_group_elements, gpu.limits.resident_bytes.flat // itemsize)
        most //= 2 if vector == 1 else 1
    accesses = next_power_of_2(-(-n_positions // vector))
    fitting = most // (accesses * vector)
    if fitting == 0:
        if per_group == 1:  # a whole channel, which is read as a BatchNorm's
            return None
        accesses = 1 << (most // vector).bit_length() - 1
    chunks = -(-n_positions // (accesses * vector))
    channels = min(next_power_of_2(per_group), 1 << max(1, fitting).bit_length() - 1)
    members = -(-per_group // channels) * chunks
    if members > gpu.most_peers:
        return None
    return GradientWork(members, chunks, channels, accesses, vector, types, curved, windows)


def _of_cluster_thread(work: GradientWork, gpu: Gpu) -> int:
    """Returns the elements that a thread of a cluster has: half of the limit with an activation, windows or a residual,
    which take registers, and a quarter with an activation and one of the others."""
    others = work.windows or len(work.types) > 2
    return gpu.limits.cluster_group_elements // (4 if work.curved and others else 2 if work.curved or others else 1)


def gradient_cluster(
    shape: tuple[int, int], vector: int, types: tuple[str, ...], itemsize: int, curved: bool, gpu: Gpu
) -> GradientWork | None:
    """Returns the work of a cluster that has a whole group, or None if there are no clusters, a group is too small or
    too large for one, or it is one channel, which is read as a BatchNorm's.

    Args: as in `gradient_work`.
    """
    per_group, n_positions = shape
    narrow = vector * itemsize < 2 * gpu.limits.narrow_access_bytes
    if per_group == 1 or narrow or "float64" in types:
        return None
    n_positions, windows = _read(n_positions, vector)
    accesses, channels = next_power_of_2(-(-n_positions // vector)), next_power_of_2(per_group)
    work = GradientWork(1, 1, channels, accesses, vector, types, curved, windows)
    threads = work.elements // _of_cluster_thread(work, gpu)
    warps = channel_clusters.warps_of(threads, channel_clusters.MOST_WARPS, gpu)
    return work._replace(blocks=threads // (warps[0] * gpu.warp)) if warps else None


@remembered
def gradient(work: GradientWork, gpu: Gpu) -> Space:
    """Returns the configs of a launch. M is the groups of a program."""
    if work.blocks > 1:
        threads, most = work.elements // _of_cluster_thread(work, gpu), channel_clusters.MOST_WARPS
        warps = channel_clusters.warps_of(threads, most, gpu)
        clusters = [channel_clusters.cluster_of(n, threads, most, gpu, M=1) for n in warps]
        return space_of("groups_fused_backward_kernel", work.key, clusters)
    tiles: tuple[int, ...] = (work.elements,) if work.members > 1 else _TILES
    if gpu.interpreted:
        tiles = (gpu.limits.interpreted_tile_elements,) if work.members == 1 else tiles
        configs = [config(4, M=max(1, tile // work.elements)) for tile in tiles]
        return space_of("groups_fused_backward_kernel", work.key, configs)
    # Narrow accesses need more addresses: accesses by 4 with SiLU spilled up to 3 registers with 16 elements a thread.
    per_thread = 8 if work.vector == 1 or ((work.windows or work.curved) and work.vector <= 4) else 16
    configs = [
        _config_of(tile, per_thread, work, gpu)
        for tile in tiles
        if tile <= max(MOST_THREADS // 2 * per_thread, work.elements)
    ]
    return space_of("groups_fused_backward_kernel", work.key, configs)


@remembered
def groups_backward(gpu: Gpu) -> Space:
    """Returns the configs of the launch that combines sums over channels."""
    return space_of("groups_backward_kernel", "", [config(4, BLOCK_K=8, BLOCK_C=1024 if gpu.interpreted else 128)])


@remembered
def move_by_samples(gpu: Gpu) -> Space:
    """Returns the configs of the launch that updates InstanceNorm's running statistics."""
    return space_of("move_by_samples_kernel", "", [config(4, BLOCK_K=8, BLOCK_C=1024 if gpu.interpreted else 128)])
