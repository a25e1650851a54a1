"""BatchNorm of a batch that the processes of a group share: one exchange forward, one backward, over torch.distributed.

The collectives are torch's functional ones: they are the same in eager and in compiled code, and wait for nothing on
the host.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from triton_norm import checks, shares
from triton_norm.dispatch import use_triton
from triton_norm.ops import synchronized
from triton_norm.ops.channel_plans import Options, saves_bits
from triton_norm.ops.channels import composed_gradients, counts
from triton_norm.ops.layout import kind_of
from triton_norm.ops.saved import Kept, needs_torch, restored, savable, save, shaped
from triton_norm.shares import Pieces


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


class _Total(torch.autograd.Function):
    """`synchronized.total`, differentiable to any order, in forward mode and in batches: a derivative of a sum over all
    processes is such a sum."""

    @staticmethod
    def forward(sums: Tensor, group: Group) -> Tensor:
        found: Tensor = synchronized.total_op(sums.contiguous(), group.name)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Group], output: Tensor) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Total.apply(gradient, ctx.group), None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _Total.apply(tangent, ctx.group)  # type: ignore[no-any-return, no-untyped-call]

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, None], sums: Tensor, group: Group) -> tuple[Tensor, int | None]:
        return _Total.apply(sums, group), axes[0]  # type: ignore[no-untyped-call]


def _pieces(x: Tensor, by_kernels: bool) -> Pieces:
    """Of x's own share; there is nothing to launch for an empty one."""
    return synchronized.PIECES if by_kernels and x.numel() else shares.PIECES


class Saved(NamedTuple):
    """The tensors that the backward takes; of bits, residual and bias `ops.channels.Saved` says when."""

    x: Tensor
    residual: Tensor | None
    bits: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    merged: Tensor


class SyncBatchNormFunction(torch.autograd.Function):
    """From the batch's statistics on, whose dependence on x the backward knows of. First order through the kernels;
    `needs_torch` says which backwards go through `shares.batch_norm` instead."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        merged: Tensor,
        options: Options,
        group: Group,
        by_kernels: bool,
    ) -> Tensor:
        pieces = _pieces(x, by_kernels)
        lays_bits = pieces is synchronized.PIECES and saves_bits(residual, options)
        bits_kind = kind_of(x) if lays_bits else None
        y, bits = pieces.apply(x, residual, weight, bias, merged, bits_kind, options.activation, options.slope)
        recomputes = options.activation is not None and bits is None
        added, shifted = (residual, bias) if recomputes else (None, None)
        memory: dict[Any, Any] | None = None if torch.compiler.is_compiling() else {}
        save(ctx, Saved(x, added, bits, weight, shifted, merged), (x, residual, weight, bias), memory)
        ctx.options, ctx.bits_kind, ctx.group, ctx.by_kernels = options, bits_kind, group, by_kernels
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = restored(ctx, Saved)
        unasked = (None,) * 4
        if needs_torch((dy,), saved, intercepted=True):
            return *_composed_gradients(ctx, dy, saved), *unasked
        x_wanted, residual_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad[:4]
        options: Options = ctx.options
        kept: Kept = ctx.kept
        pieces = _pieces(saved.x, ctx.by_kernels)
        asked = ctx.bits_kind, options.activation, options.slope
        dweight_dtype = kept.weight[0] if weight_wanted and kept.weight else None
        dbias_dtype = kept.bias[0] if bias_wanted and kept.bias else None
        dweight, dbias, sums = pieces.sums(dy, *saved, dweight_dtype, dbias_dtype, *asked)
        sums = synchronized.total(sums, ctx.group.name)  # all processes take part, whichever gradients each asks for
        dx = dresidual = None
        stored = kept.dresidual if residual_wanted and options.activation is not None else None
        if x_wanted or stored is not None:
            dx, dresidual = pieces.gradient(dy, *saved, sums, stored, *asked)
        if residual_wanted and stored is None:
            dresidual = dy.to(kept.dresidual)
        dweight, dbias = shaped(dweight, kept.weight), shaped(dbias, kept.bias)
        return dx if x_wanted else None, dresidual, dweight, dbias, *unasked


def _composed_gradients(ctx: Any, dy: Tensor, saved: Saved) -> list[Tensor | None]:
    def over_all(sums: Tensor) -> Tensor:
        return _Total.apply(sums, ctx.group)  # type: ignore[no-any-return, no-untyped-call]

    def function(
        x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, activation: str | None
    ) -> Tensor:
        asked = ctx.options.eps, activation, ctx.options.slope
        return shares.batch_norm(x, residual, weight, bias, saved.merged, over_all, *asked)

    return composed_gradients(ctx, dy, saved, function)


def _merged(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    options: Options,
    group: Group,
    by_kernels: bool,
) -> Tensor:
    """The statistics of the whole batch; moves the running ones."""
    with torch.no_grad():
        gathered = gather(_pieces(x, by_kernels).moments(x), group)
        merge = synchronized.PIECES.merge if by_kernels else shares.PIECES.merge
        running = [tensor for tensor in (running_mean, running_var) if tensor is not None]
        if num_batches_tracked is None or counts(x, num_batches_tracked):
            counter = [] if num_batches_tracked is None else [num_batches_tracked]
            return merge(gathered, running, counter, options.momentum, options.eps)
        momentum = options.momentum
        if momentum is None:  # to read the counter waits for the GPU
            momentum = 1.0 / float(num_batches_tracked + 1)
        merged = merge(gathered, running, [], momentum, options.eps)
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
    like = input if input.numel() else input.new_empty(1)  # an empty share goes where the others go
    by_kernels = use_triton(like, *running, weight, bias, residual)
    share = None if momentum is None else float(momentum)
    options = Options(True, share, float(eps), activation, float(negative_slope))
    merged = _merged(input, *running, num_batches_tracked, options, group, by_kernels)
    tensors = input, residual, weight, bias
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        saved = savable(input, True), None if residual is None else savable(residual, True), weight, bias
        return SyncBatchNormFunction.apply(*saved, merged, options, group, by_kernels)  # type: ignore
    apply = _pieces(input, by_kernels).apply
    return apply(*tensors, merged, None, options.activation, options.slope)[0]
