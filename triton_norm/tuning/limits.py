"""Names the GPU that launches are picked for, and the numbers that pick them.

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

# The widest access of a thread is 128 bits on every GPU.
VECTOR_BYTES = 16
# A program has no more threads than this on every GPU.
MOST_THREADS = 1024
# A row is at most as long as Triton's largest tile, which is one backward program's where nothing shares a row.
MOST_COLUMNS = 2**20
# An NVIDIA multiprocessor has so many 32-bit registers, and its threads can name so many.
REGISTERS_PER_SM = 64 * 1024
MOST_REGISTERS_PER_THREAD = 255


@dataclass(frozen=True)
class ByKind:
    """One number for each way in which BatchNorm's programs go through memory."""

    flat: int
    last: int
    folded: int

    def of(self, kind: str) -> int:
        number: int = getattr(self, kind)
        return number


@dataclass(frozen=True)
class Limits:
    """The numbers that decide between launches, each of them a matter of measurement or of taste."""

    # A forward program has a whole row in registers if the row takes no more bytes than this in its widest stored
    # type: more does not fit beside all else that 1024 threads keep.
    whole_row_bytes: int = 64 * 1024
    # Of a longer row it has a piece of so many bytes in the type that it computes in: 16 registers of 1024 threads.
    forward_piece_bytes: int = 64 * 1024
    # A backward program has so many bytes of a row in the type that it computes in. That is half a forward's piece:
    # x, dy and the sums of dweight and dbias are in registers at once.
    backward_span_bytes: int = 32 * 1024
    # A multiprocessor runs backward programs with so many elements of rows at once: each element takes a register for
    # x, dy and two sums.
    rows_backward_elements_per_sm: int = 8 * 1024
    # At most one program for so many multiprocessors shares a row or a channel: as many launches can run at once
    # without waiting for each other's programs forever.
    sms_per_peer: int = 3

    # A channels-last tile is at most so many channels wide: 64 bytes of a 16-bit type.
    channels_last_lanes: int = 32
    # A block of whole channels, folded, has at most so many columns.
    most_folded_columns: int = 2048
    # Fewer samples than this are not folded: most rows of the tile would be empty.
    least_folded_samples: int = 8
    # Samples are folded if an access could otherwise move fewer bytes than `narrow_access_bytes`, or if a channel's
    # positions in a sample are fewer bytes than `short_channel_bytes`.
    narrow_access_bytes: int = 8
    short_channel_bytes: int = 128

    # Where no program waits for another, at most so many programs for each multiprocessor share all channels.
    channel_programs_per_sm: int = 16
    # A split of a block of channels has at least so many elements.
    min_split_elements: int = 2048
    # Once they fill the GPU, splits have at least so many elements of each channel: what they leave for each other is
    # then at most 2 % of what they read.
    economical_split_elements: int = 512
    # One launch does both halves of the work if there are at most so many bytes that its programs would keep or read
    # again.
    one_launch_bytes: int = 8 * 1024 * 1024
    # A program that waits for others keeps a tile of at most so many bytes in registers, and each thread so many.
    held_bytes: ByKind = ByKind(flat=32 * 1024, last=16 * 1024, folded=32 * 1024)
    thread_held_bytes: ByKind = ByKind(flat=128, last=64, folded=64)
    # Tiles that are kept differ in size by this factor, so that few of them are compiled.
    held_step_factor: int = 4
    # So many programs that keep a tile run on a multiprocessor at once.
    holding_programs_per_sm: int = 2
    # A program that waits for others has at least so many elements.
    min_held_elements: int = 1024
    # Programs read again, all that run at once together, at most one byte for so many bytes of cache.
    cache_bytes_per_reread_byte: int = 2
    # One launch needs at least one program for so many multiprocessors, unless x has at most `small_bytes`.
    one_launch_sms_per_program: int = 2
    small_bytes: int = 4 * 1024 * 1024
    # Registers of a thread are limited so that a multiprocessor has room for at least so many warps.
    channel_warps_per_sm: int = 16
    # A program merges so many elements at a time of what the splits left.
    merged_elements: int = 2048

    # An interpreted program has a tile of so many elements: the interpreter's cost is per operation, not per element.
    interpreted_tile_elements: int = 16384


@dataclass(frozen=True)
class Gpu:
    """What launches are picked for.

    Args:
        name: as in the names of the files of choices; None is a GPU for which nothing is measured nor searched.
        multiprocessors: NVIDIA's SMs, AMD's CUs.
        l2_bytes: of the cache that all multiprocessors share.
        warp: threads that run together.
        interpreted: kernels run under Triton's interpreter.
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

# Stands in for a GPU where there is none: kernels are interpreted, or launches are looked at and not made. One
# multiprocessor has the fewest programs, and an H100's cache keeps all that the tests have.
STAND_IN = Gpu(name=None, multiprocessors=1, l2_bytes=50 * 1024 * 1024, warp=WARP_THREADS, interpreted=INTERPRETED)

_assumed: dict[object, Gpu] = {}
"""By a token of the context that assumes it; the latest is in force."""
_in_force: Gpu | None = None


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """Returns the GPU that a device is, the stand-in for one that is none, or the one that is `assumed`."""
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
    """Returns the limits of every device's GPU, without asking for one: a fake tensor's may not be there."""
    return STAND_IN.limits if _in_force is None else _in_force.limits


@contextlib.contextmanager
def assumed(gpu: Gpu) -> Iterator[None]:
    """Within this context, in all threads, every device is this GPU. What followed from another one is forgotten.

    Of several contexts the one entered last decides, in whatever order they are left.
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
