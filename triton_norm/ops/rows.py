"""LayerNorm and RMSNorm: launches, `torch.library` operators with their fakes, autograd."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_norm import reference, tuning
from triton_norm.ops.launch import INTERPRETED, Launcher, multiprocessors
from triton_norm.ops.library import contiguous, name_of, pure_operator, triton_dtype
from triton_norm.reference import compute_dtype
from triton_norm.tuning import Config


@functools.cache
def _kernels() -> Any:
    from triton_norm.kernels import rows

    return rows


@functools.cache
def _backward_kernels() -> Any:
    from triton_norm.kernels import rows_backward

    return rows_backward


def as_rows(x: Tensor, n_cols: int, broadcast: bool = False) -> tuple[Tensor, int, int]:
    """(tensor, row stride, column stride) of x as rows of n_cols: x's own memory where its columns are adjacent, or,
    with `broadcast`, one element expanded. A single row's stride is that of rows without gaps: its own means nothing,
    and another value would compile anew.
    """
    if x.is_contiguous():
        return x, n_cols, 1
    rows = x.reshape(-1, n_cols)
    column_stride = 1 if n_cols == 1 else rows.stride(1)
    if column_stride != 1 and not (broadcast and column_stride == 0):
        rows, column_stride = rows.contiguous(), 1
    return rows, rows.stride(0) if rows.shape[0] > 1 else n_cols * column_stride, column_stride


def copies(x: Tensor, n_cols: int) -> bool:
    """Whether `as_rows` has to copy."""
    try:
        return n_cols > 1 and x.view(-1, n_cols).stride(1) != 1
    except RuntimeError:
        return True


def _vector(n_cols: int, strides: int, tensors: Sequence[Tensor | None]) -> int:
    """Columns an access can move: 16 bytes' worth of the narrowest type, or what strides (or'ed) and bases allow."""
    itemsizes = [tensor.itemsize for tensor in tensors if tensor is not None]
    vector = tuning.vector_width(min(itemsizes), n_cols | strides)
    bases = functools.reduce(int.__or__, (tensor.data_ptr() for tensor in tensors if tensor is not None))
    if bases % tuning.VECTOR_BYTES:
        vector = min(vector, max(1, (bases & -bases) // max(itemsizes)))
    return vector


@tuning.remembered
def _forward_launcher(
    device: torch.device,
    dtypes: tuple[torch.dtype | None, ...],
    integers: tuple[int, ...],
    vector: int,
    compute: torch.dtype,
    constants: tuple[Any, ...],
) -> Launcher:
    """For tensors of these types, x and the residual first, and the integers that all calls share."""
    types = ", ".join(name_of(dtype) for dtype in dtypes[:2] if dtype is not None)
    n_cols = integers[0] * vector
    space = tuning.rows_forward(n_cols, types, compute.itemsize, multiprocessors(device), INTERPRETED)
    names = ("EPS", "WEIGHT_OFFSET", "CENTRED")
    named = dict(zip(names, constants, strict=True), V=vector, COMPUTE=triton_dtype(compute))
    return Launcher(_kernels().rows_forward_kernel, space, device, named)


def _meeting(
    n_peers: int, n_teams: int, slots: tuple[int, ...], compute: torch.dtype, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Where peers leave what they tell each other, and the zeros that they begin with; none where no row is shared."""
    if n_peers == 1:
        return None, None
    partials = torch.empty(n_teams, *slots, n_peers, dtype=compute, device=device)
    return partials, torch.zeros(1 + n_teams, dtype=torch.int32, device=device)


