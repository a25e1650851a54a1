"""BatchNorm: `torch.library` operators with their fakes and derivatives."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import reference
from triton_norm.activations import gradient_by_side
from triton_norm.captures import is_intercepted
from triton_norm.ops import channel_launches as launches
from triton_norm.ops.channel_launches import Gradients
from triton_norm.ops.channel_plans import Options
from triton_norm.ops.layout import dense_like, empty_bits, side_of_zero
from triton_norm.ops.library import Derivative, Wanted, tuple_operator
from triton_norm.ops.saved import Kept, bias_like, needs_torch, restored, save, shaped


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


class SavedTwice(NamedTuple):
    """The tensors that the derivative of the backward takes."""

    dy: Tensor
    x: Tensor
    residual: Tensor | None
    bits: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    bits_kind: str | None,
    tracks: bool,
    *options: Any,
) -> tuple[Tensor | None, ...]:
    if x.numel() == 0:  # of a number of samples that whoever recorded the call could not know
        y, statistics, moments, bits = _fake_forward(x, residual, weight, bias, bits_kind, tracks)
        return y, statistics.zero_(), None if moments is None else moments.zero_(), bits
    n_channels, moments, unpacked = x.shape[1], None, None
    if tracks:
        count = x.numel() // n_channels
        moments = torch.full((3 * n_channels + 1,), count, dtype=reference.compute_dtype(x), device=x.device)
        unpacked = moments[:-1].view(3, n_channels)
    given = x, residual, weight, bias, None, None, None, Options(True, 0.0, *options), bits_kind
    found_y, found_statistics, found_bits = launches.forward(*given, unpacked)
    return found_y, found_statistics, moments, found_bits


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
    if x.numel() == 0:
        return _fake_inference(x, residual, weight, bias, running_mean, running_var, bits_kind)
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
    if x.numel() == 0:
        found = launches.gradients(x, Wanted(dx, dresidual, dweight, dbias), bits_kind)
        return tuple(None if gradient is None else gradient.zero_() for gradient in found)  # type: ignore[return-value]
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
    bits_kind: str | None,
    tracks: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    n_channels, compute = x.shape[1], reference.compute_dtype(x)
    moments = x.new_empty(3 * n_channels + 1, dtype=compute) if tracks else None
    return dense_like(x, kind=bits_kind), x.new_empty(3, n_channels, dtype=compute), moments, bits_like(x, bits_kind)


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


class Asked(NamedTuple):
    """What a backward is asked for.

    wanted: of x, residual, weight and bias.
    """

    options: Options
    bits_kind: str | None
    kept: Kept
    wanted: tuple[bool, ...]


def composed_gradients(asked: Asked, dy: Tensor, saved: Any, function: Callable[..., Tensor]) -> list[Tensor | None]:
    """Returns the gradients of x, residual, weight and bias, composed of torch's own functions.

    Args:
        saved: a `Saved`, or another NamedTuple that has its x, residual, bits, weight and bias.
        function: (x, residual, weight, bias, activation) → y.
    """
    options, bits_kind, kept, (x_wanted, residual_wanted, *parameters_wanted) = asked
    activation, bias = options.activation, saved.bias
    if bias is None:
        bias = bias_like(saved.x, kept)
    if saved.bits is not None:
        assert bits_kind is not None
        dy = gradient_by_side(dy, side_of_zero(saved.bits, saved.x, bits_kind), activation, options.slope)
        activation = None
    apart = residual_wanted and saved.residual is None
    found = reference.gradients(
        lambda *inputs: function(*inputs, activation),
        (saved.x, saved.residual, saved.weight, bias),
        dy,
        (x_wanted, residual_wanted and not apart, *parameters_wanted),
    )
    if apart:
        assert kept.dresidual is not None
        found[1] = dy.to(kept.dresidual)
    return found


def _composed_gradients(asked: Asked, dy: Tensor, saved: Any) -> list[Tensor | None]:
    options = asked.options

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

    return composed_gradients(asked, dy, saved, function)


Inputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""x, residual, weight, bias"""


def remember(ctx: Any, inputs: Inputs, found: tuple[Any, Any], running: Any, options: Options, kind: Any) -> None:
    """Saves for the backward of `inputs`, of which the forward has found statistics and bits, laid as `kind`."""
    x, residual, weight, bias = inputs
    statistics, bits = found
    recomputes = options.activation is not None and bits is None
    added, shifted = (residual, bias) if recomputes else (None, None)
    used = (None, None) if options.batch else running
    save(ctx, Saved(x, added, bits, weight, shifted, statistics, *used), inputs, options.prepared, kind)
    ctx.options, ctx.bits_kind = options, kind


