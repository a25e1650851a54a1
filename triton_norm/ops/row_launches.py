"""LayerNorm and RMSNorm: the launches of a call, its outputs, and what its programs share."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from triton_norm.ops.launch import Launcher
from triton_norm.ops.library import Wanted, contiguous, name_of, triton_dtype
from triton_norm.reference import compute_dtype
from triton_norm.tuning import memory, row_spaces
from triton_norm.tuning.configs import vector_width
from triton_norm.tuning.limits import VECTOR_BYTES, gpu_of
from triton_norm.tuning.row_spaces import RowWork


class Options(NamedTuple):
    """What a call asks for besides its tensors. `centred` is LayerNorm, otherwise RMSNorm; out_dtype None is x's,
    total_dtype None the residual's; x_hat is rounded to x_hat_dtype where that is given. `launchers` are those made for
    calls whose tensors are of the kinds of this one's, None for a call that is not known to be of real tensors.
    """

    n_cols: int
    eps: float
    weight_offset: float
    centred: bool
    out_dtype: torch.dtype | None
    total_dtype: torch.dtype | None
    x_hat_dtype: torch.dtype | None = None
    launchers: dict[Any, Any] | None = None


@functools.cache
def _kernels() -> Any:
    from triton_norm.kernels import rows

    return rows


@functools.cache
def _backward_kernels() -> Any:
    from triton_norm.kernels import rows_backward

    return rows_backward


class Rows(NamedTuple):
    """A tensor as rows, with neighbours' distances in elements; `column` is 0 where a row is one element expanded."""

    tensor: Tensor | None
    stride: int
    column: int


def as_rows(x: Tensor, n_cols: int, broadcast: bool = False) -> tuple[Tensor, int, int]:
    """x as `Rows`, in its own memory where its columns are adjacent or, with `broadcast`, one element expanded.

    A single row's stride is that of rows without gaps: its own means nothing, and another would compile anew.
    """
    if x.is_contiguous():
        return x, n_cols, 1
    rows = x.reshape(-1, n_cols)
    column = 1 if n_cols == 1 else rows.stride(1)
    if column != 1 and not (broadcast and column == 0):
        rows, column = rows.contiguous(), 1
    return rows, rows.stride(0) if rows.shape[0] > 1 else n_cols, column


def copies(x: Tensor, n_cols: int) -> bool:
    """Whether `as_rows` has to copy."""
    try:
        return n_cols > 1 and x.view(-1, n_cols).stride(1) != 1
    except RuntimeError:
        return True


def _misaligned(*tensors: Tensor | None) -> int:
    """The addresses' bits below 16, or'ed."""
    bits = 0
    for tensor in tensors:
        if tensor is not None:
            bits |= tensor.data_ptr()
    return bits % VECTOR_BYTES


