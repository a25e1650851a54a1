"""LayerNorm and RMSNorm: `torch.library` operators with their fakes and derivatives, autograd."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import reference
from triton_norm.captures import is_intercepted
from triton_norm.ops import fusible
from triton_norm.ops.library import Derivative, Wanted, contiguous, tuple_operator
from triton_norm.ops.row_launches import Gradients, Options, Outputs, backward, forward, gradients, outputs
from triton_norm.ops.saved import needs_torch, restored, savable, save, shaped

__all__ = ["Options", "RowsFunction", "normalize"]

_OPTIONS = (
    "SymInt n_cols, float eps, float weight_offset, bool centred, ScalarType? out_dtype, ScalarType? total_dtype, "
    "ScalarType? x_hat_dtype"
)
_FORWARD = f"Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, bool saves, {_OPTIONS}"
_BACKWARD = (
    "Tensor dy, Tensor? dtotal, Tensor x, Tensor? weight, Tensor statistics, Tensor? rstd, ScalarType? dx_dtype, "
    f"ScalarType? dresidual_dtype, ScalarType? dweight_dtype, ScalarType? dbias_dtype, {_OPTIONS}"
)


class Saved(NamedTuple):
    """The tensors that the backward takes. x is what was normalized: the total, where there is a residual. Statistics
    are None where an operator was recorded without gradients, and are computed again."""

    x: Tensor
    weight: Tensor | None
    statistics: Tensor | None


class SavedApart(NamedTuple):
    """The same, of the operator that Inductor takes apart: where rstd is there, `statistics` are the means alone."""

    x: Tensor
    weight: Tensor | None
    statistics: Tensor | None
    rstd: Tensor | None


class SavedTwice(NamedTuple):
    """The tensors that the derivative of the backward takes."""

    dy: Tensor
    dtotal: Tensor | None
    x: Tensor
    weight: Tensor | None


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, saves: bool, *options: Any
) -> Outputs:
    if x.numel() == 0:  # of a number of rows that whoever recorded the call could not know
        return outputs(x, residual, Options(*options), saves)
    return forward(x, residual, weight, bias, Options(*options), saves)


def _fake_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, saves: bool, *options: Any
) -> Outputs:
    return outputs(x, residual, Options(*options), saves)


def _present_forward(x: Tensor, residual: Tensor | None, weight: Any, bias: Any, saves: bool, *_: Any) -> list[bool]:
    return [True, residual is not None, saves]


def _apart(function: Callable[..., Outputs]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Returns the function with LayerNorm's means and rstd as two results, each in memory of its own.

    Inductor so has no copies to make of them, where it finds both for another use too.
    """

    def call(*arguments: Any) -> tuple[Tensor | None, ...]:
        y, total, statistics = function(*arguments)
        if statistics is None or not Options(*arguments[5:]).centred:
            return y, total, statistics, None
        mean, rstd = statistics.view(2, -1)  # which also a number of rows that depends on data allows
        return y, total, mean.clone(), rstd.clone()

    return call


def _present_apart(
    x: Tensor,
    residual: Tensor | None,
    weight: Any,
    bias: Any,
    saves: bool,
    n_cols: int,
    eps: float,
    weight_offset: float,
    centred: bool,
    *_: Any,
) -> list[bool]:
    return [True, residual is not None, saves, saves and centred]


def _backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    rstd: Tensor | None,
    dx: torch.dtype | None,
    dresidual: torch.dtype | None,
    dweight: torch.dtype | None,
    dbias: torch.dtype | None,
    *options: Any,
) -> Gradients:
    wanted = Wanted(dx, dresidual, dweight, dbias)
    if x.numel() == 0:
        found = gradients(x, Options(*options), wanted)
        return tuple(None if gradient is None else gradient.zero_() for gradient in found)  # type: ignore[return-value]
    return backward(dy, dtotal, x, weight, statistics, contiguous(rstd), Options(*options), wanted)


def _fake_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    rstd: Tensor | None,
    dx: torch.dtype | None,
    dresidual: torch.dtype | None,
    dweight: torch.dtype | None,
    dbias: torch.dtype | None,
    *options: Any,
) -> Gradients:
    return gradients(x, Options(*options), Wanted(dx, dresidual, dweight, dbias))


def _present_backward(*arguments: Any) -> list[bool]:
    return [dtype is not None for dtype in arguments[6:10]]


def _composed(
    dy: Tensor, dtotal: Tensor | None, saved: Saved | SavedApart, options: Options, wanted: Wanted
) -> Gradients:
    """Returns the gradients of the kernels' backward, composed of torch's own functions."""

    def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y = reference.normalize(
            x.reshape(-1, options.n_cols),
            (options.n_cols,),
            weight,
            bias,
            options.eps,
            centred=options.centred,
            weight_offset=options.weight_offset,
            x_hat_dtype=options.x_hat_dtype,
            out_dtype=dy.dtype,
        )
        return y.reshape(x.shape)

    x, weight, bias = saved.x, saved.weight, None
    if weight is not None:
        weight = weight.reshape(-1)
    if wanted.dbias is not None:  # on whose values no gradient depends
        bias = torch.zeros(options.n_cols, dtype=wanted.dbias, device=x.device, requires_grad=True)
    of_x = wanted.dx is not None or wanted.dresidual is not None
    asked = of_x, wanted.dweight is not None, bias is not None
    dx, dweight, dbias = reference.gradients(function, (x, weight, bias), dy, asked)
    if dx is not None and dtotal is not None:
        dx = dx + dtotal
    found = dx, dx, dweight, dbias
    return tuple(  # type: ignore[return-value]
        None if dtype is None or gradient is None else gradient.to(dtype)
        for gradient, dtype in zip(found, wanted, strict=True)
    )


