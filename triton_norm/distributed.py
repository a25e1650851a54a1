"""BatchNorm of a batch that the processes of a group share: one exchange forward, one backward, over torch.distributed.

The collectives are torch's functional ones: they are the same in eager and in compiled code, and wait for nothing on
the host.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from triton_norm import checks
from triton_norm.dispatch import goes_to_triton, unserved
from triton_norm.ops import synchronized
from triton_norm.ops.channel_plans import Options, saves_bits
from triton_norm.ops.layout import kind_of
from triton_norm.ops.running import counts, move_op
from triton_norm.ops.saved import savable
from triton_norm.plain import holds


class Group(NamedTuple):
    """A process group that this process is a member of."""

    name: str
    size: int


def shared_by(process_group: Any) -> Group | None:
    """The group, by default all processes, if this process shares a batch with others there."""
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
    """[n_ranks, n] of vectors [n]."""
    collectives = torch.ops._c10d_functional
    gathered: Tensor = collectives.wait_tensor(collectives.all_gather_into_tensor(packed, group.size, group.name))
    return gathered.view(group.size, -1)


def _merged(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    options: Options,
    group: Group,
    by_kernels: bool,
) -> Tensor:
    """Returns the statistics of the whole batch; moves the running ones."""
    gathered = gather(synchronized.moments_op(x.detach(), by_kernels), group)
    running = [tensor for tensor in (running_mean, running_var) if tensor is not None]
    if num_batches_tracked is None or counts(x, num_batches_tracked):
        counter = [] if num_batches_tracked is None else [num_batches_tracked]
        return move_op(gathered, running, counter, options.momentum, options.eps, by_kernels)  # type: ignore
    momentum = options.momentum
    if momentum is None:  # to read the counter waits for the GPU
        momentum = 1.0 / float(num_batches_tracked + 1)
    merged: Tensor = move_op(gathered, running, [], momentum, options.eps, by_kernels)
    num_batches_tracked.add_(1)
    return merged


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
    group: Group,
    *,
    num_batches_tracked: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    """`triton_norm.batch_norm` in training, with the statistics of the batch that `group` shares; `input` may be empty.

    dx is the gradient of the sum of all processes' losses; dweight and dbias are of this process's share alone, for
    whoever sums or averages gradients over processes. All processes of the group have to call it, and go backward
    through it, together and in the same order, their inputs of one type, or of types that are all computed in fp32.
    """
    running = running_mean, running_var
    checks.batch_norm(input, *running, weight, bias, True, momentum, eps, num_batches_tracked, whole=False)
    checks.activated(input, residual, activation, negative_slope)
    like = input.new_empty(1) if holds(input.numel() == 0) else input  # an empty share goes where the others go
    by_kernels = goes_to_triton(unserved(like, *running, weight, bias, residual), exports_torch=False)
    share = None if momentum is None else float(momentum)
    # By _make, as in `asking.check_rows`.
    options = Options._make((True, share, float(eps), activation, float(negative_slope), None))
    merged = _merged(input, *running, num_batches_tracked, options, group, by_kernels)
    tensors = input, residual, weight, bias
    needs_gradient = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if needs_gradient:
        tensors = savable(input, True), None if residual is None else savable(residual, True), weight, bias
    lays_bits = needs_gradient and by_kernels and saves_bits(residual, options) and not holds(input.numel() == 0)
    bits_kind = kind_of(input) if lays_bits else None
    asked = bits_kind, options.eps, options.activation, options.slope, group.name, by_kernels
    y: Tensor = synchronized.apply_op(*tensors, merged, *asked)[0]
    return y
