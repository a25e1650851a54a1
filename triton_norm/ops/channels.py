"""BatchNorm: launches, `torch.library` operators with their fakes, autograd."""

import functools
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triton_norm import reference, tuning
from triton_norm.ops.launch import INTERPRETED, launch, multiprocessors
from triton_norm.ops.layout import Sweep, View, as_view, dense_like, sweep
from triton_norm.ops.library import contiguous, name_of, nothing, operator, parameter_gradients, triton_dtype
from triton_norm.reference import compute_dtype


@functools.cache
def _kernels() -> Any:
    from triton_norm.kernels import channels

    return channels


def _launch_sweep(
    kernel: Any, swept: Sweep, x: View, pointers: Sequence[Tensor | None], *others: View, **constants: Any
) -> None:
    """A kernel whose programs share x's channels and groups; strides of `others` come before x's."""
    dtype = x.tensor.dtype
    strides = (stride for view in (*others, x) for stride in swept.strides(view))
    launch(
        kernel,
        tuning.channels(kernel.__name__, swept.lanes, swept.vector, name_of(dtype), swept.channels_last, INTERPRETED),
        lambda config: swept.n_programs,
        x.tensor.device,
        *pointers,
        *swept.geometry,
        *strides,
        V=swept.vector,
        LANES=swept.lanes,
        AXIS=0 if swept.channels_last else None,
        COMPUTE=triton_dtype(compute_dtype(x.tensor)),
        **constants,
    )


def _launch_finalise(kernel: Any, device: torch.device, n_channels: int, *arguments: Any, **constants: Any) -> None:
    launch(
        kernel,
        tuning.channels_finalise(kernel.__name__),
        lambda config: -(-n_channels // config["BLOCK_C"]),
        device,
        *arguments,
        **constants,
    )


def _partials(swept: Sweep, x: Tensor, kinds: int) -> tuple[Tensor, ...]:
    """What each split of each channel leaves, so many kinds of it."""
    return torch.empty(kinds, swept.n_splits, swept.n_channels, dtype=compute_dtype(x), device=x.device).unbind()


def _per_channel(x: Tensor) -> Tensor:
    return torch.empty(x.shape[1], dtype=compute_dtype(x), device=x.device)


def _apply(
    swept: Sweep,
    x: View,
    mean: Tensor,
    rest: Tensor | None,
    rstd_or_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    from_variance: bool,
) -> Tensor:
    y = dense_like(x.tensor)
    pointers = (x.tensor, y, mean, rest, rstd_or_var, contiguous(weight), contiguous(bias))
    _launch_sweep(_kernels().channels_apply_kernel, swept, x, pointers, EPS=eps, FROM_VARIANCE=from_variance)
    return y


def _in_two_floats(value: float) -> tuple[float, float]:
    """value as a sum of two fp32 numbers: a launch passes floats as fp32."""
    high: float = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


def _batch_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    view = as_view(x)
    swept = sweep(view, multiprocessors(x.device))
    partials = _partials(swept, x, kinds=3)
    _launch_sweep(_kernels().channels_statistics_kernel, swept, view, (view.tensor, *partials))
    mean, rest, rstd = _per_channel(x), _per_channel(x), _per_channel(x)
    moved_mean, moved_var = contiguous(running_mean), contiguous(running_var)
    if momentum is None and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    _launch_finalise(
        _kernels().channels_finalise_statistics_kernel,
        x.device,
        swept.n_channels,
        *partials,
        mean,
        rest,
        rstd,
        moved_mean,
        moved_var,
        num_batches_tracked,
        swept.n_channels,
        swept.n_splits,
        swept.groups_per_split * swept.elements_per_group,
        swept.n_groups * swept.elements_per_group,
        *_in_two_floats(momentum or 0.0),
        EPS=eps,
        CUMULATIVE=momentum is None,
        COMPUTE=triton_dtype(compute_dtype(x)),
    )
    for running, moved in ((running_mean, moved_mean), (running_var, moved_var)):
        if running is not None and moved is not None and moved is not running:
            running.copy_(moved)
    return _apply(swept, view, mean, rest, rstd, weight, bias, eps, from_variance=False), mean, rstd


def _batch_norm_inference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, eps: float
) -> Tensor:
    view = as_view(x)
    swept = sweep(view, multiprocessors(x.device))
    mean, var = running_mean.contiguous(), running_var.contiguous()
    return _apply(swept, view, mean, None, var, weight, bias, eps, from_variance=True)