def _outputs(
    x: Tensor,
    residual: Tensor | None,
    n_cols: int,
    centred: bool,
    out_dtype: torch.dtype | None,
    total_dtype: torch.dtype | None,
    saves: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, total and statistics without contents."""
    y = torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)
    total = None
    if residual is not None:
        total = torch.empty(x.shape, dtype=total_dtype or residual.dtype, device=x.device)
    if not saves:
        return y, total, None
    shape = 2 if centred else 1, x.numel() // n_cols
    return y, total, torch.empty(shape, dtype=compute_dtype(x, total), device=x.device)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    n_cols: int,
    eps: float,
    weight_offset: float,
    centred: bool,
    out_dtype: torch.dtype | None,
    total_dtype: torch.dtype | None,
    saves: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, total where there is a residual, and statistics where they are to be saved."""
    y, total, statistics = _outputs(x, residual, n_cols, centred, out_dtype, total_dtype, saves)
    n_rows = x.numel() // n_cols
    rows, x_stride, _ = as_rows(x, n_cols)
    residual_rows, residual_stride = None, 0
    if residual is not None:
        residual_rows, residual_stride, _ = as_rows(residual, n_cols)
    compute = compute_dtype(x, total)
    vector = _vector(n_cols, x_stride | residual_stride, (rows, residual_rows, y, total))
    tensors = rows, residual_rows, y, total, contiguous(weight), contiguous(bias), statistics
    dtypes = tuple(None if tensor is None else tensor.dtype for tensor in tensors)
    integers = n_cols // vector, x_stride // vector, residual_stride // vector
    launcher = _forward_launcher(x.device, dtypes, integers, vector, compute, (eps, weight_offset, centred))
    n_peers = -(-n_cols // launcher.space.span)
    partials, sync = _meeting(n_peers, n_rows, (3,), compute, x.device)

    def n_programs(config: Config | Mapping[str, Any]) -> int:
        return -(-n_rows // config["BLOCK_M"]) * -(-n_cols // (config["BLOCK_N"] * config["PIECES"]))

    launcher(n_programs, (*tensors, partials, sync), (n_rows, *integers))
    return y, total, statistics


@tuning.remembered
def _backward_launcher(
    device: torch.device,
    dtypes: tuple[torch.dtype | None, ...],
    integers: tuple[int, ...],
    vector: int,
    compute: torch.dtype,
    constants: tuple[Any, ...],
) -> Launcher:
    """For tensors of these types, dy, dtotal and x first, and the integers that all calls share."""
    types = ", ".join(name_of(dtype) for dtype in dtypes[:3] if dtype is not None)
    n_cols = integers[0] * vector
    space = tuning.rows_backward(n_cols, types, compute.itemsize, multiprocessors(device), INTERPRETED)
    names = ("DY_COLUMN_STRIDE", "DTOTAL_COLUMN_STRIDE", "WEIGHT_OFFSET", "CENTRED")
    named = dict(zip(names, constants, strict=True), V=vector, COMPUTE=triton_dtype(compute))
    return Launcher(_backward_kernels().rows_backward_kernel, space, device, named)


@tuning.remembered
def _finalise_launcher(
    device: torch.device, dtypes: tuple[torch.dtype | None, ...], n_cols: int, compute: torch.dtype
) -> Launcher:
    constants = {"V": tuning.vector_width(compute.itemsize, n_cols), "COMPUTE": triton_dtype(compute)}
    space = tuning.rows_backward_finalise(INTERPRETED)
    return Launcher(_backward_kernels().rows_backward_finalise_kernel, space, device, constants)


def _gradients(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dx_dtype: torch.dtype,
    dresidual_dtype: torch.dtype | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dresidual, dweight and dbias without contents, None where not wanted."""
    dx = torch.empty(x.shape, dtype=dx_dtype, device=x.device) if wanted[0] else None
    dresidual = None
    if dresidual_dtype is not None:
        dresidual = torch.empty(x.shape, dtype=dresidual_dtype, device=x.device)
    dweight, dbias = (
        torch.empty(parameter.shape, dtype=parameter.dtype, device=x.device)
        if parameter is not None and asked
        else None
        for parameter, asked in ((weight, wanted[1]), (bias, wanted[2]))
    )
    return dx, dresidual, dweight, dbias


def _backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    n_cols: int,
    weight_offset: float,
    centred: bool,
    dx_dtype: torch.dtype,
    dresidual_dtype: torch.dtype | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dresidual in a type of its own, dweight, dbias; `wanted` says of x, weight and bias which gradients are."""
    dx, dresidual, dweight, dbias = _gradients(x, weight, bias, dx_dtype, dresidual_dtype, wanted)
    n_rows, compute, device = x.numel() // n_cols, statistics.dtype, x.device
    rows, x_stride, _ = as_rows(x, n_cols)
    dy_rows, dy_stride, dy_column_stride = as_rows(dy, n_cols, broadcast=True)
    dtotal_rows, dtotal_stride, dtotal_column_stride = None, 0, 1
    if dtotal is not None:
        dtotal_rows, dtotal_stride, dtotal_column_stride = as_rows(dtotal, n_cols, broadcast=True)
    strides = x_stride | dy_stride * dy_column_stride | dtotal_stride * dtotal_column_stride
    spread = dy_rows if dy_column_stride else None, dtotal_rows if dtotal_column_stride else None
    vector = _vector(n_cols, strides, (*spread, rows, dx, dresidual))
    integers = (
        n_cols // vector,
        dy_stride // (vector if dy_column_stride else 1),
        dtotal_stride // (vector if dtotal_column_stride else 1),
        x_stride // vector,
    )
    most_teams = tuning.rows_backward_most_teams(n_rows, multiprocessors(device))
    sums = [
        None if grad is None else torch.empty(most_teams, n_cols, dtype=compute, device=device)
        for grad in (dweight, dbias)
    ]
    tensors = dy_rows, dtotal_rows, rows, contiguous(weight), statistics, dx, dresidual, *sums
    dtypes = tuple(None if tensor is None else tensor.dtype for tensor in tensors)
    constants = dy_column_stride, dtotal_column_stride, weight_offset, centred
    launcher = _backward_launcher(device, dtypes, integers, vector, compute, constants)
    n_peers = -(-n_cols // launcher.space.span) if dx is not None else 1
    partials, sync = _meeting(n_peers, most_teams, (2, 2, tuning.MOST_BLOCK_M), compute, device)

    def n_teams(config: Config | Mapping[str, Any]) -> int:
        peers = -(-n_cols // config["BLOCK_N"])
        return tuning.rows_backward_teams(n_rows, peers, multiprocessors(device), config)

    def n_programs(config: Config | Mapping[str, Any]) -> int:
        return n_teams(config) * -(-n_cols // config["BLOCK_N"])

    launcher(n_programs, (*tensors, partials, sync), (n_rows, *integers))
    if dweight is not None or dbias is not None:
        finals = *sums, dweight, dbias
        finalise = _finalise_launcher(device, tuple(None if t is None else t.dtype for t in finals), n_cols, compute)
        vector = finalise.constants["V"]
        assert launcher.config is not None
        counts = n_teams(launcher.config), n_cols // vector
        finalise(lambda config: -(-n_cols // config["BLOCK_N"]), finals, counts)
    return dx, dresidual, dweight, dbias


_FORWARD = (
    "Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, SymInt n_cols, float eps, float weight_offset, "
    "bool centred, ScalarType? out_dtype, ScalarType? total_dtype, bool saves"
)
_BACKWARD = (
    "Tensor dy, Tensor? dtotal, Tensor x, Tensor? weight, Tensor? bias, Tensor statistics, SymInt n_cols, "
    "float weight_offset, bool centred, ScalarType dx_dtype, ScalarType? dresidual_dtype, bool[] wanted"
)


def _fake_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    n_cols: int,
    eps: float,
    weight_offset: float,
    centred: bool,
    out_dtype: torch.dtype | None,
    total_dtype: torch.dtype | None,
    saves: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return _outputs(x, residual, n_cols, centred, out_dtype, total_dtype, saves)


def _fake_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    n_cols: int,
    weight_offset: float,
    centred: bool,
    dx_dtype: torch.dtype,
    dresidual_dtype: torch.dtype | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    return _gradients(x, weight, bias, dx_dtype, dresidual_dtype, wanted)


forward_op = pure_operator(f"rows_forward({_FORWARD}) -> (Tensor, Tensor, Tensor)", _forward, _fake_forward)
backward_op = pure_operator(
    f"rows_backward({_BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor)", _backward, _fake_backward
)


class RowsFunction(torch.autograd.Function):
    """First order through the kernels; a backward that is itself differentiated goes through `reference`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        n_cols: int,
        eps: float,
        weight_offset: float,
        centred: bool,
        out_dtype: torch.dtype | None,
        total_dtype: torch.dtype | None,
        normalized_shape: tuple[int, ...],
    ) -> Any:
        y, total, statistics = forward_op(
            x, residual, weight, bias, n_cols, eps, weight_offset, centred, out_dtype, total_dtype, True
        )
        ctx.save_for_backward(x if total is None else total, weight, bias, statistics)
        ctx.options = n_cols, eps, weight_offset, centred, y.dtype, normalized_shape
        ctx.x_dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return y if total is None else (y, total)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x_wanted, residual_wanted, *parameters_wanted = ctx.needs_input_grad[:4]
        wanted = (x_wanted or residual_wanted, *parameters_wanted)
        dweight = dbias = dresidual = None
        if dy is None:
            dx = dtotal
        elif torch.is_grad_enabled():
            dx, dweight, dbias = _differentiable_gradients(ctx, dy, wanted)
            if dx is not None and dtotal is not None:
                dx = dx + dtotal
        else:
            x, weight, bias, statistics = ctx.saved_tensors
            n_cols, _, weight_offset, centred, *_ = ctx.options
            dtypes = ctx.x_dtype if x_wanted else ctx.residual_dtype, None
            if x_wanted and residual_wanted and ctx.residual_dtype != ctx.x_dtype:
                dtypes = ctx.x_dtype, ctx.residual_dtype
            dx, dresidual, dweight, dbias = backward_op(
                dy, dtotal, x, weight, bias, statistics, n_cols, weight_offset, centred, *dtypes, wanted
            )
        if residual_wanted and dresidual is None and dx is not None:
            dresidual = dx.to(ctx.residual_dtype)
        dx = dx.to(ctx.x_dtype) if x_wanted and dx is not None else None
        return dx, dresidual, dweight, dbias, *(None,) * 7


def _differentiable_gradients(ctx: Any, dy: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    x, weight, bias, _ = ctx.saved_tensors
    _, eps, weight_offset, centred, out_dtype, normalized_shape = ctx.options

    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return reference.normalize(
            x, normalized_shape, weight, bias, eps, centred=centred, weight_offset=weight_offset, out_dtype=out_dtype
        )

    return reference.gradients(forward, (x, weight, bias), dy, wanted)


def normalize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    n_cols: int,
    eps: float,
    weight_offset: float,
    centred: bool,
    out_dtype: torch.dtype | None,
    total_dtype: torch.dtype | None,
    normalized_shape: tuple[int, ...],
) -> Any:
    """y, or (y, total) with a residual, through the kernels; without gradients nothing is saved, no statistics written.

    `centred` is LayerNorm, otherwise RMSNorm. out_dtype None is x's, total_dtype None the residual's.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return RowsFunction.apply(  # type: ignore[no-untyped-call]
            x,
            residual,
            weight,
            bias,
            n_cols,
            eps,
            weight_offset,
            centred,
            out_dtype,
            total_dtype,
            normalized_shape,
        )
    y, total, _ = forward_op(
        x, residual, weight, bias, n_cols, eps, weight_offset, centred, out_dtype, total_dtype, False
    )
    return y if total is None else (y, total)
