"""BatchNorm: `torch.library` operators with their fakes, autograd."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triton_norm import reference
from triton_norm.ops import channel_launches as launches
from triton_norm.ops.channel_launches import Gradients
from triton_norm.ops.channel_plans import Options, saves_bits
from triton_norm.ops.layout import dense_like, empty_bits, side_of_zero
from triton_norm.ops.library import is_intercepted, nothing, operator, pure_operator


def _batch_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    saves: bool,
    momentum: float | None,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(True, momentum, eps, activation, slope)
    given = x, residual, weight, bias, running_mean, running_var, num_batches_tracked
    y, statistics, bits = launches.forward(*given, options, saves)
    assert statistics is not None
    return y, statistics, nothing(x) if bits is None else bits


def _batch_norm_inference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    saves: bool,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor | None]:
    options = Options(False, 0.0, eps, activation, slope)
    y, _, bits = launches.forward(x, residual, weight, bias, running_mean, running_var, None, options, saves)
    return y, bits


def _batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual_dtype: torch.dtype | None,
    wanted: Sequence[bool],
    eps: float,
    activation: str | None,
    slope: float,
) -> Gradients:
    options = Options(statistics is not None, 0.0, eps, activation, slope)
    given = dy, x, residual, bits, weight, bias, statistics, running_mean, running_var
    return launches.backward(*given, options, residual_dtype, wanted)


def bits_like(x: Tensor, residual: Tensor | None, saves: bool, activation: str | None) -> Tensor | None:
    if not (saves and saves_bits(residual, Options(True, 0.0, 0.0, activation))):
        return None
    return empty_bits(x)


def _fake_batch_norm_forward(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    saves, activation = rest[-5], rest[-2]
    bits = bits_like(x, residual, saves, activation)
    statistics = x.new_empty(3, x.shape[1], dtype=reference.compute_dtype(x))
    return dense_like(x), statistics, nothing(x) if bits is None else bits


def _fake_batch_norm_inference(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor | None]:
    return dense_like(x), bits_like(x, residual, rest[-4], rest[-2])


def _fake_batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual_dtype: torch.dtype | None,
    wanted: Sequence[bool],
    *_: Any,
) -> Gradients:
    return launches.gradients(x, residual_dtype, weight, bias, wanted)


forward_op = operator(
    "batch_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool saves, float? momentum, float eps, "
    "str? activation, float slope) -> (Tensor, Tensor, Tensor)",
    _batch_norm_forward,
    _fake_batch_norm_forward,
)
inference_op = pure_operator(
    "batch_norm_inference(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor running_mean, "
    "Tensor running_var, bool saves, float eps, str? activation, float slope) -> (Tensor, Tensor)",
    _batch_norm_inference,
    _fake_batch_norm_inference,
)
backward_op = pure_operator(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? residual, Tensor? bits, Tensor? weight, Tensor? bias, "
    "Tensor? statistics, Tensor? running_mean, Tensor? running_var, ScalarType? residual_dtype, bool[] wanted, "
    "float eps, str? activation, float slope) -> (Tensor, Tensor, Tensor, Tensor)",
    _batch_norm_backward,
    _fake_batch_norm_backward,
)


def _normalize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    options: Options,
    saves: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, and what a backward needs, if it `saves` that: the batch's statistics, and bits."""
    given = x, residual, weight, bias, running_mean, running_var
    if options.prepared is not None:
        if options.batch:
            moved = [tensor for tensor in (running_mean, running_var, num_batches_tracked) if tensor is not None]
            torch.autograd.graph.increment_version(moved)
        return launches.forward(*given, num_batches_tracked, options, saves)
    asked = options.eps, options.activation, options.slope
    if not options.batch:
        y, bits = inference_op(*given, saves, *asked)
        return y, None, bits
    y, statistics, bits = forward_op(*given, num_batches_tracked, saves, options.momentum, *asked)
    return y, statistics, bits if bits.numel() else None


class BatchNormFunction(torch.autograd.Function):
    """First order through the kernels; a backward that is itself differentiated goes through `reference`."""

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
        running = running_mean, running_var, num_batches_tracked
        y, statistics, bits = _normalize(x, residual, weight, bias, *running, options, True)
        if options.batch:
            running_mean = running_var = None
        ctx.residual_dtype = None if residual is None else residual.dtype
        recomputes = options.activation is not None and bits is None
        kept_bias = bias if recomputes or ctx.needs_input_grad[3] else None
        ctx.save_for_backward(
            x, residual if recomputes else None, bits, weight, kept_bias, statistics, running_mean, running_var
        )
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_wanted, residual_wanted, *parameters_wanted = ctx.needs_input_grad[:4]
        wanted = x_wanted, *parameters_wanted
        unasked = (None,) * 4
        if torch.is_grad_enabled():
            return *_differentiable_gradients(ctx, dy, x_wanted, residual_wanted, parameters_wanted), *unasked
        options: Options = ctx.options
        activated = options.activation is not None
        stored = ctx.residual_dtype if residual_wanted and activated else None
        if options.prepared is None or is_intercepted():
            asked = stored, wanted, options.eps, options.activation, options.slope
            dx, dresidual, dweight, dbias = backward_op(dy, *ctx.saved_tensors, *asked)
        else:
            given: Sequence[Any] = (dy, *ctx.saved_tensors, options, stored, wanted)
            dx, dresidual, dweight, dbias = launches.backward(*given)
        if residual_wanted and not activated:
            dresidual = dy.to(ctx.residual_dtype)
        return dx, dresidual, dweight, dbias, *unasked


# torch.autograd.Function.apply without its look for torch.func's transforms, which `dispatch` has done.
_apply: Any = super(torch.autograd.Function, BatchNormFunction).apply


def _differentiable_gradients(
    ctx: Any, dy: Tensor, x_wanted: bool, residual_wanted: bool, parameters_wanted: Sequence[bool]
) -> list[Tensor | None]:
    x, residual, bits, weight, bias, _, running_mean, running_var = ctx.saved_tensors
    options: Options = ctx.options
    activation = options.activation
    if bits is not None:
        dy = torch.where(side_of_zero(bits, x), dy, dy * options.slope if activation == "leaky_relu" else 0.0)
        activation = None

    def function(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return reference.batch_norm(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            options.batch,
            options.eps,
            residual=residual,
            activation=activation,
            negative_slope=options.slope,
        )

    apart = residual_wanted and residual is None
    wanted = x_wanted, residual_wanted and not apart, *parameters_wanted
    found = reference.gradients(function, (x, residual, weight, bias), dy, wanted)
    if apart:
        found[1] = dy.to(ctx.residual_dtype)
    return found


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
    given = x, residual, weight, bias, running_mean, running_var, num_batches_tracked, options
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        if options.prepared is None:
            return BatchNormFunction.apply(*given)  # type: ignore[no-any-return, no-untyped-call]
        return _apply(*given)  # type: ignore[no-any-return]
    return _normalize(*given, False)[0]
