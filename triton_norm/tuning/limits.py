"""Describes the GPU that launches are picked for, and the numbers that pick them.

Functions of this package get a `Gpu`, which holds the `Limits`. `gpu_of` tells a device's; `assumed` puts another one
in its place.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from triton_norm.tuning.memory import forget, when_forgotten

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
"""Whether Triton interprets kernels in this process; read once, as Triton itself reads it."""

# A thread moves at most 16 bytes by one instruction, on every GPU.
VECTOR_BYTES = 16
# A program has at most 1024 threads, on every GPU.
MOST_THREADS = 1024
# A row is at most as long as Triton's largest tile, since one backward program has all of it where programs don't share
# rows.
MOST_COLUMNS = 2**20
# An NVIDIA multiprocessor has 64 K 32-bit registers, and each thread can name 255 of them.
REGISTERS_PER_SM = 64 * 1024
MOST_REGISTERS_PER_THREAD = 255


@dataclass(frozen=True)
class ByKind:
    """A number for each way in which BatchNorm's programs go through memory: along the positions of a channel, across
    channels that lie side by side, and along whole samples as rows."""

    flat: int
    last: int
    folded: int

    def of(self, kind: str) -> int:
        number: int = getattr(self, kind)
        return number


@dataclass(frozen=True)
class Limits:
    """The numbers that decide between launches, each of them a matter of measurement or of taste."""

    # A forward program has a whole row in registers up to this size of a row in its widest stored type: a longer one
    # does not fit beside all else that 1024 threads keep.
    whole_row_bytes: int = 64 * 1024
    # Programs share a longer row in pieces of this size, in the type that is computed in: 16 registers of each of 1024
    # threads.
    forward_piece_bytes: int = 64 * 1024
    # A backward program has this much of a row, in the type that is computed in. It is half of a forward's piece: x, dy
    # and the sums of dweight and dbias are in registers at once.
    backward_span_bytes: int = 32 * 1024
    # The backward programs of a multiprocessor have this many elements of rows at once: x, dy and two sums of each
    # element are in registers.
    rows_backward_elements_per_sm: int = 8 * 1024
    # At most a third of the multiprocessors have programs that share one row or channel: three launches can then run at
    # once, and none waits for programs that can't start.
    sms_per_peer: int = 3

    # A channels-last tile is at most 32 channels wide: 64 bytes of a 16-bit type.
    channels_last_lanes: int = 32
    # A block of whole channels, of samples that are read as rows, has at most this many columns.
    most_folded_columns: int = 2048
    # Fewer samples are not read as rows: most rows of a tile would be empty.
    least_folded_samples: int = 8
    # Samples are read as rows where an access along a channel's positions would move fewer bytes than this...
    narrow_access_bytes: int = 8
    # ... or where a channel's positions in a sample take fewer bytes than this.
    short_channel_bytes: int = 128

    # Where no program waits for others, at most this many programs a multiprocessor share all channels.
    channel_programs_per_sm: int = 16
    # A split of a block of channels has at least this many elements.
    min_split_elements: int = 2048
    # More splits than fill the GPU have at least this many elements of each channel: what a split leaves for the merge
    # is then at most 2 % of what it reads.
    economical_split_elements: int = 512
    # One launch reduces and applies up to this size of the tensors that its programs keep or read again: x forward, x
    # and dy backward.
    one_launch_bytes: int = 8 * 1024 * 1024
    # A program that waits for others keeps a tile of at most this size in registers...
    held_bytes: ByKind = ByKind(flat=32 * 1024, last=16 * 1024, folded=32 * 1024)
    # ... of which each of its threads has at most this much.
    thread_held_bytes: ByKind = ByKind(flat=128, last=64, folded=64)
    # The sizes of tiles in registers differ by this factor, which bounds the number of kernels that are compiled.
    held_step_factor: int = 4
    # A multiprocessor runs this many programs at once that keep a tile.
    holding_programs_per_sm: int = 2
    # A program that waits for others has at least this many elements.
    min_held_elements: int = 1024
    # All programs that run at once may read again at most half of the bytes that the cache holds.
    cache_bytes_per_reread_byte: int = 2
    # One launch has programs for at least half of the multiprocessors...
    one_launch_sms_per_program: int = 2
    # ... unless these tensors are at most this large.
    small_bytes: int = 4 * 1024 * 1024
    # The registers of a thread are limited to leave a multiprocessor room for at least this many warps.
    channel_warps_per_sm: int = 16
    # A program merges this many elements at a time of what the splits left.
    merged_elements: int = 2048

    # An interpreted program has a tile of this many elements: the interpreter's cost is per operation, not per element.
    interpreted_tile_elements: int = 16384


@dataclass(frozen=True)
class Gpu:
    """The device that launches are picked for.

    Args:
        name: names its choices; None has the best guesses, with no file read and nothing searched.
        multiprocessors: NVIDIA's SMs, AMD's CUs.
        l2_bytes: size of the cache that all multiprocessors share.
        warp: threads that run in step.
        interpreted: whether kernels run under Triton's interpreter.
        limits: the numbers that decide between launches on it.
    """

    name: str | None
    multiprocessors: int
    l2_bytes: int
    warp: int = 32
    interpreted: bool = False
    limits: Limits = Limits()

    @property
    def most_peers(self) -> int:
        """Programs that may share a row or a channel, a power of two."""
        return 1 << max(0, (self.multiprocessors // self.limits.sms_per_peer).bit_length() - 1)

    @property
    def limits_registers(self) -> bool:
        """Whether Triton can limit the registers of a thread: NVIDIA's assembler alone is asked to."""
        return self.warp == 32


WARP_THREADS = 64 if torch.version.hip else 32

# Kernels on CPU tensors are interpreted, and launched as on this GPU: one multiprocessor has the fewest programs, which
# run one after the other. The cache is an H100's.
STAND_IN = Gpu(name=None, multiprocessors=1, l2_bytes=50 * 1024 * 1024, warp=WARP_THREADS, interpreted=INTERPRETED)

# The GPUs that are assumed now, by a token of the context that assumes each; the last one entered is in force.
_assumed: dict[object, Gpu] = {}
_in_force: Gpu | None = None


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """Returns the GPU that is `assumed`, or else the device's own, or `STAND_IN` for a device that is no GPU."""
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
    )


when_forgotten(gpu_of.cache_clear)


def limits_in_force() -> Limits:
    """Returns the limits, which all GPUs share today. Asks no GPU for them: a fake tensor's may not be there."""
    return STAND_IN.limits if _in_force is None else _in_force.limits


@contextlib.contextmanager
def assumed(gpu: Gpu) -> Iterator[None]:
    """Has every device be this GPU within this context, in all threads. Forgets what followed from another one.

    Of several such contexts the one entered last decides, in whatever order they are left.
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
