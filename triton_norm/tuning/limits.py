"""Describes the GPU that launches are chosen for, and the thresholds that decide between them.

`gpu_of` returns the `Gpu` of a device, with its `Limits`. `assumed` replaces it within a context.
"""

import contextlib
import functools
import importlib.metadata
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from triton_norm.tuning.memory import forget, when_forgotten

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
"""Triton interprets kernels in this process if this is true. It is read once, as Triton reads it."""

# A thread moves at most 16 bytes in one instruction, on every GPU.
VECTOR_BYTES = 16
# A program has at most 1024 threads, on every GPU.
MOST_THREADS = 1024
# A row is at most as long as Triton's largest tile, since one backward program may have to hold all of it.
MOST_ROW_COLUMNS = 2**20
# An NVIDIA multiprocessor has 64 K 32-bit registers, of which a thread can use 255.
REGISTERS_PER_SM = 64 * 1024
MOST_REGISTERS_PER_THREAD = 255


@dataclass(frozen=True)
class ByKind:
    """Holds a number for each BatchNorm layout, see kernels/tiles.py."""

    flat: int
    last: int
    folded: int

    def of(self, kind: str) -> int:
        number: int = getattr(self, kind)
        return number


@dataclass(frozen=True)
class Limits:
    """Holds the thresholds that decide between launches, each of them measured or a judgement."""

    # A forward program holds a row of at most this size in registers, counted in the widest stored type. A longer row
    # does not fit beside the other state of 1024 threads.
    whole_row_bytes: int = 64 * 1024
    # A longer row is processed in pieces of this size, counted in the compute type: 16 registers of each of 1024
    # threads.
    forward_piece_bytes: int = 64 * 1024
    # A backward program owns a span of at most this size, counted in the compute type. It is half of a forward's piece,
    # since x, dy and the sums of dweight and dbias are all in registers.
    backward_span_bytes: int = 32 * 1024
    # A cluster's block has at least this part of a forward's row, and two at least half as much, counted in the widest
    # stored type.
    cluster_block_bytes: int = 32 * 1024
    # A thread of such a block has this part of the row: 16 elements of a 16-bit type. With 32 of them LayerNorm with a
    # bias spilled 4 registers, and 7 to 11 beside a residual (sm_100, Triton 3.9).
    cluster_thread_bytes: int = 32
    # A cluster's block has at least this many elements of a backward's row.
    cluster_backward_elements: int = 8 * 1024
    # Rows of at least this many columns may have clusters beside programs of one block.
    cluster_least_columns: int = 4 * 1024
    # Clusters may prefetch rows of at most this many columns...
    cluster_prefetched_columns: int = 16 * 1024
    # ... of which a thread has this many in the forward: one access in a 16-bit type.
    cluster_prefetched_elements: int = 8
    # Channels and groups from this size on may have clusters, counted in the type that stays in registers.
    cluster_least_bytes: int = 16 * 1024
    # A thread of a cluster has at most this many elements of a channel in the forward: 48 channels-last spilled 10
    # registers, and 64 channels-first 16 (sm_90, Triton 3.9).
    cluster_elements: ByKind = ByKind(flat=56, last=32, folded=80)
    # A thread of a cluster has at most this many elements of a group in GroupNorm's backward, of 16-bit types and fp32
    # alike: both are in registers as fp32. With SiLU 32 spilled 9 registers, windows 12, and a residual 4 (Triton 3.9).
    cluster_group_elements: int = 32
    # A multiprocessor has this many row elements in registers in the backward, each with x, dy and two sums.
    rows_backward_elements_per_sm: int = 8 * 1024
    # A program that sums over the rows of one modulation has at least this many rows: two sums in float32, written and
    # read, are then at most 5 % of dy, x and dx in a 16-bit type.
    modulated_split_rows: int = 64
    # At most a third of the SMs cooperate on one row or channel, so that three such launches can run concurrently
    # without deadlock.
    sms_per_peer: int = 3

    # A channels-last tile is at most this many channels wide: 64 bytes of a 16-bit type.
    channels_last_lanes: int = 32
    # A folded block has at most this many columns.
    most_folded_columns: int = 2048
    # A folded block of whole groups is narrower, so that all of its rows can stay in registers.
    most_folded_group_columns: int = 64
    # A cluster's folded block is narrower, since it is folded by a mask of its channels and its columns.
    most_folded_cluster_columns: int = 256
    # A backward by rows of whole groups has at most this many columns: more leave a program few rows to keep.
    most_group_row_columns: int = 512
    # A program of a GroupNorm has whole groups of up to this many elements, padded to a power of two. A judgement.
    whole_group_elements: int = 8 * 1024
    # Fewer samples are not folded: most rows of a tile would be empty.
    least_folded_samples: int = 8
    # Samples are folded if an access along a channel's positions would move fewer bytes than this...
    narrow_access_bytes: int = 8
    # ... or if a channel's positions in a sample take fewer bytes than this.
    short_channel_bytes: int = 128

    # An unfused launch has at most this many programs a multiprocessor.
    channel_programs_per_sm: int = 16
    # A split of a block of channels has at least this many elements.
    min_split_elements: int = 2048
    # If there are more splits than fill the GPU, each has at least this many elements of a channel: partial results are
    # then at most 2 % of the bytes read.
    economical_split_elements: int = 512
    # A fused launch is used up to this size of x, in the backward of x and dy together.
    one_launch_bytes: int = 8 * 1024 * 1024
    # The resident tile of a program is at most this large...
    resident_bytes: ByKind = ByKind(flat=32 * 1024, last=16 * 1024, folded=32 * 1024)
    # ... and each thread's part of it at most this large.
    thread_resident_bytes: ByKind = ByKind(flat=128, last=64, folded=64)
    # Resident tile sizes grow by this factor, which bounds the number of compiled variants.
    resident_step_factor: int = 4
    # A multiprocessor runs this many programs with a resident tile at once.
    holding_programs_per_sm: int = 2
    # A program of a fused launch has at least this many elements.
    min_resident_elements: int = 1024
    # Data that all resident programs read twice may occupy at most half of L2.
    cache_bytes_per_reread_byte: int = 2
    # A fused launch fills at least half of the SMs...
    one_launch_sms_per_program: int = 2
    # ... unless its tensors are at most this large.
    small_bytes: int = 4 * 1024 * 1024
    # Registers a thread are limited so that a multiprocessor has room for at least this many warps.
    channel_warps_per_sm: int = 16
    # A program merges this many elements of partial results at a time.
    merged_elements: int = 2048

    # An interpreted program has a tile of this many elements: the interpreter's cost is per operation, not per element.
    interpreted_tile_elements: int = 16384


