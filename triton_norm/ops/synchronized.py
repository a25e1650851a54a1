"""BatchNorm of a batch that processes share: its pieces as `torch.library` operators with their fakes and derivatives.

shares.py has the pieces in plain torch, says what each does, and how statistics are packed. An operator launches the
kernels, or calls those functions where it is told to and where a share is empty. The derivative of a call is that of
its last operator, which knows how the statistics depend on x; the ones before it have none.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import shares
from triton_norm.captures import is_intercepted
from triton_norm.ops import channel_launches as launches
from triton_norm.ops.channel_operators import Asked, bits_like, composed_gradients
from triton_norm.ops.channel_plans import Options
from triton_norm.ops.layout import dense_like
from triton_norm.ops.library import Derivative, Wanted, operator, tuple_operator
from triton_norm.ops.saved import Kept, needs_torch, restored, save, shaped
from triton_norm.reference import compute_dtype


class Saved(NamedTuple):
    """The tensors that the backward takes; of bits, residual and bias `ops.channel_operators.Saved` says when."""

    x: Tensor
    residual: Tensor | None
    bits: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    merged: Tensor


def _options(activation: str | None = None, slope: float = 0.0, eps: float = 0.0) -> Options:
    return Options(True, 0.0, eps, activation, slope)


def _statistics(merged: Tensor) -> Tensor:
    return merged[:-1].contiguous().view(3, -1)


def _moments(x: Tensor, by_kernels: bool) -> Tensor:
    if not (by_kernels and x.numel()):
        return shares.moments(x)
    n_channels = x.shape[1]
    packed = torch.full((3 * n_channels + 1,), x.numel() // n_channels, dtype=compute_dtype(x), device=x.device)
    launches.local_moments(x, _statistics(packed))
    return packed


def _fake_moments(x: Tensor, by_kernels: bool) -> Tensor:
    return x.new_empty(3 * x.shape[1] + 1, dtype=compute_dtype(x))


def _apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    merged: Tensor,
    bits_kind: str | None,
    eps: float,
    activation: str | None,
    slope: float,
    group_name: str,
    by_kernels: bool,
) -> tuple[Tensor, Tensor | None]:
    if by_kernels and x.numel():
        return launches.apply(x, residual, weight, bias, _statistics(merged), _options(activation, slope), bits_kind)
    y = dense_like(x, kind=bits_kind)
    y.copy_(shares.apply(x, residual, weight, bias, merged, activation, slope))
    return y, bits_like(x, bits_kind)


def _fake_apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    merged: Tensor,
    bits_kind: str | None,
    *_: Any,
) -> tuple[Tensor, Tensor | None]:
    return dense_like(x, kind=bits_kind), bits_like(x, bits_kind)


def _sums(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    merged: Tensor,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    bits_kind: str | None,
    activation: str | None,
    slope: float,
    by_kernels: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    if not (by_kernels and x.numel()):
        return shares.sums(dy, x, residual, weight, bias, merged, dweight_dtype, dbias_dtype, activation, slope)
    given = dy, x, residual, bits, weight, bias, _statistics(merged)
    wanted = Wanted(None, None, dweight_dtype, dbias_dtype)
    dweight, dbias, sums = launches.local_sums(*given, _options(activation, slope), wanted, bits_kind)
    return dweight, dbias, sums.flatten()


def _fake_sums(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    merged: Tensor,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    *options: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    _, _, dweight, dbias = launches.gradients(x, Wanted(None, None, dweight_dtype, dbias_dtype), None)
    return dweight, dbias, merged.new_empty(2 * x.shape[1])


def _gradient(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    merged: Tensor,
    sums: Tensor,
    dresidual_dtype: torch.dtype | None,
    bits_kind: str | None,
    activation: str | None,
    slope: float,
    by_kernels: bool,
) -> tuple[Tensor, Tensor | None]:
    if not (by_kernels and x.numel()):
        dx, dresidual = shares.gradient(dy, x, residual, weight, bias, merged, sums, dresidual_dtype, activation, slope)
        return dense_like(x, kind=bits_kind).copy_(dx), (
            None if dresidual is None else dense_like(x, dresidual_dtype, bits_kind).copy_(dresidual)
        )
    means = (sums / merged[-1]).view(2, -1)
    given = dy, x, residual, bits, weight, bias, _statistics(merged), means
    return launches.apply_gradient(*given, _options(activation, slope), dresidual_dtype, bits_kind)


def _fake_gradient(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    merged: Tensor,
    sums: Tensor,
    dresidual_dtype: torch.dtype | None,
    bits_kind: str | None,
    *options: Any,
) -> tuple[Tensor | None, Tensor | None]:
    dx, dresidual, _, _ = launches.gradients(x, Wanted(x.dtype, dresidual_dtype, None, None), bits_kind)
    return dx, dresidual


def total(sums: Tensor, group_name: str) -> Tensor:
    """Returns sums over all processes of the group."""
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_reduce(sums, "sum", group_name))  # type: ignore[no-any-return]


class Total(torch.autograd.Function):
    """`total`, differentiable to any order, in forward mode and in batches: a derivative of a sum over all processes is
    such a sum."""

    @staticmethod
    def forward(sums: Tensor, group_name: str) -> Tensor:
        found: Tensor = total_op(sums.contiguous(), group_name)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        _, ctx.group_name = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return Total.apply(gradient, ctx.group_name), None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return Total.apply(tangent, ctx.group_name)  # type: ignore[no-any-return, no-untyped-call]

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, None], sums: Tensor, group_name: str) -> tuple[Tensor, int | None]:
        return Total.apply(sums, group_name), axes[0]  # type: ignore[no-untyped-call]


def _setup_total(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    _, ctx.group_name = inputs


def _differentiate_total(ctx: Any, gradient: Tensor) -> tuple[Tensor]:
    found: Tensor = total_op(gradient.contiguous(), ctx.group_name)
    return (found,)


def _setup_apply(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, merged, bits_kind, eps, activation, slope, group_name, by_kernels = inputs
    bits = None if bits_kind is None else output[1]
    recomputes = activation is not None and bits is None
    added, shifted = (residual, bias) if recomputes else (None, None)
    memory: dict[Any, Any] | None = None if is_intercepted() else {}
    save(ctx, Saved(x, added, bits, weight, shifted, merged), (x, residual, weight, bias), memory)
    ctx.options, ctx.bits_kind = _options(activation, slope, eps), bits_kind
    ctx.group_name, ctx.by_kernels = group_name, by_kernels
    ctx.mark_non_differentiable(output[1])


def _differentiate_apply(ctx: Any, dy: Tensor, *_: Any) -> Sequence[Tensor | None]:
    saved = restored(ctx, Saved)
    options: Options = ctx.options
    kept: Kept = ctx.kept
    wanted = x_wanted, residual_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad[:4]
    if needs_torch((dy,), saved, intercepted=True):
        return _composed_gradients(Asked(options, ctx.bits_kind, kept, wanted), dy, saved, ctx.group_name)
    asked = ctx.bits_kind, options.activation, options.slope, ctx.by_kernels
    dweight_dtype = kept.weight[0] if weight_wanted and kept.weight else None
    dbias_dtype = kept.bias[0] if bias_wanted and kept.bias else None
    dweight, dbias, sums = sums_op(dy, *saved, dweight_dtype, dbias_dtype, *asked)
    sums = total(sums, ctx.group_name)  # all processes take part, whichever gradients each asks for
    dx = dresidual = None
    stored = kept.dresidual if residual_wanted and options.activation is not None else None
    if x_wanted or stored is not None:
        dx, dresidual = gradient_op(dy, *saved, sums, stored, *asked)
    if residual_wanted and stored is None:
        assert kept.dresidual is not None
        dresidual = dy.to(kept.dresidual)
    return dx if x_wanted else None, dresidual, shaped(dweight, kept.weight), shaped(dbias, kept.bias)


def _composed_gradients(asked: Asked, dy: Tensor, saved: Saved, group_name: str) -> list[Tensor | None]:
    def over_all(sums: Tensor) -> Tensor:
        return Total.apply(sums, group_name)  # type: ignore[no-any-return, no-untyped-call]

    def function(
        x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, activation: str | None
    ) -> Tensor:
        options = asked.options.eps, activation, asked.options.slope
        return shares.batch_norm(x, residual, weight, bias, saved.merged, over_all, *options)

    return composed_gradients(asked, dy, saved, function)


def _undifferentiable(name: str) -> Derivative:
    """Returns the derivative of a backward's operator, which is an error."""

    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            f"triton_norm::{name} can't be differentiated: a backward of SyncBatchNorm was recorded as operators; for "
            "second derivatives record the forward alone"
        )

    return Derivative(lambda ctx, inputs, output: None, backward)


