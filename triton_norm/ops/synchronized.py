"""BatchNorm of a batch that processes share: the kernels' pieces of it, as `torch.library` operators with their fakes.

shares.py has the same in plain torch, says what each does, and how statistics are packed.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_norm import tuning
from triton_norm.ops import channel_launches as launches
from triton_norm.ops.channel_plans import Options, in_two_floats
from triton_norm.ops.channels import bits_like
from triton_norm.ops.launch import INTERPRETED, Launcher, zeros
from triton_norm.ops.layout import dense_like
from triton_norm.ops.library import Wanted, contiguous, operator, triton_dtype, tuple_operator
from triton_norm.reference import compute_dtype
from triton_norm.shares import Pieces


def _options(activation: str | None = None, slope: float = 0.0) -> Options:
    return Options(True, 0.0, 0.0, activation, slope)


def _statistics(merged: Tensor) -> Tensor:
    return merged[:-1].contiguous().view(3, -1)


def _moments(x: Tensor) -> Tensor:
    n_channels = x.shape[1]
    packed = torch.full((3 * n_channels + 1,), x.numel() // n_channels, dtype=compute_dtype(x), device=x.device)
    launches.local_statistics(x, _statistics(packed))
    return packed


def _fake_moments(x: Tensor) -> Tensor:
    return x.new_empty(3 * x.shape[1] + 1, dtype=compute_dtype(x))


@functools.cache
def _kernel() -> Any:
    from triton_norm.kernels.ranks import merge_ranks_kernel

    return merge_ranks_kernel


@tuning.remembered
def _merge_launcher(
    types: tuple[torch.dtype | None, ...], device: torch.device, momentum: float | None, eps: float
) -> Launcher:
    """`types`: of the statistics that are merged, the running ones and the counter."""
    computed = types[0]
    assert computed is not None

    def n_programs(config: Mapping[str, Any], n_channels: int, n_ranks: int) -> int:
        blocks: int = -(-n_channels // config["BLOCK_C"])
        return blocks

    return Launcher(
        _kernel(),
        tuning.merge_ranks(INTERPRETED),
        device,
        n_programs,
        in_two_floats(momentum or 0.0),
        EPS=eps,
        CUMULATIVE=momentum is None,
        COMPUTE=triton_dtype(computed),
    )


def _merge(
    gathered: Tensor, running: Sequence[Tensor], counter: Sequence[Tensor], momentum: float | None, eps: float
) -> Tensor:
    merged = torch.empty_like(gathered[0])
    n_ranks, n_channels = gathered.shape[0], (gathered.shape[1] - 1) // 3
    running_mean, running_var = running or (None, None)
    (num_batches_tracked,) = counter or (None,)
    moved = contiguous(running_mean), contiguous(running_var)
    types = tuple(None if tensor is None else tensor.dtype for tensor in (gathered, *moved, num_batches_tracked))
    launcher = _merge_launcher(types, gathered.device, momentum, eps)
    n_blocks = -(-n_channels // launcher.space.configs[0]["BLOCK_C"])
    sync = None if num_batches_tracked is None else zeros(2 + n_blocks, gathered.device)
    launcher((n_channels, n_ranks), gathered, merged, *moved, num_batches_tracked, sync)
    for statistic, now in zip((running_mean, running_var), moved, strict=True):
        if statistic is not None and now is not None and now is not statistic:
            statistic.copy_(now)
    return merged


def _fake_merge(gathered: Tensor, *_: Any) -> Tensor:
    return gathered.new_empty(gathered.shape[1])


def _apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    merged: Tensor,
    bits_kind: str | None,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor | None]:
    return launches.apply(x, residual, weight, bias, _statistics(merged), _options(activation, slope), bits_kind)


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
) -> tuple[Tensor | None, Tensor | None, Tensor]:
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
) -> tuple[Tensor, Tensor | None]:
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


# In one operator: autograd's batches of gradients take an operator apart into calls, and stack what is not there yet.
total_op = operator(
    "sync_batch_norm_total(Tensor sums, str group_name) -> Tensor",
    total,
    lambda sums, group_name: sums.new_empty(sums.shape),
)
moments_op = operator("sync_batch_norm_moments(Tensor x) -> Tensor", _moments, _fake_moments)
merge_op = operator(
    "sync_batch_norm_merge(Tensor gathered, Tensor(a!)[] running, Tensor(b!)[] counter, float? momentum, float eps) "
    "-> Tensor",
    _merge,
    _fake_merge,
)
apply_op = tuple_operator(
    "sync_batch_norm_apply(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor merged, "
    "str? bits_kind, str? activation, float slope) -> (Tensor, Tensor)",
    _apply,
    _fake_apply,
)
sums_op = tuple_operator(
    "sync_batch_norm_sums(Tensor dy, Tensor x, Tensor? residual, Tensor? bits, Tensor? weight, Tensor? bias, "
    "Tensor merged, ScalarType? dweight_dtype, ScalarType? dbias_dtype, str? bits_kind, str? activation, float slope) "
    "-> (Tensor, Tensor, Tensor)",
    _sums,
    _fake_sums,
)
gradient_op = tuple_operator(
    "sync_batch_norm_gradient(Tensor dy, Tensor x, Tensor? residual, Tensor? bits, Tensor? weight, Tensor? bias, "
    "Tensor merged, Tensor sums, ScalarType? dresidual_dtype, str? bits_kind, str? activation, float slope) "
    "-> (Tensor, Tensor)",
    _gradient,
    _fake_gradient,
)

PIECES = Pieces(moments_op, merge_op, apply_op, sums_op, gradient_op)
"""Of a share that is not empty, except `merge`, which is of all shares."""
