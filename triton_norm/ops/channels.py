"""BatchNorm: `torch.library` operators with their fakes, autograd."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import reference
from triton_norm.activations import gradient_by_side
from triton_norm.ops import channel_launches as launches
from triton_norm.ops.channel_launches import Gradients
from triton_norm.ops.channel_plans import Options, saves_bits
from triton_norm.ops.layout import dense_like, empty_bits, kind_of, side_of_zero
from triton_norm.ops.library import Wanted, is_intercepted, tuple_operator
from triton_norm.ops.saved import Kept, bias_like, needs_torch, restored, savable, save, shaped


class Saved(NamedTuple):
    """The tensors that the backward takes.

    Bits stand for the residual. Without them the side that the activation was taken on is computed again, which is the
    only use of the bias. The statistics are the batch's; without them the running ones were used.
    """

    x: Tensor
    residual: Tensor | None
    bits: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    statistics: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Sequence[Tensor],
    counter: Sequence[Tensor],
    bits_kind: str | None,
    momentum: float | None,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    options = Options(True, momentum, eps, activation, slope)
    mean, var = running or (None, None)
    (num_batches_tracked,) = counter or (None,)
    return launches.forward(x, residual, weight, bias, mean, var, num_batches_tracked, options, bits_kind)


def _inference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bits_kind: str | None,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor | None]:
    options = Options(False, 0.0, eps, activation, slope)
    y, _, bits = launches.forward(x, residual, weight, bias, running_mean, running_var, None, options, bits_kind)
    return y, bits


def _backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    dx: torch.dtype | None,
    dresidual: torch.dtype | None,
    dweight: torch.dtype | None,
    dbias: torch.dtype | None,
    bits_kind: str | None,
    eps: float,
    activation: str | None,
    slope: float,
) -> Gradients:
    options = Options(statistics is not None, 0.0, eps, activation, slope)
    given = dy, x, residual, bits, weight, bias, statistics, running_mean, running_var
    return launches.backward(*given, options, Wanted(dx, dresidual, dweight, dbias), bits_kind)


def bits_like(x: Tensor, bits_kind: str | None) -> Tensor | None:
    return None if bits_kind is None else empty_bits(x, bits_kind)


def _fake_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Sequence[Tensor],
    counter: Sequence[Tensor],
    bits_kind: str | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    statistics = x.new_empty(3, x.shape[1], dtype=reference.compute_dtype(x))
    return dense_like(x, kind=bits_kind), statistics, bits_like(x, bits_kind)


def _fake_inference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bits_kind: str | None,
    *_: Any,
) -> tuple[Tensor, Tensor | None]:
    return dense_like(x, kind=bits_kind), bits_like(x, bits_kind)


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    dx: torch.dtype | None,
    dresidual: torch.dtype | None,
    dweight: torch.dtype | None,
    dbias: torch.dtype | None,
    bits_kind: str | None,
    *_: Any,
) -> Gradients:
    return launches.gradients(x, Wanted(dx, dresidual, dweight, dbias), bits_kind)


# What is moved comes in lists, which may be empty: a mode that follows writes takes no None for a written tensor.
forward_op = tuple_operator(
    "batch_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)[] running, "
    "Tensor(b!)[] counter, str? bits_kind, float? momentum, float eps, str? activation, float slope) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
inference_op = tuple_operator(
    "batch_norm_inference(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor running_mean, "
    "Tensor running_var, str? bits_kind, float eps, str? activation, float slope) -> (Tensor, Tensor)",
    _inference,
    _fake_inference,
)
backward_op = tuple_operator(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? residual, Tensor? bits, Tensor? weight, Tensor? bias, "
    "Tensor? statistics, Tensor? running_mean, Tensor? running_var, ScalarType? dx_dtype, ScalarType? dresidual_dtype, "
    "ScalarType? dweight_dtype, ScalarType? dbias_dtype, str? bits_kind, float eps, str? activation, float slope) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def counts(x: Tensor, num_batches_tracked: Tensor) -> bool:
    """Returns whether the kernels can count: integers that do not wrap soon, on x's device."""
    return num_batches_tracked.device == x.device and num_batches_tracked.dtype in (torch.int64, torch.int32)


def _normalize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    options: Options,
    bits_kind: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns y and what a backward takes beside the inputs: the batch's statistics, and bits laid as `bits_kind`."""
    if num_batches_tracked is not None and not counts(x, num_batches_tracked):
        if options.momentum is None:  # to read the counter waits for the GPU
            options = options._replace(momentum=1.0 / float(num_batches_tracked + 1), prepared=None)
        found = _normalize(x, residual, weight, bias, running_mean, running_var, None, options, bits_kind)
        num_batches_tracked.add_(1)  # before a saved tensor's hook can end the call
        return found
    given = x, residual, weight, bias
    running = [tensor for tensor in (running_mean, running_var) if tensor is not None]
    counter = [] if num_batches_tracked is None else [num_batches_tracked]
    if options.prepared is not None:
        if options.batch:
            if num_batches_tracked is not None and num_batches_tracked.is_inference():
                reference.check_writable(num_batches_tracked)  # torch moves such statistics anywhere
            torch.autograd.graph.increment_version(running + counter)
        return launches.forward(*given, running_mean, running_var, num_batches_tracked, options, bits_kind)
    asked = options.eps, options.activation, options.slope
    if not options.batch:
        y, bits = inference_op(*given, running_mean, running_var, bits_kind, *asked)
        return y, None, bits
    y, statistics, bits = forward_op(*given, running, counter, bits_kind, options.momentum, *asked)
    return y, statistics, bits