def gradients(ctx: Any, dy: Tensor) -> Sequence[Tensor | None]:
    """Returns the gradients of x, residual, weight and bias, each in the shape and type of its own."""
    saved = restored(ctx, Saved)
    options: Options = ctx.options
    kept: Kept = ctx.kept
    intercepted = options.prepared is None or is_intercepted()
    if needs_torch((dy,), saved, intercepted):
        return _composed_gradients(Asked(options, ctx.bits_kind, kept, ctx.needs_input_grad[:4]), dy, saved)
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
        assert kept.dresidual is not None
        dresidual = dy.to(kept.dresidual)
    return dx, dresidual, shaped(dweight, kept.weight), shaped(dbias, kept.bias)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, bits_kind, _, eps, activation, slope = inputs
    _, statistics, moments, bits = output
    options = Options(True, 0.0, eps, activation, slope)
    found = statistics, None if bits_kind is None else bits
    remember(ctx, tuple(tensors), found, None, options, bits_kind)
    ctx.mark_non_differentiable(statistics, moments, bits)


def _setup_inference(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, running_mean, running_var, bits_kind, eps, activation, slope = inputs
    if running_mean.requires_grad or running_var.requires_grad:
        raise RuntimeError("batch_norm(): not differentiable with respect to running_mean and running_var")
    options = Options(False, 0.0, eps, activation, slope)
    found = None, None if bits_kind is None else output[1]
    remember(ctx, (x, residual, weight, bias), found, (running_mean, running_var), options, bits_kind)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dy: Tensor, *_: Any) -> Sequence[Tensor | None]:
    return gradients(ctx, dy)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, residual, bits, weight, bias, statistics, running_mean, running_var, *others = inputs
    ctx.save_for_backward(*SavedTwice(dy, x, residual, bits, weight, bias, running_mean, running_var))
    ctx.types, (ctx.bits_kind, *asked) = Wanted(*others[:4]), others[4:]
    ctx.options = Options(statistics is not None, 0.0, *asked)


def _differentiate_backward(ctx: Any, *gradients: Tensor) -> Sequence[Tensor | None]:
    saved, types = SavedTwice(*ctx.saved_tensors), ctx.types
    wanted = tuple(dtype is not None for dtype in types)
    there = [gradient for gradient, asked in zip(gradients, wanted, strict=True) if asked]
    n_channels = saved.x.shape[1:2]
    of_bias = None if types.dbias is None else (types.dbias, n_channels)
    kept = Kept(None, saved.x.dtype, types.dresidual, None, of_bias)
    asked_for = Asked(ctx.options, ctx.bits_kind, kept, wanted)

    def function(
        dy: Tensor, x: Tensor, residual: Tensor | None, bits: Any, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        x, residual, weight, bias = reference.differentiable(x, residual, weight, bias)
        again = saved._replace(x=x, residual=residual, weight=weight, bias=bias)
        found = _composed_gradients(asked_for, dy, again)
        return tuple(
            gradient.to(dtype).view_as(like)
            for gradient, dtype, like in zip(found, types, gradients, strict=True)
            if gradient is not None and dtype is not None
        )

    return reference.gradients(function, saved[:6], there, ctx.needs_input_grad[:6], may_be_unused=True)


forward_op = tuple_operator(
    "batch_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, str? bits_kind, bool tracks, "
    "float eps, str? activation, float slope) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    lambda x, residual, weight, bias, bits_kind, tracks, *_: (True, True, tracks, bits_kind is not None),
    Derivative(_setup, _differentiate),
)
inference_op = tuple_operator(
    "batch_norm_inference(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor running_mean, "
    "Tensor running_var, str? bits_kind, float eps, str? activation, float slope) -> (Tensor, Tensor)",
    _inference,
    _fake_inference,
    lambda x, residual, weight, bias, mean, var, bits_kind, *_: (True, bits_kind is not None),
    Derivative(_setup_inference, _differentiate),
)
backward_op = tuple_operator(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? residual, Tensor? bits, Tensor? weight, Tensor? bias, "
    "Tensor? statistics, Tensor? running_mean, Tensor? running_var, ScalarType? dx_dtype, ScalarType? dresidual_dtype, "
    "ScalarType? dweight_dtype, ScalarType? dbias_dtype, str? bits_kind, float eps, str? activation, float slope) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    lambda *arguments: [dtype is not None for dtype in arguments[9:13]],
    Derivative(_setup_backward, _differentiate_backward),
)
