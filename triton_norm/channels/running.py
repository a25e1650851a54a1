"""Defines the operator that updates running statistics, for BatchNorm and SyncBatchNorm, and counts batches."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_norm import shares
from triton_norm.channels.launches import in_two_floats
from triton_norm.launch import Launch, Launcher, zeros
from triton_norm.library import contiguous, operator, triton_dtype
from triton_norm.tuning.channel_spaces import merge_ranks
from triton_norm.tuning.limits import gpu_of
from triton_norm.tuning.memory import remembered


def counts(x: Tensor, num_batches_tracked: Tensor) -> bool:
    """Decides whether the kernels can increment the counter: an int32 or int64 on x's device."""
    return num_batches_tracked.device == x.device and num_batches_tracked.dtype in (torch.int64, torch.int32)


@functools.cache
def _kernel() -> Any:
    from triton_norm.kernels.ranks import merge_ranks_kernel

    return merge_ranks_kernel


@remembered
def _launcher(
    types: tuple[torch.dtype | None, ...], device: torch.device, momentum: float | None, eps: float
) -> Launcher:
    """Returns the launcher of `merge_ranks_kernel` for these dtypes of moments, running statistics and counter."""
    computed = types[0]
    assert computed is not None

    def n_programs(config: Mapping[str, Any], n_channels: int, n_ranks: int) -> int:
        blocks: int = -(-n_channels // config["BLOCK_C"])
        return blocks

    return Launcher(
        _kernel(),
        merge_ranks(gpu_of(device)),
        device,
        n_programs,
        in_two_floats(momentum or 0.0),
        EPS=eps,
        CUMULATIVE=momentum is None,
        COMPUTE=triton_dtype(computed),
    )


def _move(
    moments: Tensor,
    running: Sequence[Tensor],
    counter: Sequence[Tensor],
    momentum: float | None,
    eps: float,
    by_kernels: bool,
) -> Tensor:
    """Returns the batch's statistics [3C + 1], merged from moments [n_ranks, 3C + 1]; `shares.merge` explains both.
    Updates the running statistics and the counter, if any."""
    if not by_kernels:
        return shares.merge(moments, running, counter, momentum, eps)
    moments = moments.contiguous()
    merged = torch.empty_like(moments[0])
    n_ranks, n_channels = moments.shape[0], (moments.shape[1] - 1) // 3
    running_mean, running_var = running or (None, None)
    (num_batches_tracked,) = counter or (None,)
    moved = contiguous(running_mean), contiguous(running_var)
    types = tuple(None if tensor is None else tensor.dtype for tensor in (moments, *moved, num_batches_tracked))
    launcher = _launcher(types, moments.device, momentum, eps)
    n_blocks = -(-n_channels // launcher.space.configs[0]["BLOCK_C"])
    sync = None if num_batches_tracked is None else zeros(2 + n_blocks, moments.device)
    Launch(launcher, n_channels, n_ranks)(moments, merged, *moved, num_batches_tracked, sync)
    for statistic, now in zip((running_mean, running_var), moved, strict=True):
        if statistic is not None and now is not None and now is not statistic:
            statistic.copy_(now)
    return merged


# Written tensors are passed in lists, which may be empty: modes that track writes don't accept None for one.
move_op = operator(
    "move_running_statistics(Tensor moments, Tensor(a!)[] running, Tensor(b!)[] counter, float? momentum, float eps, "
    "bool by_kernels) -> Tensor",
    _move,
    lambda moments, *_: moments.new_empty(moments.shape[1]),
)