# In one operator: autograd's batches of gradients take an operator apart into calls, and stack what is not there yet.
total_op: Any = operator(
    "sync_batch_norm_total(Tensor sums, str group_name) -> Tensor",
    total,
    lambda sums, group_name: sums.new_empty(sums.shape),
    Derivative(_setup_total, _differentiate_total),
)
moments_op = operator("sync_batch_norm_moments(Tensor x, bool by_kernels) -> Tensor", _moments, _fake_moments)
apply_op = tuple_operator(
    "sync_batch_norm_apply(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor merged, "
    "str? bits_kind, float eps, str? activation, float slope, str group_name, bool by_kernels) -> (Tensor, Tensor)",
    _apply,
    _fake_apply,
    lambda x, residual, weight, bias, merged, bits_kind, *_: (True, bits_kind is not None),
    Derivative(_setup_apply, _differentiate_apply),
)
sums_op = tuple_operator(
    "sync_batch_norm_sums(Tensor dy, Tensor x, Tensor? residual, Tensor? bits, Tensor? weight, Tensor? bias, "
    "Tensor merged, ScalarType? dweight_dtype, ScalarType? dbias_dtype, str? bits_kind, str? activation, float slope, "
    "bool by_kernels) -> (Tensor, Tensor, Tensor)",
    _sums,
    _fake_sums,
    lambda *arguments: (arguments[7] is not None, arguments[8] is not None, True),
    _undifferentiable("sync_batch_norm_sums"),
)
gradient_op = tuple_operator(
    "sync_batch_norm_gradient(Tensor dy, Tensor x, Tensor? residual, Tensor? bits, Tensor? weight, Tensor? bias, "
    "Tensor merged, Tensor sums, ScalarType? dresidual_dtype, str? bits_kind, str? activation, float slope, "
    "bool by_kernels) -> (Tensor, Tensor)",
    _gradient,
    _fake_gradient,
    lambda *arguments: (True, arguments[8] is not None),
    _undifferentiable("sync_batch_norm_gradient"),
)
