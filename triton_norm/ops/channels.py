"""BatchNorm: the kernels' launches or their operators, autograd."""

from typing import Any

import torch
from torch import Tensor

from triton_norm import reference
from triton_norm.captures import is_intercepted
from triton_norm.ops import channel_launches as launches
from triton_norm.ops.channel_operators import forward_op, gradients, inference_op, remember
from triton_norm.ops.channel_plans import Options, saves_bits
from triton_norm.ops.layout import kind_of
from triton_norm.ops.running import counts, move_op
from triton_norm.ops.saved import savable


def _normalize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    options: Options,
    bits_kind: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns y and what a backward takes beside the inputs: the batch's statistics, and bits laid as `bits_kind`.

    Launches the kernels, or, where they are recorded, calls the operators, which keep for the backward themselves.
    """
    if num_batches_tracked is not None and not counts(x, num_batches_tracked):
        if options.momentum is None:  # to read the counter waits for the GPU
            options = options._replace(momentum=1.0 / float(num_batches_tracked + 1), prepared=None)
        found = _normalize(x, residual, weight, bias, running_mean, running_var, None, options, bits_kind)
        num_batches_tracked.add_(1)  # before a saved tensor's hook can end the call
        return found
    given = x, residual, weight, bias
    moved = [tensor for tensor in (running_mean, running_var) if tensor is not None]
    counter = [] if num_batches_tracked is None else [num_batches_tracked]
    if options.prepared is not None:
        if options.batch:
            if num_batches_tracked is not None and num_batches_tracked.is_inference():
                reference.check_writable(num_batches_tracked)  # torch moves such statistics anywhere
            torch.autograd.graph.increment_version(moved + counter)
        return launches.forward(*given, running_mean, running_var, num_batches_tracked, options, bits_kind)
    asked = options.eps, options.activation, options.slope
    if not options.batch:
        y, bits = inference_op(*given, running_mean, running_var, bits_kind, *asked)
        return y, None, bits
    tracks = len(moved) + len(counter) > 0
    y, statistics, moments, bits = forward_op(*given, bits_kind, tracks, *asked)
    if tracks:
        move_op(moments[None], moved, counter, options.momentum, options.eps, True)
    return y, statistics, bits


class BatchNormFunction(torch.autograd.Function):
    """First order through the kernels; `needs_torch` says which backwards go through `reference` instead."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        options: Options,
    ) -> Tensor:
        bits_kind = kind_of(x) if saves_bits(residual, options) else None
        running = running_mean, running_var
        inputs = x, residual, weight, bias
        y, statistics, bits = _normalize(*inputs, *running, num_batches_tracked, options, bits_kind)
        remember(ctx, inputs, (statistics, bits), running, options, bits_kind)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *gradients(ctx, dy), None, None, None, None


# torch.autograd.Function.apply without its look for torch.func's transforms, which `dispatch` has done.
_apply: Any = super(torch.autograd.Function, BatchNormFunction).apply


def batch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    options: Options,
) -> Tensor:
    """Returns y through the kernels; normalizing with the batch's statistics moves the running ones, if any."""
    if options.prepared is not None and is_intercepted():
        options = options._replace(prepared=None)
    given = weight, bias, running_mean, running_var, num_batches_tracked, options
    intercepted = options.prepared is None
    bits_kind = None
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        x = savable(x, intercepted)
        if residual is not None and options.activation is not None:
            residual = savable(residual, intercepted)
        if not intercepted:
            return _apply(x, residual, *given)  # type: ignore[no-any-return]
        bits_kind = kind_of(x) if saves_bits(residual, options) else None
    return _normalize(x, residual, *given, bits_kind)[0]
