"""Folds a BatchNorm in evaluation, a fixed scale and shift per channel, into the layer before it."""

import copy
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import fusion, parametrize

from triton_norm import modules

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm, modules.SyncBatchNorm, *modules.BATCH_NORMS)
_KNOWN = {*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear, *_BATCH_NORMS}


def fold_batch_norm(layer: nn.Module, batch_norm: nn.Module) -> nn.Module:
    r"""Returns a copy of `layer` that computes batch_norm(layer(x)) in evaluation, with no BatchNorm left to launch:

    weight' = weight · s and bias' = (bias − running_mean) · s + bias_bn per output channel, s = weight_bn /
    sqrt(running_var + eps).

    Args:
        layer: Conv1d to 3d, ConvTranspose1d to 3d or Linear, in evaluation mode.
        batch_norm: torch's or this library's BatchNorm1d to 3d or SyncBatchNorm, in evaluation mode, with running
            statistics, and as many features as the layer has output channels. After a Linear, inputs must be [N, C], so
            that features are channels.

    Returns:
        a module of the layer's class and dtypes, with a bias. The arguments are unchanged.

    Raises:
        TypeError: another kind of layer, or a subclass or a module with a forward of its own, which may compute more.
        RuntimeError: training mode, different channel counts, no running statistics, a parametrized layer, two devices.

    Source: torch.nn.utils.fusion, which can't fold transposed convolutions of several groups.
    """
    if not isinstance(batch_norm, nn.modules.batchnorm._BatchNorm):
        raise TypeError(f"fold_batch_norm(): argument 'batch_norm' must be BatchNorm, not {type(batch_norm).__name__}")
    if not isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)):
        raise TypeError(
            f"fold_batch_norm(): argument 'layer' must be a convolution or Linear, not {type(layer).__name__}"
        )
    _check(layer, batch_norm)
    _check_channels(layer, batch_norm)
    if isinstance(layer, nn.Linear):
        return fusion.fuse_linear_bn_eval(layer, _with_parameters(batch_norm))
    if isinstance(layer, _TRANSPOSED) and layer.groups > 1:
        return _fold_grouped_transposed(layer, batch_norm)
    return fusion.fuse_conv_bn_eval(layer, batch_norm, transpose=isinstance(layer, _TRANSPOSED))


def _check(layer: nn.Module, batch_norm: nn.modules.batchnorm._BatchNorm) -> None:
    for name, module in (("layer", layer), ("batch_norm", batch_norm)):
        if not _computes_as_known(module):
            raise TypeError(
                f"fold_batch_norm(): the forward of argument '{name}', of {type(module).__name__}, may compute "
                "something else than that of the class it is derived from"
            )
        if module.training:
            raise RuntimeError(f"fold_batch_norm(): {name} is in training mode; call {name}.eval() first")
    if batch_norm.running_mean is None or batch_norm.running_var is None:
        raise RuntimeError("fold_batch_norm(): batch_norm keeps no running statistics, and uses each batch's own")
    if parametrize.is_parametrized(layer):
        raise RuntimeError("fold_batch_norm(): layer is parametrized; call remove_parametrizations first")
    if any(is_lazy(tensor) for tensor in (*layer.parameters(), *batch_norm.parameters(), *batch_norm.buffers())):
        raise RuntimeError("fold_batch_norm(): layer and batch_norm must have their parameters; call them once first")


def _check_channels(layer: Any, batch_norm: nn.modules.batchnorm._BatchNorm) -> None:
    n_channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if n_channels != batch_norm.num_features:
        raise RuntimeError(
            f"fold_batch_norm(): layer has {n_channels} output channels (weight of shape {list(layer.weight.shape)}), "
            f"but batch_norm has {batch_norm.num_features} features"
        )
    for name in ("running_mean", "running_var", "weight", "bias"):
        tensor = getattr(batch_norm, name)
        if tensor is None:
            continue
        if tensor.numel() != n_channels:
            raise RuntimeError(
                f"fold_batch_norm(): batch_norm.{name} should contain {n_channels} elements, one for each output "
                f"channel of layer, but is of shape {list(tensor.shape)}"
            )
        if tensor.device != layer.weight.device:
            raise RuntimeError(
                "fold_batch_norm(): expected layer and batch_norm to be on the same device, but layer is on "
                f"{layer.weight.device} and batch_norm.{name} is on {tensor.device}"
            )


def _computes_as_known(module: nn.Module) -> bool:
    """Decides whether the forward is that of a known class, and for a convolution also `_conv_forward`."""
    base = next(cls for cls in type(module).__mro__ if cls in _KNOWN)
    names = ("forward", "_conv_forward") if issubclass(base, _CONVOLUTIONS) else ("forward",)
    return all(getattr(module, name) == MethodType(getattr(base, name), module) for name in names)


def _with_parameters(batch_norm: nn.modules.batchnorm._BatchNorm) -> nn.modules.batchnorm._BatchNorm:
    """Returns a copy with weight 1 and bias 0 in place of missing ones, which torch's function for Linear needs."""
    filled = copy.deepcopy(batch_norm)
    for name, fill in (("weight", torch.ones_like), ("bias", torch.zeros_like)):
        if getattr(filled, name) is None:
            setattr(filled, name, nn.Parameter(fill(filled.get_buffer("running_mean"))))
    return filled


def _fold_grouped_transposed(
    layer: nn.modules.conv._ConvTransposeNd, batch_norm: nn.modules.batchnorm._BatchNorm
) -> nn.Module:
    """Folds into a weight [in_channels, out_channels / groups, *kernel]."""
    folded = copy.deepcopy(layer)
    with torch.no_grad():
        assert batch_norm.running_mean is not None and batch_norm.running_var is not None
        scale = torch.rsqrt(batch_norm.running_var + batch_norm.eps)
        if batch_norm.weight is not None:
            scale = scale * batch_norm.weight
        shift = -batch_norm.running_mean if layer.bias is None else layer.bias - batch_norm.running_mean
        bias = shift * scale if batch_norm.bias is None else shift * scale + batch_norm.bias
        by_group = layer.weight.unflatten(0, (layer.groups, -1))
        by_output = scale.view(layer.groups, 1, -1, *(1 for _ in layer.kernel_size))
        weight = (by_group * by_output).flatten(0, 1).to(layer.weight.dtype)
        folded.weight = nn.Parameter(weight, layer.weight.requires_grad)
        folded.bias = nn.Parameter(bias.to(layer.weight.dtype), layer.weight.requires_grad)
    return folded
