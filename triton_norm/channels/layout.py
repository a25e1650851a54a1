"""Maps tensors [samples, channels, *positions] in memory to the tiles of kernels/channels.py."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from triton_norm.plain import collapsed_stride, holds
from triton_norm.tuning import channel_spaces
from triton_norm.tuning.configs import next_power_of_2, vector_width
from triton_norm.tuning.limits import VECTOR_BYTES, limits_in_force

MOST_POSITIONS = 2**30
"""A sample has at most this many positions: the kernels number them, and those of a tile past the end, in 32 bits."""

MOST_SAMPLE_COLUMNS = 2**30
"""A folded sample has at most this many columns: the kernels number them in 32 bits."""

MOST_CHANNELS = 2**29
"""There are at most this many channels: the kernels number three statistics of each in 32 bits."""


class Placement(NamedTuple):
    """Holds a tensor's strides as [samples, channels, positions], and its address modulo 16 bytes, `misaligned`.

    Axes of length 1 have stride 0, a single sample the dense stride: their own values would only compile more kernels.
    """

    sample_stride: int
    channel_stride: int
    position_stride: int
    itemsize: int
    misaligned: int


class Layout(NamedTuple):
    """Holds the constants that the kernels need of x's layout; kernels/tiles.py defines them."""

    axis: int | None
    vector: int
    lanes: int
    fold: int
    width: int
    n_channels: int
    n_columns: int
    block_columns: int
    columns_per_channel: int
    groups_per_sample: int

    @property
    def n_blocks(self) -> int:
        return -(-self.n_columns // self.block_columns)

    @property
    def elements_per_group(self) -> int:
        return self.vector if self.axis is None else self.columns_per_channel

    @property
    def geometry(self) -> tuple[int, ...]:
        unit = 1 if self.axis is None else self.vector
        return self.n_columns // unit, self.block_columns // unit, self.columns_per_channel, self.groups_per_sample

    def runs(self, elements_per_parameter: int | None) -> tuple[int | None, int | None]:
        """Returns RUN and parameter_runs of kernels/channels.py, for groups that are read as channels."""
        if elements_per_parameter is None:
            return None, None
        run = 1 if elements_per_parameter % self.vector else self.vector
        return run, elements_per_parameter // run

    def spread(self, placement: Placement) -> bool:
        """Returns True if a channel's lanes are adjacent, False if they are one element, expanded."""
        if self.axis is None:
            return bool(placement.position_stride) or self.groups_per_sample * self.vector == 1
        if self.fold:
            return bool(placement.position_stride)
        return bool(placement.channel_stride) or self.n_columns == 1

    def strides(self, placement: Placement | None) -> tuple[int, int, int]:
        """Returns the (sample, group, channel) strides, divided by V unless the lanes are one element, expanded."""
        if placement is None:
            return 0, 0, 0
        spread = self.spread(placement)
        unit = self.vector if spread else 1
        group = placement.position_stride * self.vector if self.axis is None else placement.position_stride
        channel = 0 if self.axis == 0 and spread else placement.channel_stride
        return placement.sample_stride // unit, 0 if self.fold else group // unit, channel // unit


def beyond(shape: Sequence[int]) -> str | None:
    """Returns the reason if a tensor has too many positions or channels for the kernels to number, or None."""
    if holds(math.prod(shape[2:]) > MOST_POSITIONS):
        return f"a sample has more than {MOST_POSITIONS} positions"
    if len(shape) > 1 and holds(shape[1] > MOST_CHANNELS):
        return f"there are more than {MOST_CHANNELS} channels"
    return None


def _strides(x: Tensor) -> tuple[int, int, int] | None:
    """Returns the (sample, channel, position) strides, or None if the positions are not equivalent to one axis."""
    shape, strides = x.shape, x.stride()
    position_stride = collapsed_stride(shape[2:], strides[2:])
    if position_stride is None:
        return None
    sample_stride = strides[0] if holds(shape[0] > 1) else math.prod(shape[1:])
    return sample_stride, strides[1] if shape[1] > 1 else 0, position_stride


def channels_last(x: Tensor) -> bool:
    """Decides whether a position's channels are adjacent; True if x has a single position."""
    return math.prod(x.shape[2:]) == 1 or (x.shape[1] > 1 and x.stride(1) == 1)


def kind_of(x: Tensor) -> str:
    """Returns "last", "folded" or "flat", see kernels/tiles.py."""
    if channels_last(x):
        return "last"
    n_samples, n_channels, *positions = x.shape
    n_positions = math.prod(positions)
    strides = _strides(x)
    copied = strides is None or strides[2] != 1
    gapless = copied or n_channels == 1 or (strides is not None and strides[1] == n_positions)
    numbered = n_channels * n_positions < MOST_SAMPLE_COLUMNS
    limits = limits_in_force()
    folds = gapless and numbered and holds(channel_spaces.folds(n_samples, n_positions, x.itemsize, limits))
    return "folded" if folds else "flat"


def reads(x: Tensor, kind: str, broadcast: bool = False) -> bool:
    """Decides whether x can be read in this layout uncopied; with `broadcast`, lanes may be one element, expanded."""
    strides = _strides(x)
    if strides is None:
        return False
    _, channel_stride, position_stride = strides
    lane_stride = channel_stride if kind == "last" else position_stride
    if broadcast and lane_stride == 0:
        return True
    if kind == "folded" and x.shape[1] > 1 and channel_stride != math.prod(x.shape[2:]):
        return False
    return lane_stride == 1 or (kind == "last" and x.shape[1] == 1)


def copies(x: Tensor, kind: str) -> bool:
    return not reads(x, kind)


def _channels_last_strides(shape: Sequence[int]) -> list[int]:
    strides, stride = [1], max(shape[1], 1)
    for length in reversed(shape[2:]):
        strides.insert(1, stride)
        stride *= max(length, 1)
    return [stride, *strides]


def is_dense(x: Tensor, kind: str) -> bool:
    """Decides whether x has the strides that `dense_like` gives in this layout."""
    if kind != "last" or math.prod(x.shape[2:]) == 1:
        return x.is_contiguous()
    return list(x.stride()) == _channels_last_strides(x.shape)


def dense_like(x: Tensor, dtype: torch.dtype | None = None, kind: str | None = None) -> Tensor:
    """Returns an empty dense tensor of x's shape in the layout `kind`; None: x's own."""
    if type(x.shape[0]) is int and x.is_contiguous() and (kind != "last" or math.prod(x.shape[2:]) == 1):
        return torch.empty_like(x, dtype=dtype)
    last = channels_last(x) if kind is None else kind == "last"
    if not last or math.prod(x.shape[2:]) == 1:
        return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    strides = _channels_last_strides(x.shape)
    return x.new_empty_strided(x.shape, strides, dtype=dtype or x.dtype)  # not a view: autograd forbids writes to it


class Readable(NamedTuple):
    """Holds a tensor that the kernels can read, and its strides."""

    tensor: Tensor
    placement: Placement


def as_readable(x: Tensor, kind: str, broadcast: bool = False) -> Readable:
    """Returns x, or a copy if its strides don't allow to read it in this layout, and the strides."""
    if not reads(x, kind, broadcast):
        x = dense_like(x, x.dtype, kind).copy_(x)
    strides = _strides(x)
    assert strides is not None
    return Readable(x, Placement(*strides, x.itemsize, x.data_ptr() % VECTOR_BYTES))


def vector_of(placements: Sequence[Placement], *extents: int) -> int:
    """Returns the widest access in elements: 16 bytes of the narrowest type, or less by addresses and extents."""
    vector = vector_width(min(placement.itemsize for placement in placements), *extents)
    for placement in placements:
        if placement.misaligned:
            vector = min(vector, max(1, (placement.misaligned & -placement.misaligned) // placement.itemsize))
    return vector


def layout_of(
    shape: Sequence[int],
    kind: str,
    *placements: Placement,
    instance_strides: Sequence[int] = (),
    most_columns: int | None = None,
) -> Layout:
    """Returns the layout in which tensors with these strides are read together, with the widest common access.

    Args:
        instance_strides: elements from one slice of this shape to the next, of each tensor that has slices.
        most_columns: as in `channel_spaces.fold`; None: those of programs that share blocks of channels.
    """
    n_channels, n_positions = shape[1], math.prod(shape[2:])
    if kind == "last":
        spread = [placement for placement in placements if placement.channel_stride or n_channels == 1]
        strides = [
            *instance_strides,
            *(stride for placement in spread for stride in (placement.sample_stride, placement.position_stride)),
        ]
        lanes = channel_spaces.channel_lanes(n_channels, limits_in_force())
        vector = vector_of(spread or placements, n_channels, *strides)
        return Layout(0, vector, lanes, 0, 1, n_channels, n_channels, lanes, 1, n_positions)
    spread = [placement for placement in placements if placement.position_stride]
    strides = [*instance_strides, *(placement.sample_stride for placement in spread)]
    if kind == "folded":
        n_columns = n_channels * n_positions
        limits = limits_in_force()
        lanes, channels = channel_spaces.fold(
            n_channels, n_positions, limits, most_columns or limits.most_folded_columns
        )
        vector = vector_of(spread or placements, n_columns, channels * n_positions, *strides)
        fold, width = next_power_of_2(channels), next_power_of_2(n_positions)
        return Layout(0, vector, lanes, fold, width, n_channels, n_columns, channels * n_positions, n_positions, 1)
    strides += [placement.channel_stride for placement in spread]
    vector = vector_of(spread or placements, n_positions, *strides)
    return Layout(None, vector, vector, 0, 1, n_channels, n_channels, 1, 1, n_positions // vector)


def _bits_per_byte(n_channels: int, kind: str) -> int:
    """Returns the number of bits used of each byte, as in kernels/activations.py."""
    if kind != "last" or n_channels > 4:
        return 8
    return 4 if n_channels > 2 else n_channels


def _bit_rows(shape: Sequence[int], kind: str) -> tuple[int, int]:
    """Returns (rows, bits of a row) for one bit an element. Each row begins with a new byte."""
    n_samples, n_channels, *positions = shape
    n_positions = math.prod(positions)
    if kind == "flat":
        return n_channels, n_samples * n_positions
    if kind == "last":
        return n_samples * n_positions, n_channels
    return n_samples, n_channels * n_positions


def empty_bits(x: Tensor, kind: str) -> Tensor:
    """Returns an empty tensor for one bit an element of x, in the layout `kind`."""
    rows, used = _bit_rows(x.shape, kind)
    per_byte = _bits_per_byte(x.shape[1], kind)
    return x.new_empty(rows * ((used + per_byte - 1) // per_byte), dtype=torch.uint8)


def mask_of_bits(bits: Tensor, x: Tensor, kind: str) -> Tensor:
    """Returns the bits that a kernel has stored in the layout `kind` as booleans of x's shape."""
    rows, used = _bit_rows(x.shape, kind)
    within = torch.arange(_bits_per_byte(x.shape[1], kind), dtype=torch.uint8, device=x.device)
    unpacked = ((bits[:, None] >> within) & 1 != 0).view(rows, -1)[:, :used]
    n_samples, n_channels, *positions = x.shape
    if kind == "flat":
        return unpacked.reshape(n_channels, n_samples, *positions).movedim(0, 1)
    if kind == "last":
        return unpacked.reshape(n_samples, *positions, n_channels).movedim(-1, 1)
    return unpacked.reshape(x.shape)
