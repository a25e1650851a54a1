"""LayerNorm and RMSNorm: `torch.library` operators with their fakes, autograd."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triton_norm import reference
from triton_norm.ops.library import is_intercepted, pure_operator
from triton_norm.ops.row_launches import Gradients, Options, Outputs, backward, forward, gradients, outputs

__all__ = ["Options", "RowsFunction", "normalize"]

_OPTIONS = (
    "SymInt n_cols, float eps, float weight_offset, bool centred, ScalarType? out_dtype, ScalarType? total_dtype, "
    "ScalarType? x_hat_dtype"
)
_FORWARD = f"Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, bool saves, {_OPTIONS}"
_BACKWARD = (
    "Tensor dy, Tensor? dtotal, Tensor x, Tensor? weight, Tensor? bias, Tensor statistics, ScalarType dx_dtype, "
    f"ScalarType? dresidual_dtype, bool[] wanted, {_OPTIONS}"
)


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
    bias: Tensor | None,
    statistics: Tensor,
    dx_dtype: torch.dtype,
    dresidual_dtype: torch.dtype | None,
    wanted: Sequence[bool],
    *options: Any,
) -> Gradients:
    dtypes = dx_dtype, dresidual_dtype
    return backward(dy, dtotal, x, weight, bias, statistics, Options(*options), *dtypes, wanted)


def _fake_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    dx_dtype: torch.dtype,
    dresidual_dtype: torch.dtype | None,
    wanted: Sequence[bool],
    *options: Any,
) -> Gradients:
    return gradients(x, weight, bias, dx_dtype, dresidual_dtype, wanted)


_forward_op = pure_operator(f"rows_forward({_FORWARD}) -> (Tensor, Tensor, Tensor)", _forward, _fake_forward)
_backward_op = pure_operator(
    f"rows_backward({_BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor)", _backward, _fake_backward
)


class RowsFunction(torch.autograd.Function):
    """First order through the kernels; a backward that is itself differentiated goes through `reference`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, options: Options
    ) -> Any:
        if options.launchers is None:
            y, total, statistics = _forward_op(x, residual, weight, bias, True, *options[:-1])
        else:
            y, total, statistics = forward(x, residual, weight, bias, options, True)
        ctx.options = options
        if total is None:
            ctx.save_for_backward(x, weight, bias, statistics)
            return y
        ctx.save_for_backward(total, weight, bias, statistics)
        ctx.dtypes = x.dtype, residual.dtype  # type: ignore[union-attr]
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *of_total: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        x_wanted, residual_wanted, *parameters_wanted, _ = ctx.needs_input_grad
        x_dtype, residual_dtype = ctx.dtypes if of_total else (x.dtype, x.dtype)
        dtotal = of_total[0] if of_total else None
        wanted = (x_wanted or residual_wanted, *parameters_wanted)
        dweight = dbias = dresidual = None
        if dy is None:
            dx = dtotal
        elif torch.is_grad_enabled():
            dx, dweight, dbias = _differentiable_gradients(ctx, dy, x_dtype, wanted)
            if dx is not None and dtotal is not None:
                dx = dx + dtotal
        else:
            dtypes = x_dtype if x_wanted else residual_dtype, None
            if x_wanted and residual_wanted and residual_dtype != x_dtype:
                dtypes = x_dtype, residual_dtype
            given = dy, dtotal, x, weight, bias, statistics
            if ctx.options.launchers is None or is_intercepted():
                grads = _backward_op(*given, *dtypes, wanted, *ctx.options[:-1])
            else:
                grads = backward(*given, ctx.options, *dtypes, wanted)
            dx, dresidual, dweight, dbias = grads
        if residual_wanted and dresidual is None and dx is not None:
            dresidual = dx.to(residual_dtype)
        dx = dx.to(x_dtype) if x_wanted and dx is not None else None
        return dx, dresidual, dweight, dbias, None


# torch.autograd.Function.apply without its look for torch.func's transforms, which `dispatch` has done.
_apply: Any = super(torch.autograd.Function, RowsFunction).apply


def _differentiable_gradients(
    ctx: Any, dy: Tensor, x_dtype: torch.dtype, wanted: Sequence[bool]
) -> list[Tensor | None]:
    x, weight, bias, _ = ctx.saved_tensors
    options: Options = ctx.options

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
            out_dtype=options.out_dtype or x_dtype,
        )
        return y.reshape(x.shape)

    return reference.gradients(function, (x, weight, bias), dy, wanted)


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
        if intercepted:
            return RowsFunction.apply(x, residual, weight, bias, options)  # type: ignore[no-untyped-call]
        return _apply(x, residual, weight, bias, options)
    if intercepted:
        y, total, _ = _forward_op(x, residual, weight, bias, False, *options[:-1])
    else:
        y, total, _ = forward(x, residual, weight, bias, options, False)
    return y if total is None else (y, total)