def _gradients(ctx: Any, saved: Saved | SavedApart, dy: Tensor | None, dtotal: Tensor | None) -> Gradients:
    """Returns the gradients of x, residual, weight and bias, each in the shape and type of its own."""
    options, kept = ctx.options, ctx.kept
    x_wanted, residual_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad[:4]
    twice = x_wanted and residual_wanted and kept.dresidual != kept.dx
    wanted = Wanted(
        kept.dx if x_wanted else kept.dresidual if residual_wanted else None,
        kept.dresidual if twice else None,
        kept.weight[0] if weight_wanted else None,
        kept.bias[0] if bias_wanted else None,
    )
    intercepted = options.launchers is None or is_intercepted()
    if dy is None:
        dx = None if dtotal is None or wanted.dx is None else dtotal.to(wanted.dx)
        dresidual = None if dtotal is None or wanted.dresidual is None else dtotal.to(wanted.dresidual)
        dweight = dbias = None
    elif needs_torch((dy, dtotal), saved, intercepted):
        dx, dresidual, dweight, dbias = _composed(dy, dtotal, saved, options, wanted)
    elif intercepted:
        x, weight, statistics = saved[:3]
        if statistics is None:
            statistics = _forward_op(x, None, None, None, True, *_recorded(options))[2]
        given = x, weight, statistics, saved.rstd if isinstance(saved, SavedApart) else None
        dx, dresidual, dweight, dbias = _backward_op(dy, dtotal, *given, *wanted, *_recorded(options))
    else:
        assert saved.statistics is not None
        given = saved.x, saved.weight, saved.statistics, None
        dx, dresidual, dweight, dbias = backward(dy, dtotal, *given, options, wanted)
    dweight, dbias = shaped(dweight, kept.weight), shaped(dbias, kept.bias)
    if residual_wanted and not twice:
        dresidual = dx
    return dx if x_wanted else None, dresidual, dweight, dbias


def _derivative(kind: type[Saved] | type[SavedApart], present: Callable[..., list[bool]]) -> Derivative:
    """Returns the derivative of an operator whose results after y and total are the last fields of `kind`."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, weight, bias, _, *options = inputs
        there = present(*inputs)
        _, total, *statistics = (found if is_there else None for found, is_there in zip(output, there, strict=True))
        saved = kind(x if total is None else total, weight, *statistics)
        save(ctx, saved, (x, residual, weight, bias), None)
        ctx.options = Options(*options)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1 if total is None else 2 :])

    def differentiate(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: None) -> Gradients:
        return _gradients(ctx, restored(ctx, kind), dy, None if ctx.kept.dresidual is None else dtotal)

    return Derivative(setup, differentiate)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, dtotal, x, weight, _, _, *others = inputs
    ctx.save_for_backward(*SavedTwice(dy, dtotal, x, weight))
    ctx.wanted, ctx.options = Wanted(*others[:4]), Options(*others[4:])


def _differentiate_backward(ctx: Any, *gradients: Tensor) -> list[Tensor | None]:
    saved = SavedTwice(*ctx.saved_tensors)
    there = [gradient for gradient, dtype in zip(gradients, ctx.wanted, strict=True) if dtype is not None]

    def function(dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor | None) -> tuple[Tensor, ...]:
        x, weight = reference.differentiable(x, weight)
        found = _composed(dy, dtotal, Saved(x, weight, None), ctx.options, ctx.wanted)
        return tuple(gradient for gradient in found if gradient is not None)

    return reference.gradients(function, saved, there, ctx.needs_input_grad[:4], may_be_unused=True)


_forward_op = tuple_operator(
    f"rows_forward({_FORWARD}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _present_forward,
    _derivative(Saved, _present_forward),
)
_fusible_op = tuple_operator(
    f"{fusible.NAME}({_FORWARD}) -> (Tensor, Tensor, Tensor, Tensor)",
    _apart(_forward),
    fusible.known(_apart(_fake_forward)),
    _present_apart,
    _derivative(SavedApart, _present_apart),
)
_backward_op = tuple_operator(
    f"rows_backward({_BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _present_backward,
    Derivative(_setup_backward, _differentiate_backward),
)


def _recorded(options: Options) -> tuple[Any, ...]:
    """Returns the options as an operator takes them: `launchers` are of eager calls."""
    return options[:-1]


class RowsFunction(torch.autograd.Function):
    """First order through the kernels; `needs_torch` says which backwards go through `reference` instead."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, options: Options
    ) -> Any:
        y, total, statistics = forward(x, residual, weight, bias, options, True)
        saved = Saved(x if total is None else total, weight, statistics)
        save(ctx, saved, (x, residual, weight, bias), options.launchers)
        ctx.options = options
        if total is None:
            return y
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None = None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, restored(ctx, Saved), dy, dtotal), None


# torch.autograd.Function.apply without its look for torch.func's transforms, which `dispatch` has done.
_apply: Any = super(torch.autograd.Function, RowsFunction).apply


def normalize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
    is_fusible: Callable[[], bool] = lambda: False,
) -> Any:
    """Returns y, or (y, total) with a residual, through the kernels.

    Without gradients no statistics are written or saved. A call that is recorded becomes an operator: the one that
    Inductor takes apart, if it `is_fusible`.
    """
    intercepted = options.launchers is None or is_intercepted()
    saves = torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    if saves and residual is None:
        x = savable(x, intercepted)
    if intercepted:
        chosen = _fusible_op if is_fusible() else _forward_op
        y, total, *_ = chosen(x, residual, weight, bias, saves, *_recorded(options))
    elif saves:
        return _apply(x, residual, weight, bias, options)
    else:
        y, total, _ = forward(x, residual, weight, bias, options, False)
    return y if total is None else (y, total)
