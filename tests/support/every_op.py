"""Every op and mode as a function of four tensors, for tests that all of them have to pass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import triton_norm
from support.activations import activated
from support.channel_norms import laid

N_GROUPS = 3


def _of_channels(function: Callable[..., Any], op: "Op", x: Tensor, *parameters: Tensor | None, **options: Any) -> Any:
    if op.function == "group_norm":
        return function(x, N_GROUPS, *parameters, **options)
    if op.function == "instance_norm":
        return function(x, None, None, *parameters, **options)
    return function(x, *op.running(x), *parameters, op.training, **options)


def _rows(function: Callable[..., Any], x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Any:
    parameters = (weight,) if bias is None else (weight, bias)
    return function(x, (x.shape[-1],), *parameters, **options)


@dataclass(frozen=True)
class Op:
    """`ours` and `theirs`, composed of torch's functions, take (x, residual, weight, bias); RMSNorm leaves the bias
    out, and who has no residual is given None."""

    name: str
    shape: tuple[int, ...]
    kind: str
    function: str
    training: bool = True
    residual: bool = False
    activation: str | None = None

    @property
    def is_rows(self) -> bool:
        return self.function in ("layer_norm", "rms_norm")

    @property
    def has_silu(self) -> bool:
        return self.activation == "silu"

    def __str__(self) -> str:
        mode = "" if self.function != "batch_norm" else " training" if self.training else " evaluation"
        parts = (self.name + mode, self.kind, "residual" if self.residual else "", self.activation or "")
        return "-".join(part for part in parts if part)

    def drawn(self, device: str, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
        """x, residual, weight and bias, away from where an activation has a kink."""
        x = laid(torch.randn(self.shape, dtype=torch.float64), self.kind)
        residual = laid(torch.randn(self.shape, dtype=torch.float64), self.kind) if self.residual else None
        n = self.shape[-1] if self.is_rows else self.shape[1]
        tensors = [x, residual, torch.rand(n, dtype=torch.float64) + 0.5, torch.randn(n, dtype=torch.float64)]
        if self.function == "rms_norm":
            tensors[3] = None
        return [None if tensor is None else tensor.to(device, dtype).requires_grad_() for tensor in tensors]

    def running(self, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.training:
            return None, None
        n = like.shape[1]
        return (torch.linspace(lo, 1, n, dtype=like.dtype, device=like.device) for lo in (-1, 0.5))

    def ours(self, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        function = getattr(triton_norm, self.function)
        if self.is_rows:
            result = _rows(function, x, weight, bias, residual=residual)
        else:
            options = {"residual": residual, "activation": self.activation}
            result = _of_channels(function, self, x, weight, bias, **options)
        return result if isinstance(result, tuple) else (result,)

    def theirs(self, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        function = getattr(F, self.function)
        if self.is_rows:
            total = x if residual is None else x + residual
            y = _rows(function, total, weight, bias)
            return (y,) if residual is None else (y, total)
        z = _of_channels(function, self, x, weight, bias)
        return (activated(z if residual is None else z + residual, self.activation),)


@dataclass(frozen=True)
class ModulatedOp(Op):
    """A call with a gate or a modulation: `drawn` returns gate, scale, shift and residual_gate too, and `ours` and
    `theirs` take them.

    Args:
        modulations: those of gate, scale, shift and residual_gate that there are.
        lengths: of the modulations' axes before the last.
    """

    modulations: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    gate_first: bool = False

    @property
    def has_silu(self) -> bool:
        return "gate" in self.modulations

    def __str__(self) -> str:
        order = "gate first" if self.gate_first else ""
        return "-".join(part for part in (super().__str__(), *self.modulations, order) if part)

    def drawn(self, device: str, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
        result = super().drawn(device, dtype)
        for name in MODULATIONS:
            shape = self.shape if name == "gate" else (*self.lengths, self.shape[-1])
            own = torch.randn(shape, dtype=dtype, device=device).requires_grad_()
            result.append(own if name in self.modulations else None)
        return result

    def ours(self, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, *own: Any) -> Any:
        named = dict(zip(MODULATIONS, own, strict=True)) | {"gate_first": self.gate_first}
        result = _rows(getattr(triton_norm, self.function), x, weight, bias, residual=residual, **named)
        return result if isinstance(result, tuple) else (result,)

    def theirs(self, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, *own: Any) -> Any:
        gate, *others = own
        missing = (1,) * (x.dim() - len(self.lengths) - 1)
        scale, shift, residual_gate = (
            None if tensor is None else tensor.view(*self.lengths, *missing, -1) for tensor in others
        )
        total = x if residual_gate is None else residual_gate * x
        total = total if residual is None else residual + total
        y = _rows(getattr(F, self.function), total * F.silu(gate) if self.gate_first else total, weight, bias)
        y = y if scale is None else y * (1 + scale)
        y = y if shift is None else y + shift
        y = y if gate is None or self.gate_first else y * F.silu(gate)
        return (y,) if residual is None else (y, total)


MODULATIONS = ("gate", "scale", "shift", "residual_gate")
ROWS = [
    Op(name, (6, 8), "flat", name, residual=residual)
    for name in ("layer_norm", "rms_norm")
    for residual in (False, True)
]
MODULATED = [
    ModulatedOp("gated", (6, 8), "flat", "rms_norm", modulations=("gate",)),
    ModulatedOp("gated", (2, 3, 8), "flat", "rms_norm", modulations=("gate",), gate_first=True),
    ModulatedOp("modulated", (2, 3, 8), "flat", "layer_norm", modulations=("scale", "shift"), lengths=(2,)),
    ModulatedOp("modulated", (2, 3, 8), "flat", "layer_norm", residual=True, modulations=MODULATIONS, lengths=(2, 1)),
    ModulatedOp("expanded", (2, 2, 3, 8), "flat", "layer_norm", modulations=("scale", "shift"), lengths=(2, 1, 3)),
]
CHANNELS = [
    Op("batch_norm", shape, kind, "batch_norm", training, residual, activation)
    for training in (True, False)
    for kind, shape, residual, activation in (
        ("last", (3, 16, 4, 5), True, "relu"),
        ("last", (3, 3, 4, 5), True, "leaky_relu"),
        ("last", (3, 16, 4, 5), False, None),
        ("flat", (2, 3, 6, 4), True, "relu"),
        ("flat", (2, 3, 6, 4), False, "relu"),
        ("flat", (2, 3, 6, 4), True, "silu"),
        ("folded", (9, 5, 7, 7), True, "leaky_relu"),
        ("folded", (9, 5, 7, 7), True, None),
    )
]
GROUPS = [
    Op(name, shape, kind, name, residual=residual, activation=activation)
    for name in ("group_norm", "instance_norm")
    for kind, shape, residual, activation in (
        ("last", (3, 12, 4, 5), True, "relu"),
        ("last", (3, 6, 4, 5), False, None),
        ("flat", (2, 6, 6, 4), True, "leaky_relu"),
        ("flat", (2, 6, 6, 4), False, "silu"),
        ("flat", (2, 6, 6, 4), True, None),
    )
]
EVERY_OP = [*ROWS, *MODULATED, *CHANNELS, *GROUPS]
EACH_FUNCTION = list({(op.function, op.training): op for op in (*ROWS, *CHANNELS, *GROUPS) if op.residual}.values())
OPS = pytest.mark.parametrize("op", EVERY_OP, ids=str)
PATHS = pytest.mark.parametrize("path", ["triton", "torch"])