@dataclass(frozen=True)
class Gpu:
    """Describes the device that launches are chosen for.

    Args:
        name: key of its measured choices. None: use the best guesses; read no file, search for nothing.
        multiprocessors: number of SMs (NVIDIA) or CUs (AMD).
        l2_bytes: size of the L2 cache.
        warp: threads of a warp.
        interpreted: kernels run in Triton's interpreter.
        limits: thresholds that decide between launches.
        most_blocks: most blocks of a cluster, a program whose blocks share memory; 1: there are no clusters.
    """

    name: str | None
    multiprocessors: int
    l2_bytes: int
    warp: int = 32
    interpreted: bool = False
    limits: Limits = Limits()
    most_blocks: int = 1

    @property
    def most_peers(self) -> int:
        """Returns the most programs that may share a row or a channel, a power of two."""
        return 1 << max(0, (self.multiprocessors // self.limits.sms_per_peer).bit_length() - 1)

    @property
    def limits_registers(self) -> bool:
        """Returns True if Triton can limit the registers of a thread: on NVIDIA's GPUs alone."""
        return self.warp == 32


WARP_THREADS = 64 if torch.version.hip else 32

# Kernels on CPU tensors are interpreted, and launched as for this GPU. One multiprocessor gives the fewest programs,
# which the interpreter runs one after the other. The cache size is an H100's.
STAND_IN = Gpu(name=None, multiprocessors=1, l2_bytes=50 * 1024 * 1024, warp=WARP_THREADS, interpreted=INTERPRETED)

# These GPUs are assumed by open contexts, by a token of each context. The last one entered is in force.
_assumed: dict[object, Gpu] = {}
_in_force: Gpu | None = None


PORTABLE_BLOCKS = 8
"""Clusters of at most this many blocks run on every GPU with clusters. Larger ones leave parts of a GPU idle."""
CLUSTERS_SINCE = (3, 9)
"""Triton reduces over the blocks of a cluster from this version on; 3.8 does so for tensors of one axis only."""
CLUSTER_GENERATIONS = (9, 10)
"""Major numbers of NVIDIA's compute capabilities for which the kernels have been compiled as clusters."""


@functools.cache
def most_blocks_of(capability: tuple[int, int] | None) -> int:
    """Returns the most blocks of a cluster on NVIDIA's GPUs of a compute capability, None for another GPU."""
    if capability is None or capability[0] not in CLUSTER_GENERATIONS or INTERPRETED:
        return 1
    version = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("triton"))
    assert version is not None
    return PORTABLE_BLOCKS if tuple(map(int, version.groups())) >= CLUSTERS_SINCE else 1


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """Returns the `assumed` GPU, or else the device's own, or `STAND_IN` for a device that is no GPU."""
    if _in_force is not None:
        return _in_force
    if device.type != "cuda":
        return STAND_IN
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        torch.cuda.get_device_name(device),
        int(properties.multi_processor_count),
        int(properties.L2_cache_size),
        WARP_THREADS,
        INTERPRETED,
        most_blocks=most_blocks_of(None if torch.version.hip else (properties.major, properties.minor)),
    )


when_forgotten(gpu_of.cache_clear)


def limits_in_force() -> Limits:
    """Returns the limits in force. Doesn't query the device: that of a fake tensor may not exist."""
    return STAND_IN.limits if _in_force is None else _in_force.limits


@contextlib.contextmanager
def assumed(gpu: Gpu) -> Iterator[None]:
    """Makes every device appear as this GPU within the context, in all threads. Clears the cached results.

    Of several open contexts the last one entered decides, in whatever order they are left.
    """
    token = object()
    _assumed[token] = gpu
    _put_in_force()
    try:
        yield
    finally:
        del _assumed[token]
        _put_in_force()


def _put_in_force() -> None:
    global _in_force
    _in_force = next(reversed(_assumed.values()), None)
    forget()
