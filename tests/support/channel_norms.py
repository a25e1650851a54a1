"""Calls of batch_norm in every layout, with a residual and an activation, and their exact results.

Where z, which is activated, is next to a kink, the derivative may be either side's: `drawn` has no such z if there is
a residual to move it by, and no dy there otherwise.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import triton_norm
from support.activations import TORCHS, activated, reach
from support.oracle import (
    ErrorBound,
    Formula,
    Inputs,
    Moments,
    Results,
    compute_dtype,
    differentiated,
    moments_about,
    widen,
)
from triton_norm.channels import layout

ACTIVATIONS = (None, *TORCHS)
KINDS = ("flat", "last", "folded")
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
EPS = 1e-5

_GELUS = ("gelu", "gelu_tanh")
FUSED = [(each, residual) for each in ACTIVATIONS if each not in _GELUS for residual in (None, torch.float32)][1:]
"""Activations and a residual's type, None for none. GELU takes the path of silu, and is in fewer tests."""

SHAPES = [
    ("flat", (2, 3, 4, 4)),  # the classic demonstration's
    ("flat", (3, 5, 5, 7)),  # 105 elements a channel: one element an access, and its last byte of bits is not full
    ("flat", (6, 1, 5, 3)),  # one channel
    ("flat", (3, 6, 50)),  # sequences: two elements an access
    ("flat", (1, 4, 6, 6)),  # one sample
    ("flat", (2, 16, 2, 4, 6)),  # volumes
    ("flat", (3, 8, 2, 2, 2, 3)),  # more axes than any module takes
    ("last", (3, 3, 4, 5)),  # fewer channels than a byte has bits
    ("last", (2, 20, 3, 3)),  # the last byte of a position half full
    ("last", (2, 18, 3, 5)),  # an even number of channels
    ("last", (2, 16, 2, 4, 6)),
    ("last", (9, 5)),  # features: no positions
    ("last", (64, 24)),  # features: wide accesses
    ("last", (40, 3, 1, 1)),  # one position
    ("folded", (9, 5, 7, 7)),  # five of a block's eight channels, one sample more than eight
]
SHARED = {
    "multiprocessors": 6,  # two programs a channel
    "min_resident_elements": 1,
    "channels_last_lanes": 16,
    "most_folded_columns": 512,
    "channel_programs_per_sm": 1,
    "min_split_elements": 1,
}
"""Numbers with which a few programs share channels of a few hundred elements."""

SPLIT = {
    "flat": ((3, 2, 8, 10), 64),
    "last": ((4, 20, 3, 5), 256),
    "folded": ((15, 5, 3, 3), 512),
}
"""Shapes by kind, and tiles with which two programs share a channel, each of them with two, the last not full."""


def share(numbers: Callable[..., None], tile: int, one_launch: bool = True, **others: Any) -> None:
    """Sets these numbers, and the tile of either form."""
    form = {"interpreted_tile_elements": tile, "one_launch_bytes": 2**62}
    if not one_launch:
        form = {"interpreted_tile_elements": 4 * tile, "one_launch_bytes": 0}
    numbers(**SHARED | form | others)


def laid(x: Tensor, kind: str) -> Tensor:
    if kind != "last":
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def bits_of(kind: str, shape: tuple[int, ...]) -> int:
    """Returns the bytes of one bit an element: each channel, position or sample begins with a byte."""
    n, c, positions = shape[0], shape[1], math.prod(shape[2:])
    rows, row = {"flat": (c, n * positions), "last": (n * positions, c), "folded": (n, c * positions)}[kind]
    return rows * -(-row // 8)


def running_statistics(n_channels: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(n_channels).to(device, dtype), (torch.rand(n_channels) + 0.5).to(device, dtype)


def same_bits(one: Results, other: Results) -> bool:
    return all(map(torch.equal, one.tensors(), other.tensors()))


@dataclasses.dataclass(frozen=True)
class Call:
    """A call in training where `running` is None, otherwise in evaluation with those statistics."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    dy: Tensor
    running: tuple[Tensor, Tensor] | None = None
    activation: str | None = None
    slope: float = 0.01

    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.x, self.residual, self.weight, self.bias

    def of(self, **others: Any) -> "Call":
        """Returns the call with other tensors or options."""
        return dataclasses.replace(self, **others)

    def ours(self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        mean, var = self.running or (None, None)
        fused = {"residual": residual, "activation": self.activation, "negative_slope": self.slope}
        return triton_norm.batch_norm(x, mean, var, weight, bias, self.running is None, **fused)

    def composed(self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Returns the result of torch's functions, in the type and on the device of x."""
        mean, var = (None, None) if self.running is None else (t.to(x) for t in self.running)
        z = F.batch_norm(x, mean, var, weight, bias, self.running is None, eps=EPS)
        return activated(z if residual is None else z + residual, self.activation, self.slope)

    def run(self, needs_grad: Sequence[int] = range(4)) -> Results:
        """Returns the results, with the gradients of these of x, residual, weight and bias."""
        return differentiated(self.ours, self.inputs(), (self.dy,), needs_grad)

    def bound(self) -> ErrorBound:
        """Returns the exact results and their bounds."""
        axes, shape = (0, *range(2, self.x.dim())), (1, -1, *(1 for _ in self.x.shape[2:]))
        x = widen(self.x)
        if self.running is None:
            moments = moments_about(x.mean(axes, keepdim=True), x, axes)
        else:
            mean, var = (widen(tensor).view(shape) for tensor in self.running)
            moments = Moments(mean, var, mean.abs())
        formula = Formula(
            self.composed,
            axes,
            (1, self.x.shape[1], *shape[2:]),
            moments,
            EPS,
            compute_dtype(self.x),
            constant=self.running is not None,
            centred=self.running is None,
            activation=self.activation,
            slope=self.slope,
        )
        return ErrorBound(formula, Inputs(*self.inputs(), self.dy))

    def check(self, results: Results) -> None:
        """Asserts that all results are within their bounds."""
        self.bound().check(results)

    def against_oracle(self) -> Results:
        """Runs the call, and returns its results if they are within their bounds."""
        results = self.run()
        self.check(results)
        return results

    def away_from_kinks(self) -> "Call":
        """Returns the call with a dy of 0 where the derivative may be either side's."""
        near = self.bound().near_kinks().to(self.dy.device)
        return self.of(dy=self.dy.clone().masked_fill_(near, 0.0))


def drawn(
    shape: tuple[int, ...],
    kind: str,
    device: str,
    dtype: torch.dtype = torch.float32,
    *,
    training: bool = True,
    residual: torch.dtype | None = None,
    activation: str | None = None,
    slope: float = 0.01,
) -> Call:
    """Returns a call of normally distributed tensors.

    Args:
        kind: The layout: one of KINDS.
        residual: The residual's type, None for none.
    """
    x = laid((3 * torch.randn(shape, dtype=torch.float64) + 2).to(device, dtype), kind)
    weight, bias = (torch.randn(shape[1], dtype=torch.float64).to(device, dtype) for _ in range(2))
    weight *= reach(activation)
    added = None if residual is None else laid(torch.randn(shape, dtype=torch.float64).to(device, residual), kind)
    dy = laid(torch.randn(shape, dtype=torch.float64).to(device, dtype), kind)
    running = None if training else running_statistics(shape[1], device, compute_dtype(x))
    assert layout.kind_of(x) == kind
    call = Call(x, added, weight, bias, dy, running, activation, slope)
    if activation is None:
        return call
    if added is not None:
        added[call.bound().near_kinks().to(device)] += 0.25
    return call.away_from_kinks()