def _vector(misaligned: int, extents: int, tensors: Sequence[Tensor | None]) -> int:
    """Columns an access can move: 16 bytes' worth of the narrowest type, or what bases and extents, or'ed, allow."""
    itemsizes = [tensor.itemsize for tensor in tensors if tensor is not None]
    vector = vector_width(min(itemsizes), extents)
    return min(vector, max(1, (misaligned & -misaligned) // max(itemsizes))) if misaligned else vector


def _rounded(options: Options, compute: torch.dtype) -> Any:
    """What the kernels round x_hat to, if that is narrower than what they compute in."""
    dtype = options.x_hat_dtype
    return None if dtype is None or dtype.itemsize >= compute.itemsize else triton_dtype(dtype)


def _names(*tensors: Tensor | None) -> tuple[str, ...]:
    return tuple(name_of(tensor.dtype) for tensor in tensors if tensor is not None)


Outputs = tuple[Tensor, Tensor | None, Tensor | None]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Backward(NamedTuple):
    """A launch, and the most of its programs' teams, and of the rows that one exchanges sums of at a time."""

    launcher: Launcher
    most_teams: int
    most_rows: int


T = TypeVar("T")

UNLIMITED = 2**62  # rows


def _keep(launchers: dict[Any, T], key: Any, launcher: T) -> T:
    """For the next calls like this one; calls of ever new strides don't fill the memory."""
    if len(launchers) >= memory.MOST_REMEMBERED:
        launchers.clear()
    launchers[key] = launcher
    return launcher


def _forward_launcher(
    options: Options,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    total: Tensor | None,
    strides: tuple[int, int],
    misaligned: int,
) -> Launcher:
    """strides: of x's rows and the residual's."""
    n_cols = options.n_cols
    x_stride, residual_stride = strides
    vector = _vector(misaligned, n_cols | x_stride | residual_stride, (x, residual, y, total))
    compute, device = compute_dtype(x, total), x.device
    stored = max(tensor.itemsize for tensor in (x, residual, total) if tensor is not None)
    work = RowWork(n_cols, _names(x, residual, total), stored, compute.itemsize, name_of(y.dtype))

    def n_programs(config: Mapping[str, Any], n_rows: int) -> int:
        groups: int = -(-n_rows // config["BLOCK_M"])
        return groups if config["PEERS"] == 1 else groups * -(-n_cols // (config["BLOCK_N"] * config["PIECES"]))

    return Launcher(
        _kernels().rows_forward_kernel,
        row_spaces.rows_forward(work, gpu_of(device)),
        device,
        n_programs,
        (n_cols // vector, x_stride // vector, residual_stride // vector),
        EPS=options.eps,
        WEIGHT_OFFSET=options.weight_offset,
        ROUNDED=_rounded(options, compute),
        CENTRED=options.centred,
        V=vector,
        COMPUTE=triton_dtype(compute),
    )


def _meeting(
    launcher: Launcher,
    n_cols: int,
    n_teams: int,
    slots: tuple[int, ...],
    n_counts: int,
    compute: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Where a row's peers leave what they tell each other, and the zeros that they begin with, of so many counts a
    team."""
    partials = torch.empty(n_teams, *slots, -(-n_cols // launcher.span), dtype=compute, device=device)
    return partials, torch.zeros(2 + n_counts * n_teams, dtype=torch.int32, device=device)


def outputs(x: Tensor, residual: Tensor | None, options: Options, saves: bool) -> Outputs:
    """y, total where there is a residual, and statistics where they are to be saved; without contents."""
    y = torch.empty_like(x, dtype=options.out_dtype, memory_format=torch.contiguous_format)
    total = statistics = None
    if residual is not None:
        total = torch.empty_like(residual, dtype=options.total_dtype, memory_format=torch.contiguous_format)
    if saves:
        n_rows = x.numel() // options.n_cols
        statistics = x.new_empty(2 * n_rows if options.centred else n_rows, dtype=compute_dtype(x, total))
    return y, total, statistics


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, options: Options, saves: bool
) -> Outputs:
    """What `outputs` says, with its contents."""
    y, total, statistics = outputs(x, residual, options, saves)
    n_cols = options.n_cols
    n_rows = x.numel() // n_cols
    x_rows, x_stride, _ = as_rows(x, n_cols)
    bases, residual_rows, residual_stride = x_rows.data_ptr(), None, 0
    if residual is not None:
        residual_rows, residual_stride, _ = as_rows(residual, n_cols)
        bases |= residual_rows.data_ptr()
    misaligned = bases % VECTOR_BYTES
    launchers: dict[Any, Launcher] = {} if options.launchers is None else options.launchers
    key = saves, x_stride, residual_stride, misaligned
    launcher = launchers.get(key)
    if launcher is None:
        strides = x_stride, residual_stride
        launcher = _keep(launchers, key, _forward_launcher(options, x, residual, y, total, strides, misaligned))
    partials = sync = None
    if n_cols > launcher.span:
        partials, sync = _meeting(launcher, n_cols, n_rows, (3,), 1, compute_dtype(x, total), x.device)
    launcher(
        (n_rows,), x_rows, residual_rows, y, total, contiguous(weight), contiguous(bias), statistics, partials, sync
    )
    return y, total, statistics


def _backward(
    options: Options,
    dy: Rows,
    dtotal: Rows,
    x: Rows,
    dx: Tensor | None,
    dresidual: Tensor | None,
    compute: torch.dtype,
    device: torch.device,
    misaligned: int,
) -> Backward:
    n_cols, gpu = options.n_cols, gpu_of(device)
    read = [rows for rows in (dy, dtotal, x) if rows.tensor is not None and rows.column]
    extents = functools.reduce(int.__or__, (rows.stride for rows in read), n_cols)
    vector = _vector(misaligned, extents, [*(rows.tensor for rows in read), dx, dresidual])
    stored = max(rows.tensor.itemsize for rows in (dy, dtotal, x) if rows.tensor is not None)
    work = RowWork(n_cols, _names(dy.tensor, dtotal.tensor, x.tensor), stored, compute.itemsize)
    strides = (rows.stride // (vector if rows.column else 1) for rows in (dy, dtotal, x))
    launcher = Launcher(
        _backward_kernels().rows_backward_kernel,
        row_spaces.rows_backward(work, gpu),
        device,
        functools.partial(row_spaces.rows_backward_programs, n_cols=n_cols, gpu=gpu),
        (n_cols // vector, *strides),
        DY_COLUMN_STRIDE=dy.column,
        DTOTAL_COLUMN_STRIDE=dtotal.column,
        WEIGHT_OFFSET=options.weight_offset,
        ROUNDED=_rounded(options, compute),
        CENTRED=options.centred,
        V=vector,
        COMPUTE=triton_dtype(compute),
    )
    candidates = [config.keywords for config in launcher.candidates]
    return Backward(
        launcher,
        max(row_spaces.rows_backward_teams(config, UNLIMITED, n_cols, gpu) for config in candidates),
        max(config["BLOCK_M"] for config in candidates),
    )


@memory.remembered
def _finalise_launcher(
    device: torch.device, dweight: torch.dtype | None, dbias: torch.dtype | None, n_cols: int, compute: torch.dtype
) -> Launcher:
    """Its "rows" are those of the sums."""
    vector = vector_width(compute.itemsize, n_cols)
    return Launcher(
        _backward_kernels().rows_backward_finalise_kernel,
        row_spaces.rows_backward_finalise(gpu_of(device)),
        device,
        lambda config, n_sums: -(-n_cols // config["BLOCK_N"]),
        (n_cols // vector,),
        V=vector,
        COMPUTE=triton_dtype(compute),
    )


def gradients(x: Tensor, options: Options, wanted: Wanted) -> Gradients:
    """Returns dx and dresidual of x's shape, contiguous, dweight and dbias [n_cols]; empty, None where not wanted."""

    def of_rows(dtype: torch.dtype | None) -> Tensor | None:
        return None if dtype is None else torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)

    def of_columns(dtype: torch.dtype | None) -> Tensor | None:
        return None if dtype is None else torch.empty(options.n_cols, dtype=dtype, device=x.device)

    return of_rows(wanted.dx), of_rows(wanted.dresidual), of_columns(wanted.dweight), of_columns(wanted.dbias)


def backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    rstd: Tensor | None,
    options: Options,
    wanted: Wanted,
) -> Gradients:
    """Returns what `gradients` says, with its contents; x is what was normalized.

    Args:
        rstd: [n_rows], where `statistics` hold the means alone; of calls without memory of launchers only.
    """
    dy, dtotal = dy.resolve_neg(), None if dtotal is None else dtotal.resolve_neg()
    dx, dresidual, dweight, dbias = gradients(x, options, wanted)
    n_cols, compute, device = options.n_cols, statistics.dtype, x.device
    n_rows = x.numel() // n_cols
    x_rows, dy_rows = Rows(*as_rows(x, n_cols)), Rows(*as_rows(dy, n_cols, broadcast=True))
    dtotal_rows = Rows(None, 0, 1) if dtotal is None else Rows(*as_rows(dtotal, n_cols, broadcast=True))
    spread = (rows.tensor if rows.column else None for rows in (dy_rows, dtotal_rows))
    misaligned = _misaligned(*spread, x_rows.tensor, dx, dresidual)
    launchers: dict[Any, Backward] = {} if options.launchers is None else options.launchers
    layouts = (*dy_rows[1:], *dtotal_rows[1:], x_rows.stride, misaligned)
    key = (*layouts, dy.dtype, None if dtotal is None else dtotal.dtype, wanted)
    made = launchers.get(key)
    if made is None:
        made = _backward(options, dy_rows, dtotal_rows, x_rows, dx, dresidual, compute, device, misaligned)
        _keep(launchers, key, made)
    launcher, most_teams = made.launcher, min(made.most_teams, n_rows)
    partials = sync = None
    if dx is not None and n_cols > launcher.span:
        slots = _backward_kernels().TURNS.value, 2, made.most_rows
        partials, sync = _meeting(launcher, n_cols, most_teams, slots, 2, compute, device)
    dweight_sums, dbias_sums = (
        None if grad is None else statistics.new_empty((most_teams, n_cols)) for grad in (dweight, dbias)
    )
    # A hook may have given the statistics back with other strides.
    inputs = dy_rows.tensor, dtotal_rows.tensor, x_rows.tensor, contiguous(weight), statistics.contiguous(), rstd
    launcher((n_rows,), *inputs, dx, dresidual, dweight_sums, dbias_sums, partials, sync)
    if dweight is not None or dbias is not None:
        n_sums = row_spaces.rows_backward_teams(launcher.config.keywords, n_rows, n_cols, gpu_of(device))
        finalise = _finalise_launcher(device, wanted.dweight, wanted.dbias, n_cols, compute)
        finalise((n_sums,), dweight_sums, dbias_sums, dweight, dbias)
    return dx, dresidual, dweight, dbias
