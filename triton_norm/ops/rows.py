"""LayerNorm and RMSNorm: `torch.library` operators with their fakes, autograd."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_norm import reference
from triton_norm.ops.library import Wanted, is_intercepted, tuple_operator
from triton_norm.ops.row_launches import Gradients, Options, Outputs, backward, forward, gradients, outputs
from triton_norm.ops.saved import bias_like, needs_torch, restored, savable, save, shaped

__all__ = ["Options", "RowsFunction", "normalize"]

_OPTIONS = (
    "SymInt n_cols, float eps, float weight_offset, bool centred, ScalarType? out_dtype, ScalarType? total_dtype, "
    "ScalarType? x_hat_dtype"
)
_FORWARD = f"Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, bool saves, {_OPTIONS}"
_BACKWARD = (
    "Tensor dy, Tensor? dtotal, Tensor x, Tensor? weight, Tensor statistics, ScalarType? dx_dtype, "
    f"ScalarType? dresidual_dtype, ScalarType? dweight_dtype, ScalarType? dbias_dtype, {_OPTIONS}"
)


class Saved(NamedTuple):
    """The tensors that the backward takes. x is what was normalized: the total, where there is a residual."""

    x: Tensor
    weight: Tensor | None
    statistics: Tensor


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, saves: bool, *options: Any
) -> Outputs:
    return forward(x, residual, weight, bias, Options(*options), saves)


def _fake_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, saves: bool, *options: Any
) -> Outputs:
    return outputs(x, residual, Options(*options), saves)


def _backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    dx: torch.dtype | None,
    dresidual: torch.dtype | None,
    dweight: torch.dtype | None,
    dbias: torch.dtype | None,
    *options: Any,
) -> Gradients:
    wanted = Wanted(dx, dresidual, dweight, dbias)
    return backward(dy, dtotal, x, weight, statistics, Options(*options), wanted)


def _fake_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    dx: torch.dtype | None,
    dresidual: torch.dtype | None,
    dweight: torch.dtype | None,
    dbias: torch.dtype | None,
    *options: Any,
) -> Gradients:
    return gradients(x, Options(*options), Wanted(dx, dresidual, dweight, dbias))


_forward_op = tuple_operator(f"rows_forward({_FORWARD}) -> (Tensor, Tensor, Tensor)", _forward, _fake_forward)
_backward_op = tuple_operator(
    f"rows_backward({_BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor)", _backward, _fake_backward
)


class RowsFunction(torch.autograd.Function):
    """First order through the kernels; `needs_torch` says which backwards go through `reference` instead."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, options: Options
    ) -> Any:
        if options.launchers is None:
            y, total, statistics = _forward_op(x, residual, weight, bias, True, *options[:-1])
        else:
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
        saved = restored(ctx, Saved)
        options, kept = ctx.options, ctx.kept
        intercepted = options.launchers is None or is_intercepted()
        x_wanted, residual_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad[:4]
        dresidual = dweight = dbias = None
        if dy is None:
            dx = dtotal
        elif needs_torch((dy, dtotal), saved, intercepted):
            dx, dweight, dbias = _composed_gradients(ctx, dy, saved)
            if dx is not None and dtotal is not None:
                dx = dx + dtotal
        else:
            twice = x_wanted and residual_wanted and kept.dresidual != kept.dx
            wanted = Wanted(
                kept.dx if x_wanted else kept.dresidual if residual_wanted else None,
                kept.dresidual if twice else None,
                kept.weight[0] if weight_wanted else None,
                kept.bias[0] if bias_wanted else None,
            )
            if intercepted:
                grads = _backward_op(dy, dtotal, *saved, *wanted, *options[:-1])
            else:
                grads = backward(dy, dtotal, *saved, options, wanted)
            dx, dresidual, dweight, dbias = grads
            dweight, dbias = shaped(dweight, kept.weight), shaped(dbias, kept.bias)
        if residual_wanted and dresidual is None and dx is not None:
            dresidual = dx.to(kept.dresidual)
        dx = dx.to(kept.dx) if x_wanted and dx is not None else None
        return dx, dresidual, dweight, dbias, None


# torch.autograd.Function.apply without its look for torch.func's transforms, which `dispatch` has done.
_apply: Any = super(torch.autograd.Function, RowsFunction).apply


def _composed_gradients(ctx: Any, dy: Tensor, saved: Saved) -> list[Tensor | None]:
    """Returns dx, dweight and dbias, composed of torch's own functions."""
    options: Options = ctx.options
    x_wanted, residual_wanted, *parameters_wanted = ctx.needs_input_grad[:4]

    def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y = reference.normalize(
            x.reshape(-1, options.n_cols),
            (options.n_cols,),
            None if weight is None else weight.reshape(-1),
            None if bias is None else bias.reshape(-1),
            options.eps,
            centred=options.centred,
            weight_offset=options.weight_offset,
            x_hat_dtype=options.x_hat_dtype,
            out_dtype=options.out_dtype or ctx.kept.dx,
        )
        return y.reshape(x.shape)

    wanted = x_wanted or residual_wanted, *parameters_wanted
    return reference.gradients(function, (saved.x, saved.weight, bias_like(saved.x, ctx.kept)), dy, wanted)


def normalize(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, options: Options) -> Any:
    """y, or (y, total) with a residual, through the kernels; without gradients no statistics are written or saved."""
    intercepted = options.launchers is None or is_intercepted()
    if intercepted:
        options = options._replace(launchers=None)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        if residual is None:
            x = savable(x, intercepted)
        if intercepted:
            return RowsFunction.apply(x, residual, weight, bias, options)  # type: ignore[no-untyped-call]
        return _apply(x, residual, weight, bias, options)
    if intercepted:
        y, total, _ = _forward_op(x, residual, weight, bias, False, *options[:-1])
    else:
        y, total, _ = forward(x, residual, weight, bias, options, False)
    return y if total is None else (y, total)