def _gradients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias without contents; of no elements where not wanted."""
    return dense_like(x) if wanted[0] else nothing(x), *parameter_gradients(weight, bias, x, wanted)


def _batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd_or_var: Tensor,
    training: bool,
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """rstd_or_var: the batch's rstd in training, otherwise the running variance."""
    dx, dweight, dbias = _gradients(x, weight, bias, wanted)
    x_view, dy_view = as_view(x), as_view(dy, like=x)
    swept = sweep(x_view, multiprocessors(x.device), dy_view)
    constants = {"DY_LANE_STRIDE": swept.lane_stride(dy_view)}
    weight, mean, rstd_or_var = contiguous(weight), mean.contiguous(), rstd_or_var.contiguous()
    dx_now = dx if wanted[0] and not training else None
    sums = _partials(swept, x, kinds=2) if training or dweight.numel() or dbias.numel() else (None, None)
    _launch_sweep(
        _kernels().channels_backward_reduce_kernel,
        swept,
        x_view,
        (dy_view.tensor, x_view.tensor, dx_now, mean, rstd_or_var, weight, *sums),
        dy_view,
        EPS=eps,
        FROM_VARIANCE=not training,
        **constants,
    )
    if sums[0] is None:
        return dx, dweight, dbias
    means = (_per_channel(x), _per_channel(x)) if training and wanted[0] else (None, None)
    _launch_finalise(
        _kernels().channels_backward_finalise_kernel,
        x.device,
        swept.n_channels,
        *sums,
        rstd_or_var,
        dweight if dweight.numel() else None,
        dbias if dbias.numel() else None,
        *means,
        swept.n_channels,
        swept.n_splits,
        swept.n_groups * swept.elements_per_group,
        EPS=eps,
        FROM_VARIANCE=not training,
        COMPUTE=triton_dtype(compute_dtype(x)),
    )
    if training and wanted[0]:
        pointers = (dy_view.tensor, x_view.tensor, dx, mean, rstd_or_var, weight, *means)
        _launch_sweep(_kernels().channels_backward_apply_kernel, swept, x_view, pointers, dy_view, **constants)
    return dx, dweight, dbias


def _fake_batch_norm_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return dense_like(x), _per_channel(x), _per_channel(x)


def _fake_batch_norm_inference(x: Tensor, *_: Any) -> Tensor:
    return dense_like(x)


def _fake_batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd_or_var: Tensor,
    training: bool,
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(x, weight, bias, wanted)


batch_norm_forward_op = operator(
    "batch_norm_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, float? momentum, float eps) -> (Tensor, Tensor, Tensor)",
    _batch_norm_forward,
    _fake_batch_norm_forward,
)
batch_norm_inference_op = operator(
    "batch_norm_inference(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, float eps) "
    "-> Tensor",
    _batch_norm_inference,
    _fake_batch_norm_inference,
)
batch_norm_backward_op = operator(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd_or_var, "
    "bool training, float eps, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _batch_norm_backward,
    _fake_batch_norm_backward,
)


class BatchNormFunction(torch.autograd.Function):
    """First order through the kernels; a backward that is itself differentiated goes through `reference`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        training: bool,
        momentum: float | None,
        eps: float,
    ) -> Tensor:
        if training:
            y, mean, rstd_or_var = batch_norm_forward_op(
                x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps
            )
        else:
            y = batch_norm_inference_op(x, weight, bias, running_mean, running_var, eps)
            mean, rstd_or_var = running_mean, running_var
        ctx.save_for_backward(x, weight, bias, mean, rstd_or_var)
        ctx.training, ctx.eps = training, eps
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd_or_var = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        unasked = (None,) * 6
        if torch.is_grad_enabled():

            def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                return reference.batch_norm(x, mean, rstd_or_var, weight, bias, ctx.training, ctx.eps)

            return *reference.gradients(forward, (x, weight, bias), dy, wanted), *unasked
        grads = batch_norm_backward_op(dy, x, weight, bias, mean, rstd_or_var, ctx.training, ctx.eps, wanted)
        return *(grad if asked else None for grad, asked in zip(grads, wanted, strict=True)), *unasked


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """Through the kernels; `training` normalizes with the batch's statistics and moves the running ones, if any."""
    tensors = (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return BatchNormFunction.apply(  # type: ignore
            x, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps
        )
    if training:
        return batch_norm_forward_op(x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)[0]  # type: ignore
    return batch_norm_inference_op(x, weight, bias, running_mean, running_var, eps)  # type: ignore
