"""LayerNorm: launches, `torch.library` operators with their fakes, autograd."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triton_norm import reference, tuning
from triton_norm.ops.launch import INTERPRETED, launch, multiprocessors
from triton_norm.ops.library import contiguous, name_of, nothing, operator, parameter_gradients, triton_dtype
from triton_norm.reference import compute_dtype


@functools.cache
def _kernels() -> Any:
    from triton_norm.kernels import rows

    return rows


def as_rows(x: Tensor, n_cols: int, broadcast: bool = False) -> Tensor:
    """x as [rows, n_cols], columns adjacent (or one element, with `broadcast`): x's own memory where it can be."""
    rows = x.reshape(-1, n_cols)
    readable = n_cols == 1 or rows.stride(1) == 1 or (broadcast and rows.stride(1) == 0)
    return rows if readable else rows.contiguous()


def copies(x: Tensor, n_cols: int) -> bool:
    """Whether `as_rows` has to copy."""
    try:
        return n_cols > 1 and x.view(-1, n_cols).stride(1) != 1
    except RuntimeError:
        return True


def _row_stride(rows: Tensor) -> int:
    """That of rows without gaps for a single row: its own means nothing, and another value would compile anew."""
    return rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


def _launch_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n_cols: int,
    eps: float,
    y: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> None:
    rows = as_rows(x, n_cols)
    n_rows, x_stride = rows.shape[0], _row_stride(rows)
    vector = tuning.vector_width(min(x.itemsize, y.itemsize), n_cols, x_stride)
    compute = compute_dtype(x)
    launch(
        _kernels().rows_forward_kernel,
        tuning.rows_forward(n_cols, name_of(x.dtype), compute.itemsize, INTERPRETED),
        lambda config: -(-n_rows // config["BLOCK_M"]),
        x.device,
        rows,
        y,
        contiguous(weight),
        contiguous(bias),
        mean,
        rstd,
        n_rows,
        n_cols // vector,
        x_stride // vector,
        EPS=eps,
        V=vector,
        COMPUTE=triton_dtype(compute),
    )


def _output(x: Tensor, out_dtype: torch.dtype | None) -> Tensor:
    return torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)


def _statistics(x: Tensor, n_cols: int) -> tuple[Tensor, Tensor]:
    n_rows = x.numel() // n_cols
    mean = torch.empty(n_rows, dtype=compute_dtype(x), device=x.device)
    return mean, torch.empty_like(mean)


def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n_cols: int, eps: float, out_dtype: torch.dtype | None
) -> Tensor:
    y = _output(x, out_dtype)
    _launch_forward(x, weight, bias, n_cols, eps, y, None, None)
    return y


def _layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n_cols: int, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    y = _output(x, out_dtype)
    mean, rstd = _statistics(x, n_cols)
    _launch_forward(x, weight, bias, n_cols, eps, y, mean, rstd)
    return y, mean, rstd


def _gradients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias without contents; of no elements where not wanted."""
    return _output(x, None) if wanted[0] else nothing(x), *parameter_gradients(weight, bias, x, wanted)


def _layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    n_cols: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _gradients(x, weight, bias, wanted)
    x_rows, dy_rows = as_rows(x, n_cols), as_rows(dy, n_cols, broadcast=True)
    n_rows, x_stride, dy_stride = x_rows.shape[0], _row_stride(x_rows), _row_stride(dy_rows)
    dy_column_stride = 1 if n_cols == 1 else dy_rows.stride(1)
    vector = tuning.vector_width(min(x.itemsize, dy.itemsize), n_cols, x_stride, dy_stride * dy_column_stride)
    compute = compute_dtype(x)
    most_programs = tuning.rows_backward_programs(n_rows, n_cols, multiprocessors(x.device))
    sums = [
        torch.empty(most_programs, n_cols, dtype=compute, device=x.device) if grad.numel() else None
        for grad in (dweight, dbias)
    ]
    n_sums = launch(
        _kernels().rows_backward_kernel,
        tuning.rows_backward(n_cols, name_of(x.dtype), compute.itemsize, INTERPRETED),
        lambda config: min(most_programs, -(-n_rows // config["BLOCK_M"])),
        x.device,
        dy_rows,
        x_rows,
        contiguous(weight),
        mean,
        rstd,
        dx if wanted[0] else None,
        *sums,
        n_rows,
        n_cols // vector,
        dy_stride // vector if dy_column_stride else dy_stride,
        x_stride // vector,
        DY_COLUMN_STRIDE=dy_column_stride,
        V=vector,
        COMPUTE=triton_dtype(compute),
    )
    if any(partial is not None for partial in sums):
        launch(
            _kernels().rows_backward_finalise_kernel,
            tuning.rows_backward_finalise(INTERPRETED),
            lambda config: -(-n_cols // config["BLOCK_N"]),
            x.device,
            *sums,
            dweight if dweight.numel() else None,
            dbias if dbias.numel() else None,
            n_sums,
            n_cols // vector,
            V=vector,
            COMPUTE=triton_dtype(compute),
        )
    return dx, dweight, dbias


def _fake_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n_cols: int, eps: float, out_dtype: torch.dtype | None
) -> Tensor:
    return _output(x, out_dtype)


def _fake_layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n_cols: int, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _output(x, out_dtype), *_statistics(x, n_cols)


def _fake_layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    n_cols: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(x, weight, bias, wanted)


_FORWARD = "(Tensor x, Tensor? weight, Tensor? bias, SymInt n_cols, float eps, ScalarType? out_dtype)"

layer_norm_op = operator(f"layer_norm{_FORWARD} -> Tensor", _layer_norm, _fake_layer_norm)
layer_norm_forward_op = operator(
    f"layer_norm_forward{_FORWARD} -> (Tensor, Tensor, Tensor)", _layer_norm_forward, _fake_layer_norm_forward
)
layer_norm_backward_op = operator(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, SymInt n_cols, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _layer_norm_backward,
    _fake_layer_norm_backward,
)


class LayerNormFunction(torch.autograd.Function):
    """First order through the kernels; a backward that is itself differentiated goes through `reference`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        normalized_shape: tuple[int, ...],
        n_cols: int,
        eps: float,
        out_dtype: torch.dtype | None,
    ) -> Tensor:
        y, mean, rstd = layer_norm_forward_op(x, weight, bias, n_cols, eps, out_dtype)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.normalized_shape, ctx.n_cols, ctx.eps, ctx.out_dtype = normalized_shape, n_cols, eps, out_dtype
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():

            def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                return reference.layer_norm(x, ctx.normalized_shape, weight, bias, ctx.eps, ctx.out_dtype)

            return *reference.gradients(forward, (x, weight, bias), dy, wanted), None, None, None, None
        grads = layer_norm_backward_op(dy, x, weight, bias, mean, rstd, ctx.n_cols, wanted)
        return *(grad if asked else None for grad, asked in zip(grads, wanted, strict=True)), None, None, None, None


def layer_norm(
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """Through the kernels; without gradients nothing is saved and no statistics are written."""
    n_cols = math.prod(normalized_shape)
    tensors = (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return LayerNormFunction.apply(x, weight, bias, normalized_shape, n_cols, eps, out_dtype)  # type: ignore
    return layer_norm_op(x, weight, bias, n_cols, eps, out_dtype)  # type: ignore
