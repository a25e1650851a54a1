"""Computes BatchNorm of a batch that the processes of a group share, with one exchange forward and one backward.

Uses torch's functional collectives: they are the same in eager and in compiled code, and don't block the host.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from triton_norm import resolve
from triton_norm.channels.function import bits_kind_of, savable
from triton_norm.channels.running import counts, move_op
from triton_norm.dispatch import goes_to_triton, unserved
from triton_norm.plain import holds
from triton_norm.saved import needs_gradient
from triton_norm.specs import BatchNormOptions, BatchNormSpec, BatchNormTensors, Epilogue, Formula, Inputs
from triton_norm.sync import operator


class Group(NamedTuple):
    """Identifies a process group that this process is a member of."""

    name: str
    size: int


def shared_by(process_group: Any) -> Group | None:
    """Returns the group, by default all processes, or None if this process is alone in it."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group: Any = dist.group.WORLD if process_group is None else process_group
    if not torch.compiler.is_compiling() and group is not dist.GroupMember.NON_GROUP_MEMBER:
        _check(group)
    size = dist.get_world_size(group)
    return Group(group.group_name, size) if size > 1 else None


def _check(group: Any) -> None:
    if not isinstance(group, dist.ProcessGroup):
        kind = type(group).__name__
        raise TypeError(f"SyncBatchNorm: 'process_group' must be a ProcessGroup of torch.distributed, not {kind}")
    try:
        dist.get_process_group_ranks(group)
    except KeyError:
        raise RuntimeError("SyncBatchNorm: 'process_group' was destroyed, or is none of torch.distributed's") from None


def gather(packed: Tensor, group: Group) -> Tensor:
    """Returns the vectors [n] of all processes as [n_ranks, n]."""
    collectives = torch.ops._c10d_functional
    gathered: Tensor = collectives.wait_tensor(collectives.all_gather_into_tensor(packed, group.size, group.name))
    return gathered.view(group.size, -1)


def _merged(tensors: BatchNormTensors, spec: BatchNormSpec, group: Group, by_kernels: bool) -> Tensor:
    """Returns the statistics of the whole batch, and updates the running ones."""
    x, _, _, _, running_mean, running_var, counter = tensors
    gathered = gather(operator.moments_op(x.detach(), by_kernels), group)
    running = [tensor for tensor in (running_mean, running_var) if tensor is not None]
    if counter is None or counts(x, counter):
        counters = [] if counter is None else [counter]
        return move_op(gathered, running, counters, spec.momentum, spec.eps, by_kernels)  # type: ignore[no-any-return]
    momentum = spec.momentum
    if momentum is None:  # reading the counter waits for the GPU
        momentum = 1.0 / float(counter + 1)
    merged: Tensor = move_op(gathered, running, [], momentum, spec.eps, by_kernels)
    counter.add_(1)
    return merged


def sync_batch_norm(tensors: BatchNormTensors, options: BatchNormOptions, group: Group) -> Tensor:
    """Returns `triton_norm.batch_norm` in training, with statistics of the batch that `group` shares; x may be empty.

    dx is the gradient of the sum of all processes' losses; dweight and dbias are this process's part, to be summed or
    averaged. All processes of the group must run it, and its backward, together and in the same order, with inputs of
    one dtype, or of dtypes that are all computed in fp32.
    """
    spec, is_empty = resolve.batch_norm_spec(tensors, options, whole=False), holds(tensors.x.numel() == 0)
    like = tensors.x.new_empty(1) if is_empty else tensors.x  # an empty part goes to the same backend as the others
    _, residual, weight, bias, running_mean, running_var, _ = tensors
    read = like, residual, weight, bias, running_mean, running_var
    by_kernels = goes_to_triton(unserved(read), exports_torch=False)
    merged = _merged(tensors, spec, group, by_kernels)
    bits_kind = None
    if needs_gradient((tensors.x, residual, weight, bias)):
        tensors = savable(tensors, spec)
        bits_kind = bits_kind_of(tensors, spec) if by_kernels and not is_empty else None
    inputs = Inputs._make((tensors.x, tensors.residual, weight, bias))
    formula = Formula._make((spec.eps, Epilogue._make((spec.activation, spec.slope))))
    call = operator.ApplyCall._make((inputs, merged, bits_kind, formula, group.name, by_kernels))
    y, _ = operator.apply_op(call)
    return y  # type: ignore[no-any-return]
