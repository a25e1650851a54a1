"""Makes a point's tensors, and its call by any contender."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn import functional

from perf.contenders import Functions
from perf.points import BOTH, NUM_GROUPS, Point

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
EPS = 1e-5
MOMENTUM = 0.1
NEAR_ZERO = 1 / 16

Forward = Callable[[], Any]


@dataclass
class Inputs:
    """A point's tensors. Gradients are required only where the backward pass is timed."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    dy: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor
    residual: torch.Tensor | None = None
    dtotal: torch.Tensor | None = None

    def reset(self) -> None:
        self.running_mean.fill_(0.25)
        self.running_var.fill_(1.5)

    def leaves(self, point: Point) -> tuple[torch.Tensor, ...]:
        """Returns the leaf that each of the point's gradients belongs to."""
        by_gradient = {"dx": self.x, "dresidual": self.residual, "dweight": self.weight, "dbias": self.bias}
        found = (by_gradient[name] for name in point.gradients)
        return tuple(leaf for leaf in found if leaf is not None)

    @property
    def bytes(self) -> int:
        tensors = (getattr(self, field.name) for field in fields(self))
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def double(self) -> Inputs:
        return Inputs(*(_double(getattr(self, field.name)) for field in fields(self)))


def _double(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)


def make_inputs(point: Point, device: str, seed: int = 0, blank: bool = False) -> Inputs:
    """Returns random values, or with `blank` memory that nothing has touched, where only the addresses matter."""
    generator = torch.Generator(device).manual_seed(seed)
    workload = point.workload
    memory_format = torch.contiguous_format
    if workload.layout == "channels_last":
        memory_format = torch.channels_last if len(workload.shape) == 4 else torch.channels_last_3d

    def draw(shape: tuple[int, ...], dtype: str, mean: float, std: float) -> torch.Tensor:
        as_told = memory_format if len(shape) > 1 else torch.contiguous_format
        if blank:
            return torch.empty(shape, device=device, dtype=DTYPES[dtype], memory_format=as_told)
        values = torch.randn(shape, generator=generator, device=device).mul_(std).add_(mean)
        return values.to(DTYPES[dtype], memory_format=as_told)

    features = (workload.features,)
    x = draw(workload.shape, point.dtype, 0.5, 2.0)
    dy = draw(workload.shape, point.dtype, 0.0, 1.0)
    weight = draw(features, point.parameter_dtype, 1.0, 0.25)
    bias = draw(features, point.parameter_dtype, 0.0, 0.25)
    running = torch.empty(features, device=device, dtype=torch.float64 if point.dtype == "fp64" else torch.float32)
    inputs = Inputs(x, weight, bias, dy, running, running.clone())
    if point.has_residual:
        inputs.residual = draw(workload.shape, point.dtype, -0.25, 1.0)
        if point.has_total:
            inputs.dtotal = draw(workload.shape, point.dtype, 0.0, 1.0)
        elif not blank:
            _keep_from_zero(inputs, inputs.residual)
    inputs.reset()
    for leaf in inputs.leaves(point):
        leaf.requires_grad_(point.differentiates)
    return inputs


def _keep_from_zero(inputs: Inputs, residual: torch.Tensor) -> None:
    """Moves it where ReLU's argument is so near 0 that rounding decides on the side: there the derivative jumps."""
    parameters = inputs.weight.double(), inputs.bias.double()
    z = functional.batch_norm(inputs.x.double(), None, None, *parameters, True, 0.0, EPS).add_(residual)
    away = torch.full_like(z, 2 * NEAR_ZERO).copysign_(z)
    residual.add_(away.masked_fill_(z.abs() >= NEAR_ZERO, 0.0))


def bind(point: Point, functions: Functions, inputs: Inputs) -> Forward | None:
    """Returns the forward call of one op on these inputs, or None where the contender has no such op."""
    i, function = inputs, getattr(functions, point.op.removesuffix("_eval"))
    if function is None:
        return None
    tensors = (i.x, i.residual) if point.has_residual else (i.x,)
    if point.workload.family == "channels":
        statistics, training = (i.running_mean, i.running_var), point.training
        return lambda: function(*tensors, *statistics, i.weight, i.bias, training, MOMENTUM, EPS)
    if point.workload.family == "groups":
        return lambda: function(*tensors, NUM_GROUPS, i.weight, i.bias, EPS)
    if point.workload.family == "instances":
        return lambda: function(*tensors, None, None, i.weight, i.bias, True, MOMENTUM, EPS)
    parameters = (i.weight, i.bias) if point.has_bias else (i.weight,)
    shape = (point.workload.features,)
    return lambda: function(*tensors, shape, *parameters, EPS)


@dataclass(frozen=True)
class Candidate:
    """`run(prepare())` is one call; only `run` is timed."""

    name: str
    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


def candidate(name: str, point: Point, forward: Forward, inputs: Inputs) -> Candidate:
    """Returns a call to be timed. A backward pass comes after a fresh, untimed forward pass: no graph is kept."""
    if point.mode == "forward":
        return Candidate(name, lambda: None, lambda _: forward())
    leaves = inputs.leaves(point)
    gradients = (inputs.dy, inputs.dtotal) if point.has_total else inputs.dy

    def backward(y: Any) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, leaves, gradients)

    def both(_: Any) -> tuple[Any, tuple[torch.Tensor, ...]]:
        y = forward()
        return y, backward(y)

    return Candidate(name, lambda: None, both) if point.mode == BOTH else Candidate(name, forward, backward)
