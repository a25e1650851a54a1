"""Calls of batch_norm in every layout, with what may be fused behind it, and the truth about them in fp64.

Bounds are derived as in oracle.py. z is what is activated: an error of z grows by no more than f' in y, and by no more
than f'' in the gradient of z, g = dy · f'(z). Where z is next to 0, f' may be either side's: `drawn` has no such z if
there is a residual to move it by, and no dy there otherwise.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import triton_norm
from support.oracle import assert_within, compute_dtype, widen
from triton_norm.channels import layout
from triton_norm.tuning.limits import INTERPRETED

ACTIVATIONS = (None, "relu", "leaky_relu", "silu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
KINDS = ("flat", "last", "folded")
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
KINK = 1e-3  # z is this far from 0 at least where dy is not 0
STEEPEST = 1.1  # silu's derivative
BENT = 0.5  # its second derivative

FUSED = [(activation, residual) for activation in ACTIVATIONS for residual in (None, torch.float32)][1:]
"""Activations and a residual's type, None for none."""

SHAPES = [
    ("flat", (2, 3, 4, 4)),
    ("flat", (3, 5, 5, 7)),  # 105 elements a channel: its last byte of bits is not full
    ("flat", (6, 1, 5, 3)),  # one channel
    ("last", (3, 3, 4, 5)),  # fewer channels than a byte has bits
    ("last", (2, 20, 3, 3)),  # the last byte of a position half full
    ("last", (9, 5)),  # features
    ("folded", (9, 5, 7, 7)),  # five of a block's eight channels, one sample more than eight
]

SHARED = {
    "multiprocessors": 6,  # two programs a channel
    "min_held_elements": 1,
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


def taking_turns() -> AbstractContextManager[None]:
    """Where programs wait for each other."""
    if not INTERPRETED:
        return contextlib.nullcontext()
    from triton_norm.testing.interleave import interleaved

    return interleaved()


def laid(x: Tensor, kind: str) -> Tensor:
    if kind != "last":
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def running_statistics(n_channels: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(n_channels).to(device, dtype), (torch.rand(n_channels) + 0.5).to(device, dtype)


class Found(NamedTuple):
    """What a call and its backward give; None where there is nothing to ask for."""

    y: Tensor
    dx: Tensor | None
    dresidual: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor is not None]


def same_bits(one: Found, other: Found) -> bool:
    return all(map(torch.equal, one.tensors(), other.tensors()))


@dataclasses.dataclass(frozen=True)
class Call:
    """In training where `running` is None, otherwise in evaluation with those statistics."""

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
        return dataclasses.replace(self, **others)

    def ours(self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        mean, var = self.running or (None, None)
        fused = {"residual": residual, "activation": self.activation, "negative_slope": self.slope}
        return triton_norm.batch_norm(x, mean, var, weight, bias, self.running is None, **fused)

    def composed(self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Of torch's functions, in the type of x."""
        mean, var = (None, None) if self.running is None else (t.to(x) for t in self.running)
        z = F.batch_norm(x, mean, var, weight, bias, self.running is None)
        return self.activated(z if residual is None else z + residual)

    def activated(self, z: Tensor) -> Tensor:
        if self.activation == "relu":
            return F.relu(z)
        if self.activation == "leaky_relu":
            return F.leaky_relu(z, self.slope)
        return F.silu(z) if self.activation == "silu" else z

    def run(self, asked: Sequence[int] = range(4)) -> Found:
        """`asked`: of x, residual, weight and bias, those that need a gradient."""
        return differentiated(self.ours, self.inputs(), self.dy, asked)

    def exact(self) -> Found:
        # Contiguous: torch's own BatchNorm on the CPU has a wrong dx for some strides of x and dy.
        # On the CPU, too: on CUDA it has no backward for a bias without a weight.
        wide = [None if tensor is None else widen(tensor).cpu().contiguous() for tensor in self.inputs()]
        return differentiated(self.composed, wide, self.dy.double().cpu().contiguous())

    def against_oracle(self) -> Found:
        results = self.run()
        self.check(results)
        return results

    def check(self, results: Found) -> None:
        """Holds all of them to fp64."""
        exact, axes = self.exact(), (0, *range(2, self.x.dim()))
        shape = (1, -1, *(1 for _ in self.x.shape[2:]))
        x, dy, residual, weight, bias = (
            torch.zeros(()) if tensor is None else tensor.detach().double().cpu().contiguous()
            for tensor in (self.x, self.dy, self.residual, self.weight, self.bias)
        )
        if self.running is None:
            mean, var = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
        else:
            mean, var = (tensor.double().cpu().view(shape) for tensor in self.running)
        w = torch.ones(()) if self.weight is None else weight.view(shape)
        b = bias if self.bias is None else bias.view(shape)
        rstd = torch.rsqrt(var + 1e-5)
        blur = ((x - mean) * rstd).abs() + mean.abs() * rstd  # the mean is rounded to the type computed in
        z_scale = (blur * w).abs() + b.abs() + residual.abs()
        z = ((x - mean) * rstd * w + b + residual).requires_grad_()
        (slope,) = torch.autograd.grad(self.activated(z).sum(), z)
        g_scale = dy.abs() * (slope.abs() + (1 + BENT * z_scale if self.activation == "silu" else 0))
        terms = (w * g_scale).abs()
        if self.running is None:
            terms = terms + terms.mean(axes, keepdim=True) + blur * (terms * blur).mean(axes, keepdim=True)
        growth = math.log2(self.x.numel() // self.x.shape[1])
        sum_growth = growth + math.sqrt(self.x.numel() // self.x.shape[1])
        scales = (
            (z_scale * max(STEEPEST, abs(self.slope)), growth),
            (terms * rstd, growth),
            (g_scale, growth),
            ((g_scale * blur).sum(axes), sum_growth),
            (g_scale.sum(axes), sum_growth),
        )
        for actual, true, (scale, grown) in zip(results, exact, scales, strict=True):
            if actual is not None and true is not None:
                assert_within(actual, true, scale, grown, compute_dtype(self.x))


def differentiated(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], dy: Tensor, asked: Sequence[int] = range(4)
) -> Found:
    """y and the gradients of function(x, residual, weight, bias) for dy."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_(i in asked) for i, tensor in enumerate(inputs)]
    y = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    grads = iter(torch.autograd.grad(y, wanted, dy))
    return Found(y.detach(), *(next(grads) if leaf is not None and leaf.requires_grad else None for leaf in leaves))


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
    """`residual`: its type, None for none."""
    x = laid((3 * torch.randn(shape, dtype=torch.float64) + 2).to(device, dtype), kind)
    weight, bias = (torch.randn(shape[1], dtype=torch.float64).to(device, dtype) for _ in range(2))
    added = None if residual is None else laid(torch.randn(shape, dtype=torch.float64).to(device, residual), kind)
    dy = laid(torch.randn(shape, dtype=torch.float64).to(device, dtype), kind)
    running = None if training else running_statistics(shape[1], device, compute_dtype(x))
    assert layout.kind_of(x) == kind
    call = Call(x, added, weight, bias, dy, running, activation, slope)
    if added is not None:
        added[near_the_kink(call)] += 0.25
    return call if activation is None else away_from_the_kink(call)


def near_the_kink(call: Call) -> Tensor:
    wide = (None if tensor is None else widen(tensor).contiguous() for tensor in call.inputs())
    return call.of(activation=None).composed(*wide).abs() < KINK


def away_from_the_kink(call: Call) -> Call:
    return call.of(dy=call.dy.clone().masked_fill_(near_the_kink(call), 0.0))
