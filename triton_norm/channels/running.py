"""Updates running statistics from moments, and counts batches: by an operator for BatchNorm and SyncBatchNorm, and by
a launch for InstanceNorm."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_norm import reference, shares
from triton_norm.channels.launches import in_two_floats
from triton_norm.launch import Launch, Launcher, zeros
from triton_norm.library import contiguous, operator, triton_dtype
from triton_norm.specs import BatchNormTensors
from triton_norm.tuning.channel_spaces import merge_ranks
from triton_norm.tuning.group_spaces import move_by_samples
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
    computed, *_ = types
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
    copy_back((running_mean, running_var), moved)
    return merged


def copy_back(running: Sequence[Tensor | None], moved: Sequence[Tensor | None]) -> None:
    """Copies running statistics that a launch has moved in contiguous copies."""
    for statistic, copied in zip(running, moved, strict=True):
        if statistic is not None and copied is not None and copied is not statistic:
            statistic.copy_(copied)


# Written tensors are passed in lists, which may be empty: modes that track writes don't accept None for one.
move_op = operator(
    "move_running_statistics(Tensor moments, Tensor(a!)[] running, Tensor(b!)[] counter, float? momentum, float eps, "
    "bool by_kernels) -> Tensor",
    _move,
    lambda moments, *_: moments.new_empty(moments.shape[1]),
)


@functools.cache
def _sample_kernel() -> Any:
    from triton_norm.kernels.groups import move_by_samples_kernel

    return move_by_samples_kernel


@remembered
def _sample_launcher(types: tuple[torch.dtype, ...], device: torch.device, momentum: float) -> Launcher:
    """Returns the launcher of `move_by_samples_kernel` for these dtypes of moments and running statistics."""

    def n_programs(config: Mapping[str, Any], n_positions: int, n_channels: int, n_samples: int) -> int:
        blocks: int = -(-n_channels // config["BLOCK_C"])
        return blocks

    return Launcher(
        _sample_kernel(),
        move_by_samples(gpu_of(device)),
        device,
        n_programs,
        in_two_floats(momentum),
        COMPUTE=triton_dtype(types[0]),
    )


class InstanceStatistics:
    """Updates the running statistics of the InstanceNorm calls of one signature, from the moments of x."""

    def __init__(self, tensors: BatchNormTensors, momentum: float) -> None:
        x, running_mean, running_var = tensors.x, tensors.running_mean, tensors.running_var
        assert running_mean is not None and running_var is not None
        n_samples, n_channels, *positions = x.shape
        self._like, self._n_moments = x.new_empty(0, dtype=reference.compute_dtype(x)), 3 * n_samples * n_channels
        self._copies = not (running_mean.is_contiguous() and running_var.is_contiguous())
        self._refuses = running_mean.is_inference() or running_var.is_inference()
        types = self._like.dtype, running_mean.dtype, running_var.dtype
        launcher = _sample_launcher(types, x.device, momentum)
        self._launch = Launch(launcher, math.prod(positions), n_channels, n_samples)

    def moments(self, *running: Tensor) -> Tensor:
        """Returns memory for the moments [3 · n_samples · n_channels], if the running statistics may be written."""
        if self._refuses:
            reference.check_writable(*running)
        return self._like.new_empty(self._n_moments)

    def move(self, moments: Tensor, *running: Tensor) -> None:
        """Updates running_mean and running_var in place, as `reference.move_by_moments`."""
        if self._copies:
            moved = [statistic.contiguous() for statistic in running]
            self._launch(moments, *moved)
            with torch.no_grad():
                copy_back(running, moved)
            return
        torch._C._increment_version(running)
        self._launch(moments, *running)