class BatchNormFunction(torch.autograd.Function):
    """First order through the kernels; `needs_torch` says which backwards go through `reference` instead."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        options: Options,
    ) -> Tensor:
        bits_kind = kind_of(x) if saves_bits(residual, options) else None
        running = running_mean, running_var
        y, statistics, bits = _normalize(x, residual, weight, bias, *running, num_batches_tracked, options, bits_kind)
        if options.batch:
            running = None, None
        recomputes = options.activation is not None and bits is None
        added, shifted = (residual, bias) if recomputes else (None, None)
        saved = Saved(x, added, bits, weight, shifted, statistics, *running)
        save(ctx, saved, (x, residual, weight, bias), options.prepared, bits_kind)
        ctx.options, ctx.bits_kind = options, bits_kind
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = restored(ctx, Saved)
        unasked = (None,) * 4
        options: Options = ctx.options
        kept: Kept = ctx.kept
        intercepted = options.prepared is None or is_intercepted()
        if needs_torch((dy,), saved, intercepted):
            return *_composed_gradients(ctx, dy, saved), *unasked
        x_wanted, residual_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad[:4]
        activated = options.activation is not None
        wanted = Wanted(
            kept.dx if x_wanted else None,
            kept.dresidual if residual_wanted and activated else None,
            kept.weight[0] if weight_wanted and kept.weight else None,
            kept.bias[0] if bias_wanted and kept.bias else None,
        )
        if intercepted:
            asked = ctx.bits_kind, options.eps, options.activation, options.slope
            dx, dresidual, dweight, dbias = backward_op(dy, *saved, *wanted, *asked)
        else:
            dx, dresidual, dweight, dbias = launches.backward(dy, *saved, options, wanted, ctx.bits_kind)
        if residual_wanted and not activated:
            dresidual = dy.to(kept.dresidual)
        return dx, dresidual, shaped(dweight, kept.weight), shaped(dbias, kept.bias), *unasked


# torch.autograd.Function.apply without its look for torch.func's transforms, which `dispatch` has done.
_apply: Any = super(torch.autograd.Function, BatchNormFunction).apply


def composed_gradients(ctx: Any, dy: Tensor, saved: Any, function: Callable[..., Tensor]) -> list[Tensor | None]:
    """Returns the gradients of x, residual, weight and bias, composed of torch's own functions.

    Args:
        ctx: has `options`, `bits_kind` and `kept`.
        saved: a `Saved`, or another NamedTuple that has its x, residual, bits, weight and bias.
        function: (x, residual, weight, bias, activation) → y.
    """
    options: Options = ctx.options
    x_wanted, residual_wanted, *parameters_wanted = ctx.needs_input_grad[:4]
    activation, bias = options.activation, saved.bias
    if bias is None:
        bias = bias_like(saved.x, ctx.kept)
    if saved.bits is not None:
        dy = gradient_by_side(dy, side_of_zero(saved.bits, saved.x, ctx.bits_kind), activation, options.slope)
        activation = None
    apart = residual_wanted and saved.residual is None
    found = reference.gradients(
        lambda *inputs: function(*inputs, activation),
        (saved.x, saved.residual, saved.weight, bias),
        dy,
        (x_wanted, residual_wanted and not apart, *parameters_wanted),
    )
    if apart:
        found[1] = dy.to(ctx.kept.dresidual)
    return found


def _composed_gradients(ctx: Any, dy: Tensor, saved: Saved) -> list[Tensor | None]:
    options: Options = ctx.options

    def function(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        activation: str | None,
    ) -> Tensor:
        return reference.batch_norm(
            x,
            saved.running_mean,
            saved.running_var,
            weight,
            bias,
            options.batch,
            options.eps,
            residual=residual,
            activation=activation,
            negative_slope=options.slope,
        )

    return composed_gradients(ctx, dy, saved, function)


def batch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    options: Options,
) -> Tensor:
    """Through the kernels; normalizing with the batch's statistics moves the running ones, if any."""
    if options.prepared is not None and is_intercepted():
        options = options._replace(prepared=None)
    given = weight, bias, running_mean, running_var, num_batches_tracked, options
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        intercepted = options.prepared is None
        x = savable(x, intercepted)
        if residual is not None and options.activation is not None:
            residual = savable(residual, intercepted)
        if intercepted:
            return BatchNormFunction.apply(x, residual, *given)  # type: ignore[no-any-return, no-untyped-call]
        return _apply(x, residual, *given)  # type: ignore[no-any-return]
    return _normalize(x, residual, *given, None)[0]
