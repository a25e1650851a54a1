"""BatchNorm: `torch.library` operators with their fakes, autograd."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triton_norm import reference
from triton_norm.ops import channel_launches as launches
from triton_norm.ops.channel_launches import Gradients, Options, saves_bits
from triton_norm.ops.layout import dense_like, empty_bits, side_of_zero
from triton_norm.ops.library import nothing, operator, pure_operator


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
        asked = options.eps, options.activation, options.slope
        statistics = None
        if options.batch:
            running = running_mean, running_var, num_batches_tracked
            y, statistics, bits = forward_op(x, residual, weight, bias, *running, True, options.momentum, *asked)
            bits = bits if bits.numel() else None
            running_mean = running_var = None
        else:
            y, bits = inference_op(x, residual, weight, bias, running_mean, running_var, True, *asked)
        ctx.residual_dtype = None if residual is None else residual.dtype
        recomputes = options.activation is not None and bits is None
        kept_bias = bias if recomputes or ctx.needs_input_grad[3] else None
        ctx.save_for_backward(
            x, residual if recomputes else None, bits, weight, kept_bias, statistics, running_mean, running_var
        )
        ctx.options = options
        return y  # type: ignore[no-any-return]

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
        dx, dresidual, dweight, dbias = backward_op(
            dy, *ctx.saved_tensors, stored, wanted, options.eps, options.activation, options.slope
        )
        if residual_wanted and not activated:
            dresidual = dy.to(ctx.residual_dtype)
        return dx, dresidual, dweight, dbias, *unasked


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
    tensors = (x, residual, weight, bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return BatchNormFunction.apply(*tensors, running_mean, running_var, num_batches_tracked, options)  # type: ignore
    asked = options.eps, options.activation, options.slope
    if options.batch:
        running = running_mean, running_var, num_batches_tracked
        return forward_op(*tensors, *running, False, options.momentum, *asked)[0]  # type: ignore[no-any-return]
    return inference_op(*tensors, running_mean, running_var, False, *asked)[0]  # type: ignore[no-any-return]
