"""BatchNorm: a call's outputs, and their contents."""

from typing import Any

import torch
from torch import Tensor

from triton_norm.ops.channel_plans import Options, Prepared, Step, Types, prepare_backward, prepare_forward
from triton_norm.ops.launch import zeros
from triton_norm.ops.layout import as_readable, dense_like, empty_bits, kind_of
from triton_norm.ops.library import Wanted, contiguous
from triton_norm.tuning import memory as tuning_memory
from triton_norm.tuning.limits import VECTOR_BYTES


def _types(*tensors: Tensor | None) -> Types:
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)


def _keep(memory: dict[Any, Prepared], key: Any, prepared: Prepared) -> None:
    """For the next calls like this one; calls of ever new strides don't fill the memory."""
    if len(memory) >= tuning_memory.MOST_REMEMBERED:
        memory.clear()
    memory[key] = prepared


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _per_channel(x: Tensor, kinds: int) -> Tensor:
    return x.new_empty((kinds, x.shape[1]), dtype=_compute_dtype(x))


def _partials(x: Tensor, step: Step, kinds: int) -> Tensor | None:
    """What each split of each channel leaves, so many kinds of it."""
    if not step.reduces or step.n_splits == 1:
        return None
    return x.new_empty((kinds, step.n_splits, x.shape[1]), dtype=_compute_dtype(x))


def _where(tensor: Tensor) -> tuple[Any, ...]:
    """Returns how a tensor lies in memory, as far as that bears on how it is read."""
    return tensor.stride(), tensor.data_ptr() % VECTOR_BYTES


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    options: Options,
    reduces: bool,
    applies: bool,
    bits_kind: str | None,
    local: bool = False,
    moments: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Returns y if it `applies`, and bits laid as `bits_kind` if that is not None. Fills `statistics`, and `moments` if
    any, and moves the running statistics, if it `reduces`."""
    weight, bias = contiguous(weight), contiguous(bias)
    moved_mean, moved_var = contiguous(running_mean), contiguous(running_var)
    residual = residual if applies else None
    memory = options.prepared
    key = _where(x), None if residual is None else _where(residual), reduces, applies, bits_kind
    prepared = None if memory is None else memory.get(key)
    read = x
    if prepared is None:
        assert memory is None or moments is None
        kind = bits_kind or kind_of(x)
        read, lie = as_readable(x, kind)
        added, residual_lie = (None, None) if residual is None else as_readable(residual, kind)
        given = weight, bias, statistics, moved_mean, moved_var, num_batches_tracked
        types = *_types(read, added, *given, moments), None if bits_kind is None else torch.uint8
        what = tuple(x.shape), kind, lie, residual_lie, types, x.device, options._replace(prepared=None)
        prepared = prepare_forward(dense_like(x, kind=kind).stride(), *what, reduces, applies, local)
        if memory is not None and read is x and added is residual:
            _keep(memory, key, prepared)
        residual = added
    y = x.new_empty_strided(x.shape, prepared.strides) if applies else None
    bits = None if bits_kind is None else empty_bits(x, bits_kind)
    for step in prepared.steps:
        partials = _partials(x, step, kinds=3)
        counter = num_batches_tracked if step.reduces else None
        sync = zeros(2 + prepared.n_blocks, x.device) if partials is not None or counter is not None else None
        running = (moved_mean, moved_var) if step.reduces or statistics is None else (None, None)
        swept = (residual, y, bits, weight, bias) if step.applies else (None,) * 5
        left = moments if step.reduces else None
        step.launcher(step.integers, read, *swept, statistics, left, *running, counter, partials, sync)
        for running_now, moved in ((running_mean, moved_mean), (running_var, moved_var)):
            if step.reduces and running_now is not None and moved is not None and moved is not running_now:
                running_now.copy_(moved)  # before a later launch can fail
    return y, bits


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    options: Options,
    bits_kind: str | None,
    moments: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns y, the batch's statistics [3, C] if they are used, and, laid as `bits_kind`, one bit an element. Fills
    moments [3, C], if any, with the batch's."""
    statistics = _per_channel(x, 3) if options.batch else None
    parameters = residual, weight, bias, statistics, running_mean, running_var, num_batches_tracked
    y, bits = _forward(x, *parameters, options, options.batch, True, bits_kind, False, moments)
    assert y is not None
    return y, statistics, bits


def local_moments(x: Tensor, statistics: Tensor) -> None:
    """Fills statistics [3, C] with the mean, what rounding it has left, and M2 of this process's share of a batch."""
    _forward(x, None, None, None, statistics, None, None, None, Options(True, 0.0, 0.0), True, False, None, local=True)


def apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    options: Options,
    bits_kind: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Returns y, and bits laid as `bits_kind`, from statistics that are given."""
    y, bits = _forward(x, residual, weight, bias, statistics, None, None, None, options, False, True, bits_kind)
    assert y is not None
    return y, bits


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def gradients(x: Tensor, wanted: Wanted, bits_kind: str | None) -> Gradients:
    """Returns dx and dresidual of x's shape, laid as `bits_kind` or else as x, dweight and dbias [C]; all empty, and
    None where one is not wanted."""

    def per_channel(dtype: torch.dtype | None) -> Tensor | None:
        return None if dtype is None else torch.empty(x.shape[1], dtype=dtype, device=x.device)

    dx, dresidual = (
        None if dtype is None else dense_like(x, dtype, bits_kind) for dtype in (wanted.dx, wanted.dresidual)
    )
    return dx, dresidual, per_channel(wanted.dweight), per_channel(wanted.dbias)


def backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    options: Options,
    wanted: Wanted,
    bits_kind: str | None,
) -> Gradients:
    """Returns what `gradients` says, with its contents. Uses the running statistics where there are no others."""
    found = gradients(x, wanted, bits_kind)
    dx, _, dweight, dbias = found
    uses_sums = options.batch and dx is not None
    reduces = uses_sums or dweight is not None or dbias is not None
    applies = dx is not None or wanted.dresidual is not None
    means = _per_channel(x, 2) if uses_sums else None
    given = residual, bits, weight, bias, statistics, running_mean, running_var
    _backward(dy, x, *given, *found, means, options, bits_kind, reduces, applies, constant=not uses_sums)
    return found


def local_sums(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    options: Options,
    wanted: Wanted,
    bits_kind: str | None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Returns dweight and dbias of this process's share of a batch, as `wanted`, and [2, C] of which `apply_gradient`
    needs the sum over all processes, divided by the number of a channel's elements."""
    _, _, dweight, dbias = gradients(x, wanted._replace(dx=None, dresidual=None), bits_kind)
    sums = _per_channel(x, 2)
    given = residual, bits, weight, bias, statistics, None, None
    outputs = None, None, dweight, dbias, sums
    _backward(dy, x, *given, *outputs, options, bits_kind, True, False, constant=False, local=True)
    return dweight, dbias, sums


def apply_gradient(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    means: Tensor,
    options: Options,
    residual_dtype: torch.dtype | None,
    bits_kind: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Returns dx, and dresidual where its type is given, from means that are given."""
    dx, dresidual, _, _ = gradients(x, Wanted(x.dtype, residual_dtype, None, None), bits_kind)
    given = residual, bits, weight, bias, statistics, None, None
    _backward(dy, x, *given, dx, dresidual, None, None, means, options, bits_kind, False, True, constant=False)
    assert dx is not None
    return dx, dresidual


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
    dx: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    means: Tensor | None,
    options: Options,
    bits_kind: str | None,
    reduces: bool,
    applies: bool,
    constant: bool,
    local: bool = False,
) -> None:
    """Fills the gradients that are there; means are between the two halves of the work. All is read as `bits_kind`, in
    which bits and the gradients lie, or else as x lies."""
    if not (reduces or applies):
        return
    dy = dy.resolve_neg()
    weight, bias = contiguous(weight), contiguous(bias)
    statistics, bits = contiguous(statistics), contiguous(bits)  # hooks may have given them other strides
    running = contiguous(running_mean), contiguous(running_var)
    residual = None if options.activation is None or bits is not None else residual
    types = _types(dy, x, residual, bits, dx, dresidual, weight, bias, statistics, *running, dweight, dbias, means)
    memory = options.prepared
    lie = None if residual is None else _where(residual)
    key = _where(dy), _where(x), lie, types, bits_kind, reduces, applies, constant
    prepared = None if memory is None else memory.get(key)
    if prepared is None:
        kind = bits_kind or kind_of(x)
        read, x_lie = as_readable(x, kind)
        read_dy, dy_lie = as_readable(dy, kind, broadcast=True)
        added, residual_lie = (None, None) if residual is None else as_readable(residual, kind)
        what = tuple(x.shape), kind, x_lie, dy_lie, residual_lie, types, x.device, options._replace(prepared=None)
        prepared = prepare_backward(*what, reduces, applies, constant, local)
        if memory is not None and read is x and read_dy is dy and added is residual:
            _keep(memory, key, prepared)
        x, dy, residual = read, read_dy, added
    for step in prepared.steps:
        partials = _partials(x, step, kinds=2)
        sync = None if partials is None else zeros(2 + prepared.n_blocks, x.device)
        stored = (dx, dresidual) if step.applies else (None, None)
        summed = (dweight, dbias) if step.reduces else (None, None)
        inputs = dy, x, residual, bits, *stored, weight, bias, statistics, *running
        step.launcher(step.integers, *inputs, *summed, means, partials, sync)
