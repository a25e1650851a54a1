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
from triton_norm.ops.library import contiguous, operator, pure_operator, triton_dtype
from triton_norm.reference import compute_dtype
from triton_norm.shares import Pieces


def _options(activation: str | None = None, slope: float = 0.0) -> Options:
    return Options(True, 0.0, 0.0, activation, slope)


def _statistics(merged: Tensor) -> Tensor:
    return merged[:-1].view(3, -1)


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
    gathered: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> Tensor:
    merged = torch.empty_like(gathered[0])
    n_ranks, n_channels = gathered.shape[0], (gathered.shape[1] - 1) // 3
    moved = contiguous(running_mean), contiguous(running_var)
    types = tuple(None if tensor is None else tensor.dtype for tensor in (gathered, *moved, num_batches_tracked))
    launcher = _merge_launcher(types, gathered.device, momentum, eps)
    n_blocks = -(-n_channels // launcher.space.configs[0]["BLOCK_C"])
    sync = None if num_batches_tracked is None else zeros(2 + n_blocks, gathered.device)
    launcher((n_channels, n_ranks), gathered, merged, *moved, num_batches_tracked, sync)
    for running, now in zip((running_mean, running_var), moved, strict=True):
        if running is not None and now is not None and now is not running:
            running.copy_(now)
    return merged


def _fake_merge(gathered: Tensor, *_: Any) -> Tensor:
    return gathered.new_empty(gathered.shape[1])


def _apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    merged: Tensor,
    saves: bool,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor | None]:
    return launches.apply(x, residual, weight, bias, _statistics(merged), _options(activation, slope), saves)


def _fake_apply(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor | None]:
    return dense_like(x), bits_like(x, residual, rest[-3], rest[-2])


def _sums(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    merged: Tensor,
    wanted: Sequence[bool],
    activation: str | None,
    slope: float,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    given = dy, x, residual, bits, weight, bias, _statistics(merged)
    dweight, dbias, sums = launches.local_sums(*given, _options(activation, slope), wanted)
    return dweight, dbias, sums.flatten()


def _fake_sums(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    bits: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    merged: Tensor,
    wanted: Sequence[bool],
    *_: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    dweight, dbias = launches.gradients(x, None, weight, bias, (False, *wanted[1:]))[2:]
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
    residual_dtype: torch.dtype | None,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor | None]:
    means = (sums / merged[-1]).view(2, -1)
    given = dy, x, residual, bits, weight, bias, _statistics(merged), means
    return launches.apply_gradient(*given, _options(activation, slope), residual_dtype)


def _fake_gradient(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    return launches.gradients(x, rest[-3], None, None, (True, False, False))[:2]  # type: ignore[return-value]


moments_op = operator("sync_batch_norm_moments(Tensor x) -> Tensor", _moments, _fake_moments)
merge_op = operator(
    "sync_batch_norm_merge(Tensor gathered, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, float? momentum, float eps) -> Tensor",
    _merge,
    _fake_merge,
)
apply_op = pure_operator(
    "sync_batch_norm_apply(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor merged, bool saves, "
    "str? activation, float slope) -> (Tensor, Tensor)",
    _apply,
    _fake_apply,
)
sums_op = pure_operator(
    "sync_batch_norm_sums(Tensor dy, Tensor x, Tensor? residual, Tensor? bits, Tensor? weight, Tensor? bias, "
    "Tensor merged, bool[] wanted, str? activation, float slope) -> (Tensor, Tensor, Tensor)",
    _sums,
    _fake_sums,
)
gradient_op = pure_operator(
    "sync_batch_norm_gradient(Tensor dy, Tensor x, Tensor? residual, Tensor? bits, Tensor? weight, Tensor? bias, "
    "Tensor merged, Tensor sums, ScalarType? residual_dtype, str? activation, float slope) -> (Tensor, Tensor)",
    _gradient,
    _fake_gradient,
)

PIECES = Pieces(moments_op, merge_op, apply_op, sums_op, gradient_op)
"""Of a share that is not empty, except `merge`, which is of all shares."""
