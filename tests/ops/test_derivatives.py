"""Operators called directly, as a graph that was recorded calls them: their first and second derivatives, in float64,
are those of `triton_norm.reference`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_norm
from support import operator_calls
from support.activations import MASKED
from triton_norm import reference
from triton_norm.channels.layout import empty_bits
from triton_norm.library import DEFINED
from triton_norm.rows import fusible
from triton_norm.specs import BatchNormSpec, BatchNormTensors, GroupNormSpec, Inputs, RowSpec

EXACT = {"rtol": 1e-9, "atol": 1e-9}
Function = Callable[..., Sequence[Tensor]]


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def assert_same_derivatives(ours: Function, theirs: Function, leaves: list[Tensor]) -> None:
    """Compares derivatives of the first order without more to come, as in training, and of both orders."""
    actual, expected = ours(*leaves), theirs(*leaves)
    torch.testing.assert_close(actual, expected, **EXACT)
    dys = [torch.randn_like(y).requires_grad_() for y in expected]
    unused = {"allow_unused": True, "materialize_grads": True}
    first = [torch.autograd.grad(y, leaves, dys, retain_graph=True, **unused) for y in (actual, expected)]
    torch.testing.assert_close(*first, **EXACT)
    again = [torch.autograd.grad(y, leaves, dys, create_graph=True, **unused) for y in (actual, expected)]
    torch.testing.assert_close(*again, **EXACT)
    along = [torch.randn_like(gradient) for gradient in again[0]]
    second = [
        torch.autograd.grad(
            [gradient for gradient in gradients if gradient.requires_grad],
            [*leaves, *dys],
            [v for v, gradient in zip(along, gradients, strict=True) if gradient.requires_grad],
            **unused,
        )
        for gradients in again
    ]
    torch.testing.assert_close(*second, **EXACT)


ROWS = [
    pytest.param(
        name, saves, residual, weight_offset, centred, id=f"{name}-{label}{'' if saves else ', saves nothing'}"
    )
    for name in ("rows_forward", fusible.NAME)
    for saves in (True, False)
    for label, residual, weight_offset, centred in (
        ("LayerNorm", False, 0.0, True),
        ("LayerNorm, residual", True, 1.0, True),
        ("RMSNorm", False, 1.0, False),
        ("RMSNorm, residual", True, 0.0, False),
    )
]


def normalized(x: Tensor, weight: Tensor, bias: Tensor | None, weight_offset: float, centred: bool) -> Tensor:
    return reference.normalize(x, (5,), weight, bias, RowSpec(5, 1e-5, weight_offset, centred))


@pytest.mark.parametrize(("name", "saves", "residual", "weight_offset", "centred"), ROWS)
def test_rows_forward(name, saves, residual, weight_offset, centred):
    leaves = [rand(4, 5), rand(5)] + ([rand(5)] if centred else []) + ([rand(4, 5)] if residual else [])
    options = 5, 1e-5, weight_offset, centred, None, None, None

    def split(x: Tensor, weight: Tensor, *others: Tensor) -> tuple[Any, ...]:
        bias = others[0] if centred else None
        return x, others[-1] if residual else None, weight, bias

    def ours(*tensors: Tensor) -> Sequence[Tensor]:
        return DEFINED[name](*split(*tensors), saves, *options)[: 2 if residual else 1]

    def theirs(*tensors: Tensor) -> Sequence[Tensor]:
        x, added, weight, bias = split(*tensors)
        total = x if added is None else x + added
        y = normalized(total, weight, bias, weight_offset, centred)
        return [y] if added is None else [y, total]

    assert_same_derivatives(ours, theirs, leaves)


@pytest.mark.parametrize("with_total", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("centred", [True, False], ids=["LayerNorm", "RMSNorm"])
def test_rows_backward(centred, with_total):
    x, weight, dy, dtotal = rand(4, 5), rand(5), rand(4, 5), rand(4, 5) if with_total else None
    bias = rand(5) if centred else None
    options = 5, 1e-5, 1.0, centred, None, None, None
    stored = DEFINED["rows_forward"](x.detach(), None, weight.detach(), None, True, *options)[2]
    types = torch.float64, None, torch.float64, torch.float64 if centred else None

    def ours(x: Tensor, weight: Tensor, dy: Tensor, *others: Tensor) -> Sequence[Tensor]:
        actual = DEFINED["rows_backward"](dy, others[0] if others else None, x, weight, stored, None, *types, *options)
        return [gradient for gradient, dtype in zip(actual, types, strict=True) if dtype is not None]

    def theirs(x: Tensor, weight: Tensor, dy: Tensor, *others: Tensor) -> Sequence[Tensor]:
        parameters = [weight] if bias is None else [weight, bias]
        y = normalized(x, weight, bias, 1.0, centred)
        dx, *rest = torch.autograd.grad(y, [x, *parameters], dy, create_graph=True)
        return [dx + others[0] if others else dx, *rest]

    assert_same_derivatives(ours, theirs, [x, weight, dy] + ([] if dtotal is None else [dtotal]))


SHAPE = (6, 4, 3)
ACTIVATIONS = [
    (None, False),
    (None, True),
    ("silu", False),
    ("silu", True),
    ("relu", False),
    ("relu", True),
    ("leaky_relu", True),
    ("relu6", True),
    ("hardswish", False),
    ("gelu", True),
    ("gelu_tanh", False),
]
ACTIVATED = pytest.mark.parametrize(("activation", "residual"), ACTIVATIONS)
RUNNING = torch.linspace(-0.5, 0.5, 4, dtype=torch.float64), torch.linspace(0.5, 2, 4, dtype=torch.float64)
SLOPE = 0.2
DOUBLE = torch.float64


class BatchNorm:
    """The operators of batch_norm in one mode, and the same by `reference`."""

    def __init__(self, training: bool, activation: str | None, residual: bool) -> None:
        self.training, self.activation, self.residual = training, activation, residual
        self.kind = "flat" if residual and activation in MASKED else None  # of bits, which a call records
        self.options = 1e-5, activation, SLOPE

    def reference(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        tensors = BatchNormTensors(x, residual, weight, bias, *RUNNING)
        return reference.batch_norm(tensors, BatchNormSpec(self.training, 0.0, 1e-5, self.activation, SLOPE))

    def forward(self, *tensors: Tensor | None, saves: bool) -> Sequence[Tensor]:
        """Returns y, statistics and bits of x, residual, weight and bias."""
        if self.training:
            y, statistics, _, bits = DEFINED["batch_norm_forward"](*tensors, self.kind, saves, *self.options)
            return y, statistics, bits
        y, bits = DEFINED["batch_norm_inference"](*tensors, *RUNNING, self.kind, *self.options)
        return y, None, bits

    def backward(self, dy: Tensor, x: Tensor, again: list[Tensor | None], saved: Any, types: Any) -> Sequence[Tensor]:
        residual, weight, bias = again
        _, statistics, bits = saved
        if self.kind is not None:
            assert bits.shape == empty_bits(x, self.kind).shape
            residual = bias = None
        read = residual, None if self.kind is None else bits, weight, bias, statistics
        running = (None, None) if self.training else RUNNING
        return DEFINED["batch_norm_backward"](dy, x, *read, *running, *types, self.kind, *self.options)


class GroupNorm:
    """The operators of group_norm, and the same by `reference`."""

    def __init__(self, n_groups: int, activation: str | None, residual: bool) -> None:
        self.activation, self.residual = activation, residual
        self.options = n_groups, 1e-5, activation, SLOPE, None
        self.spec = GroupNormSpec(n_groups, 1e-5, activation, SLOPE)

    def reference(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return reference.group_norm(Inputs(x, residual, weight, bias), self.spec)

    def forward(self, *tensors: Tensor | None, saves: bool) -> Sequence[Tensor]:
        return DEFINED["group_norm_forward"](*tensors, False, *self.options)

    def backward(self, dy: Tensor, x: Tensor, again: list[Tensor | None], saved: Any, types: Any) -> Sequence[Tensor]:
        return DEFINED["group_norm_backward"](dy, x, *again, saved[1], *types, *self.options)


MODES = pytest.mark.parametrize(
    "make",
    [
        pytest.param(partial(BatchNorm, True), id="BatchNorm, training"),
        pytest.param(partial(BatchNorm, False), id="BatchNorm, evaluation"),
        pytest.param(partial(GroupNorm, 2), id="GroupNorm"),
        pytest.param(partial(GroupNorm, 4), id="InstanceNorm"),
    ],
)


@MODES
@ACTIVATED
def test_channels_forward(make, activation, residual):
    op = make(activation, residual)
    leaves = [rand(*SHAPE), rand(4), rand(4)] + ([rand(*SHAPE)] if residual else [])

    def ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Sequence[Tensor]:
        return op.forward(x, residual, weight, bias, saves=True)[:1]

    assert_same_derivatives(ours, lambda *tensors: [op.reference(*tensors)], leaves)


@MODES
@ACTIVATED
def test_channels_backward(make, activation, residual):
    op = make(activation, residual)
    leaves = [rand(*SHAPE), rand(4), rand(4), rand(*SHAPE)] + ([rand(*SHAPE)] if residual else [])
    x, weight, bias, _, *added = (leaf.detach() for leaf in leaves)
    saved = op.forward(x, added[0] if added else None, weight, bias, saves=False)
    through = residual and activation is not None
    types = DOUBLE, DOUBLE if through else None, DOUBLE, DOUBLE

    def ours(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, *added: Tensor) -> Sequence[Tensor]:
        again = [added[0] if added else None, weight, bias] if activation is not None else [None, weight, None]
        gradients = op.backward(dy, x, again, saved, types)
        return [gradient for gradient, dtype in zip(gradients, types, strict=True) if dtype is not None]

    def theirs(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, *added: Tensor) -> Sequence[Tensor]:
        y = op.reference(x, weight, bias, *added)
        dx, dweight, dbias, *rest = torch.autograd.grad(y, [x, weight, bias, *added], dy, create_graph=True)
        return [dx, *rest, dweight, dbias] if through else [dx, dweight, dbias]

    assert_same_derivatives(ours, theirs, leaves)


@pytest.mark.parametrize("place", [0, 1])
def test_no_gradient_for_running_statistics(place):
    x, running = torch.randn(SHAPE), [tensor.float() for tensor in RUNNING]
    running[place].requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable with respect to running_mean"):
        DEFINED["batch_norm_inference"](x, None, None, None, *running, None, 1e-5, None, 0.0)
    moments = torch.rand(1, 13)
    with pytest.raises(RuntimeError, match="requires grad"):
        DEFINED["move_running_statistics"](moments, running, [], 0.1, 1e-5, True)


def calls() -> dict[str, tuple[Any, Sequence[Any]]]:
    """A call of every operator but the sum over processes, by name."""
    rows_and_channels = operator_calls.of_rows_and_channels("cpu")
    synchronized = operator_calls.synchronized("cpu")
    ops = torch.ops.triton_norm
    result = {name: (operator.default, inputs) for name, (operator, inputs) in rows_and_channels.items()}
    for name, inputs in synchronized.items():
        result[f"sync_batch_norm_{name}"] = getattr(ops, f"sync_batch_norm_{name.partition(',')[0]}").default, inputs
    result[fusible.NAME] = DEFINED[fusible.NAME], result["rows_forward, training"][1]
    return result


UNDIFFERENTIATED = {"move_running_statistics", "sync_batch_norm_moments"}
"""Their outputs depend on x in a way that the derivative of a later operator accounts for."""


def test_every_operator_is_called_here():
    called = {operator._schema.name.partition("::")[2] for operator, _ in calls().values()}
    assert set(DEFINED) - called == {"sync_batch_norm_total"}
    for operator in DEFINED.values():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "Autograd")


@pytest.mark.parametrize("name", calls())
def test_no_output_only_warns_of_its_derivative(name):
    operator, inputs = calls()[name]
    arguments = [
        argument.clone().requires_grad_()
        if isinstance(argument, Tensor) and argument.is_floating_point() and not kind.name.startswith("running_")
        else argument
        for argument, kind in zip(inputs, operator._schema.arguments, strict=True)
    ]
    result = operator(*arguments)
    outputs = [result] if isinstance(result, Tensor) else result
    differentiable = [output for output in outputs if output.requires_grad]
    assert all("NotImplemented" not in type(output.grad_fn).__name__ for output in differentiable)
    kind = operator._schema.name.partition("::")[2]
    assert bool(differentiable) != (kind in UNDIFFERENTIATED)
    if kind in {operator._schema.name.partition("::")[2] for operator in triton_norm.OPERATORS} - UNDIFFERENTIATED:
        has_total = "rows" in kind and inputs[1] is not None  # statistics and bits are for the backward alone
        assert [output.requires_grad for output in outputs] == [True, has_total, *(False for _ in outputs[2:])]
