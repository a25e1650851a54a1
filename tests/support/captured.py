"""A norm with a residual and an activation, of this library and composed of torch's layers, for captures of either."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import triton_norm

WIDTH = 4
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
KINDS = (
    "LayerNorm",
    "RMSNorm",
    "BatchNorm1d",
    "BatchNorm1d, cumulative",
    "LayerNorm, fused",
    "RMSNorm, fused",
    "LayerNorm, modulated",
    "RMSNorm, gated",
    "BatchNorm1d, fused",
)
CASES = [(kind, training) for kind in KINDS for training in ((True, False) if "Batch" in kind else (True,))]
"""Kinds and whether the norm is in training, where it asks."""
EVERY_CASE = pytest.mark.parametrize(
    ("kind", "training"), CASES, ids=[f"{kind}{'' if training else ', evaluation'}" for kind, training in CASES]
)
BACKENDS = pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
Batch = tuple[Tensor, Tensor]


def _norm(norms: Any, kind: str) -> nn.Module:
    """Returns the layer of this kind, of torch.nn or of triton_norm; no two channels have the same parameters."""
    name, _, rest = kind.partition(", ")
    norm: nn.Module = getattr(norms, name)(WIDTH, **({"momentum": None} if rest == "cumulative" else {}))
    for place, (key, tensor) in enumerate((*norm.named_parameters(), *norm.named_buffers())):
        if key != "num_batches_tracked":
            tensor.data = torch.linspace(0.5 + 0.1 * place, 1.5, WIDTH)
    return norm


def modulations(x: Tensor, residual: Tensor) -> dict[str, Tensor]:
    """Returns a modulation that all rows share, whose gradients are sums over them."""
    scale, shift = (0.5 * torch.cat((x, residual), 1).mean(0).sin()).chunk(2)
    return {"scale": scale, "shift": shift, "residual_gate": 1 + scale}


class Ours(nn.Module):
    """(x, residual) → a tensor that depends on all that the norm gives."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.norm = kind, _norm(triton_norm, kind)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.kind.endswith("gated"):
            return self.norm(x, gate=residual)
        if self.kind.endswith("modulated"):
            y, total = self.norm(x, residual=residual, **modulations(x, residual))
            return y * total.cos()
        if not self.kind.endswith("fused"):
            return self.norm(x) * residual
        if "Batch" in self.kind:
            return self.norm(x, residual=residual, activation="silu")
        y, total = self.norm(x, residual=residual)
        return y * total.cos() + residual


class Theirs(nn.Module):
    """Computes by torch's layers the results of `Ours`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.norm = kind, _norm(nn, kind)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.kind.endswith("gated"):
            return self.norm(x) * F.silu(residual)
        if self.kind.endswith("modulated"):
            scale, shift, gate = modulations(x, residual).values()
            total = residual + gate * x
            return (self.norm(total) * (1 + scale) + shift) * total.cos()
        if not self.kind.endswith("fused"):
            return self.norm(x) * residual
        if "Batch" in self.kind:
            return F.silu(self.norm(x) + residual)
        total = x + residual
        return self.norm(total) * total.cos() + residual


def pair(kind: str, training: bool) -> tuple[Ours, Theirs]:
    return Ours(kind).train(training), Theirs(kind).train(training)


def batches(*sizes: int) -> list[Batch]:
    return [(torch.randn(n, WIDTH), torch.randn(n, WIDTH)) for n in sizes]


def trained(run: Callable[..., Tensor], state: nn.Module, data: Iterable[Batch]) -> dict[str, Tensor]:
    """Returns outputs and all gradients of a step on each batch, and the buffers after them, by name.

    Args:
        run: the captured program.
        state: the module that holds the parameters and buffers of `run`.
    """
    result = {}
    for step, batch in enumerate(data):
        leaves = [tensor.clone().requires_grad_() for tensor in batch]
        state.zero_grad()
        y = run(*leaves)
        y.sin().sum().backward()
        result[f"y {step}"] = y.detach().clone()
        for name, leaf in (("x", leaves[0]), ("residual", leaves[1]), *state.named_parameters()):
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()  # of a branch not taken
            result[f"gradient of {name} {step}"] = gradient
    return result | {name: buffer.detach().clone() for name, buffer in state.named_buffers()}


def assert_as_torchs(
    kind: str, training: bool, capture: Callable[[nn.Module, Batch], nn.Module], sizes: tuple[int, ...] = (6, 6)
) -> None:
    """Checks that the program that `capture` makes of a norm trains as torch's layers do in eager mode.

    In evaluation a tool may leave the counter out.
    """
    ours, theirs = pair(kind, training)
    example, *data = batches(6, *sizes)
    run = capture(ours, example)
    actual, expected = trained(run, run, data), trained(theirs, theirs, data)
    counter = "norm.num_batches_tracked"
    if not training and counter not in actual:
        expected.pop(counter, None)
    torch.testing.assert_close(actual, expected, **TOLERANCE)


class Compiled(nn.Module):
    """A compiled module around a norm, of which it has the parameters and buffers."""

    def __init__(self, module: nn.Module, run: Callable[..., Tensor] | None = None, **options: Any) -> None:
        super().__init__()
        self.norm = module.norm
        options = {"backend": "aot_eager", "fullgraph": True, **options}
        self.run: Callable[..., Tensor] = torch.compile(module if run is None else run, **options)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(*inputs)


class Traced(nn.Module):
    """Wraps the graph that make_fx records of a module, with parameters and buffers of its own."""

    def __init__(self, module: nn.Module, example: Batch, **options: Any) -> None:
        super().__init__()
        self.norm = copy.deepcopy(module.norm)
        arguments = copy.deepcopy(module)

        def function(state: dict[str, Tensor], *inputs: Tensor) -> Tensor:
            return torch.func.functional_call(arguments, state, inputs)

        self.graph = make_fx(function, **options)(self._state(arguments), *example)

    @staticmethod
    def _state(module: nn.Module) -> dict[str, Tensor]:
        return {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.graph(self._state(self), *inputs)
