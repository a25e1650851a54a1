"""Makes a point's tensors, and its call by any contender."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.nn import functional

from perf.ops import BULK, MODULATIONS, PARAMETERS, STATISTICS, TENSORS, Functions
from perf.points import BOTH, STRIDED, Point
from triton_norm import launch
from triton_norm.tuning.configs import Config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
EPS = 1e-5
MOMENTUM = 0.1
NEAR_ZERO = 1 / 16

Forward = Callable[[], Any]


class Inputs(SimpleNamespace):
    """Holds a point's tensors by the names that its op has for them, such as x, weight and dy."""

    def reset(self) -> None:
        """Fills the running statistics, which a call may have moved."""
        for name, tensor in vars(self).items():
            if name in STATISTICS:
                tensor.fill_(TENSORS[name].mean)

    def named(self, names: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, name) for name in names)

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in vars(self).values())

    def double(self) -> Inputs:
        return Inputs(**{name: _double(tensor) for name, tensor in vars(self).items()})


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def _memory_format(point: Point) -> torch.memory_format:
    if point.workload.layout != "channels_last":
        return torch.contiguous_format
    return torch.channels_last if len(point.workload.shape) == 4 else torch.channels_last_3d


def make_inputs(point: Point, device: str, seed: int = 0, blank: bool = False) -> Inputs:
    """Returns random values, or with `blank` memory that nothing has touched, where only the addresses matter.

    Gradients are required only where the backward pass is timed.
    """
    generator = torch.Generator(device).manual_seed(seed)
    workload, op, memory_format = point.workload, point.declared, _memory_format(point)

    def draw(name: str, shape: tuple[int, ...], dtype: str, layout: torch.memory_format) -> torch.Tensor:
        if blank:
            return torch.empty(shape, device=device, dtype=DTYPES[dtype], memory_format=layout)
        values = torch.randn(shape, generator=generator, device=device)
        values.mul_(TENSORS[name].std).add_(TENSORS[name].mean)
        return values.to(DTYPES[dtype], memory_format=layout)

    def tensor(name: str) -> torch.Tensor:
        shape, features = workload.shape, (workload.features,)
        if name in STATISTICS:
            return torch.empty(features, device=device, dtype=DTYPES[point.statistics_dtype])
        if name in PARAMETERS:
            each = features if workload.weights == 1 else (workload.weights, *features)
            return draw(name, each, point.parameter_dtype, torch.contiguous_format)
        if name in MODULATIONS:
            return draw(name, (shape[0], *features), point.dtype, torch.contiguous_format)
        if name == "x" and workload.layout == STRIDED:
            *tokens, heads, columns = shape
            return draw(name, (*tokens, workload.heads, columns), point.dtype, memory_format)[..., :heads, :]
        return draw(name, shape, point.dtype, memory_format)

    inputs = Inputs(**{name: tensor(name) for name in op.inputs})
    if "bits" in op.backward.reads and not blank:
        _keep_from_zero(inputs)
    inputs.reset()
    for leaf in inputs.named(op.leaves):
        leaf.requires_grad_(point.differentiates)
    return inputs


def _keep_from_zero(inputs: Inputs) -> None:
    """Moves the residual where ReLU's argument is so near 0 that rounding decides on the side: there the derivative
    jumps."""
    parameters = inputs.weight.double(), inputs.bias.double()
    z = functional.batch_norm(inputs.x.double(), None, None, *parameters, True, 0.0, EPS).add_(inputs.residual)
    away = torch.full_like(z, 2 * NEAR_ZERO).copysign_(z)
    inputs.residual.add_(away.masked_fill_(z.abs() >= NEAR_ZERO, 0.0))


def bind(point: Point, functions: Functions, inputs: Inputs) -> Forward | None:
    """Returns the forward call of one op on these inputs, or None where the contender has no such op."""
    function, op = functions.get(point.op), point.declared
    if function is None:
        return None
    reads = op.forward.reads
    tensors = inputs.named(tuple(name for name in reads if name in BULK))
    statistics = inputs.named(tuple(name for name in reads if name in STATISTICS))
    parameters = inputs.named(tuple(name for name in reads if name in PARAMETERS))
    modulations = inputs.named(tuple(name for name in reads if name in MODULATIONS))
    features = (point.workload.features,)
    arguments: dict[str, tuple[Any, ...]] = {
        "rows": (features, *parameters, EPS),
        "gated": (features, *parameters, EPS),
        "modulated": (features, *parameters, *modulations, EPS),
        "channels": (*statistics, *parameters, op.training, MOMENTUM, EPS),
        "groups": (point.workload.num_groups, *parameters, EPS),
        "instances": (None, None, *parameters, True, MOMENTUM, EPS),
    }
    positional = *tensors, *arguments[op.family]
    return lambda: function(*positional)


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
    leaves = inputs.named(point.declared.leaves)
    gradients = (inputs.dy, inputs.dtotal) if point.has_total else inputs.dy

    def backward(y: Any) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, leaves, gradients)

    def both(_: Any) -> tuple[Any, tuple[torch.Tensor, ...]]:
        y = forward()
        return y, backward(y)

    return Candidate(name, lambda: None, both) if point.mode == BOTH else Candidate(name, forward, backward)


@contextmanager
def launches_noted() -> Iterator[list[dict[str, Any]]]:
    """Lists the kernel and the config of each launch of this library inside, in order.

    While Triton has a hook, no call starts a compiled kernel directly, past `launch.start`.
    """
    from triton import knobs

    launches: list[dict[str, Any]] = []
    start, hooks = launch.start, knobs.runtime.launch_enter_hook

    def noted(kernel: Any, count: int, arguments: Any, constants: Any, config: Config) -> Any:
        launches.append({"kernel": kernel.__name__, "config": config.keywords})
        return start(kernel, count, arguments, constants, config)

    def hook(_: Any) -> None:
        """Does nothing."""

    hooks.add(hook)
    try:
        with mock.patch.object(launch, "start", noted):
            yield launches
    finally:
        hooks.remove(hook)
