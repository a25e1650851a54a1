"""Other libraries' norms, by torch.nn.functional's signatures."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd import Function

from perf.ops import Functions


def liger() -> Functions:
    """Its RMSNorm computing in fp32 throughout, as torch does, and leaving dy as it is.

    The modulated one rounds x_hat · weight to x's type, as torch does; releases before 0.8.1 lack it.
    """
    ops = importlib.import_module("liger_kernel.transformers.functional")
    own: dict[str, Any] = {"offset": 0.0, "casting_mode": "gemma", "in_place": False}
    rms_norm, add_rms_norm = partial(ops.liger_rms_norm, **own), partial(ops.liger_fused_add_rms_norm, **own)
    functions: dict[str, Callable[..., Any]] = {
        "layer_norm": lambda x, shape, weight, bias, eps: ops.liger_layer_norm(x, weight, bias, eps),
        "rms_norm": lambda x, shape, weight, eps: rms_norm(x, weight, eps),
        "rms_norm_residual": lambda x, residual, shape, weight, eps: add_rms_norm(x, residual, weight, eps),
        "group_norm": lambda x, n, weight, bias, eps: ops.liger_group_norm(x, weight, bias, x.shape[1], n, eps),
    }
    if hasattr(ops, "liger_modulated_rms_norm"):
        modulated = partial(ops.liger_modulated_rms_norm, **own)
        functions["rms_norm_modulated"] = lambda x, shape, weight, scale, shift, eps: modulated(
            x, weight, scale, shift, eps
        )
    return functions


def quack() -> Functions:
    """Its LayerNorm, which has both passes but no autograd, refuses weights that are not fp32."""
    ops = importlib.import_module("quack.rmsnorm")

    class LayerNorm(Function):
        @staticmethod
        def forward(ctx: Any, x: Any, shape: tuple[int, ...], weight: Any, bias: Any, eps: float) -> Any:
            if not any(ctx.needs_input_grad):
                return ops.layernorm_fwd(x, weight, bias, eps=eps)
            y, rstd, mean = ops.layernorm_fwd(x, weight, bias, eps=eps, return_rstd=True, return_mean=True)
            ctx.save_for_backward(x, weight, rstd, mean)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Any) -> Any:
            x, weight, rstd, mean = ctx.saved_tensors
            dx, dw, db = ops.layernorm_bwd(x, weight, dy, rstd, mean, has_bias=True)
            return dx, None, dw, db, None

    return {
        "layer_norm": LayerNorm.apply,
        "rms_norm": lambda x, shape, weight, eps: ops.rmsnorm(x, weight, eps=eps),
        "rms_norm_residual": lambda x, residual, shape, weight, eps: ops.rmsnorm(
            x, weight, residual=residual, eps=eps, prenorm=True
        ),
    }


def flash_linear_attention() -> Functions:
    ops = importlib.import_module("fla.modules.layernorm")
    gated = importlib.import_module("fla.modules.fused_norm_gate")

    return {
        "layer_norm": lambda x, shape, weight, bias, eps: ops.layer_norm(x, weight, bias, eps=eps),
        "rms_norm": lambda x, shape, weight, eps: ops.rms_norm(x, weight, None, eps=eps),
        "layer_norm_residual": lambda x, residual, shape, weight, bias, eps: ops.layer_norm(
            x, weight, bias, residual=residual, eps=eps, prenorm=True
        ),
        "rms_norm_residual": lambda x, residual, shape, weight, eps: ops.rms_norm(
            x, weight, None, residual=residual, eps=eps, prenorm=True
        ),
        "rms_norm_gated": lambda x, gate, shape, weight, eps: gated.rms_norm_gated(
            x, gate, weight, None, activation="silu", eps=eps
        ),
    }


def mamba_ssm() -> Functions:
    """Its gated RMSNorm takes the groups of a token in one row, and their weights too."""
    ops = importlib.import_module("mamba_ssm.ops.triton.layernorm_gated")

    def gated(norm_before_gate: bool) -> Callable[..., Any]:
        def rms_norm(x: Any, gate: Any, shape: tuple[int, ...], weight: Any, eps: float) -> Any:
            own: dict[str, Any] = {"eps": eps, "norm_before_gate": norm_before_gate}
            if weight.dim() == 1:
                return ops.rmsnorm_fn(x, weight, None, z=gate, **own)
            tokens = [tensor.flatten(-2) for tensor in (x, gate)]
            y = ops.rmsnorm_fn(tokens[0], weight.flatten(), None, z=tokens[1], group_size=shape[-1], **own)
            return y.view_as(x)

        return rms_norm

    return {"rms_norm_gated": gated(norm_before_gate=True), "rms_norm_gate_first": gated(norm_before_gate=False)}


def apex() -> Functions:
    """Its BatchNorm and its GroupNorm, of channels-last images, are parts that apex is mostly built without."""
    ops = importlib.import_module("apex.normalization.fused_layer_norm")
    functions: dict[str, Callable[..., Any]] = {
        "layer_norm": lambda x, shape, weight, bias, eps: ops.fused_layer_norm_affine(x, weight, bias, shape, eps),
        "rms_norm": lambda x, shape, weight, eps: ops.fused_rms_norm_affine(x, weight, shape, eps),
    }
    if _is_built("bnp"):
        functions["batch_norm"] = functions["batch_norm_eval"] = _batch_norm_nhwc(relu=False)
        functions["batch_norm_add_relu"] = _batch_norm_nhwc(relu=True)
    if _is_built("group_norm_cuda"):
        functions |= {"group_norm": _group_norm_nhwc(""), "group_norm_silu": _group_norm_nhwc("silu")}
    return functions


def _is_built(extension: str) -> bool:
    try:
        importlib.import_module(extension)
    except ImportError:
        return False
    return True


class _Layers:
    """Holds a module for each weight, made by `build` at the first call with it."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build
        self._layers: dict[int, Any] = {}

    def of(self, weight: Any, bias: Any, *arguments: Any) -> Any:
        layer = self._layers.get(id(weight))
        if layer is None:
            layer = self._layers[id(weight)] = self._build(weight.numel(), *arguments)
            layer._parameters |= {"weight": weight, "bias": bias}
        return layer


def _batch_norm_nhwc(relu: bool) -> Callable[..., Any]:
    """Returns apex's BatchNorm2d_NHWC, which takes (N, H, W, C), as a function; with `relu` it adds a residual."""
    module = importlib.import_module("apex.contrib.groupbn.batch_norm").BatchNorm2d_NHWC

    def build(channels: int, mean: Any, var: Any, training: bool, momentum: float, eps: float) -> Any:
        layer = module(channels, fuse_relu=relu)
        layer._buffers |= {"running_mean": mean, "running_var": var}
        layer.momentum, layer.eps = momentum, eps
        return layer.train(training)

    layers = _Layers(build)

    def batch_norm(*arguments: Any) -> Any:
        *tensors, mean, var, weight, bias, training, momentum, eps = arguments
        layer = layers.of(weight, bias, mean, var, training, momentum, eps)
        return layer(*map(_nhwc, tensors)).permute(0, 3, 1, 2)

    return batch_norm


def _nhwc(x: Any) -> Any:
    """Returns x in NHWC. The module checks the type, but not this: it would read 4 channels from whatever is there."""
    if x.dim() != 4 or x.shape[1] % 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError("BatchNorm2d_NHWC takes channels-last images, of a multiple of 4 channels")
    return x.permute(0, 2, 3, 1)


def _group_norm_nhwc(activation: str) -> Callable[..., Any]:
    """Returns apex's GroupNorm of channels-last images as a function. The module leaves other inputs to torch."""
    module = importlib.import_module("apex.contrib.group_norm").GroupNorm
    layers = _Layers(lambda channels, groups, eps: module(groups, channels, eps, act=activation))

    def group_norm(x: Any, num_groups: int, weight: Any, bias: Any, eps: float) -> Any:
        layer = layers.of(weight, bias, num_groups, eps)
        if not layer._check_legality(x):
            raise ValueError("apex's GroupNorm leaves this input to torch")
        return layer(x)

    return group_norm


def flag_gems() -> Functions:
    """Its functions themselves: `use_gems` would put them in place of torch's own for every contender.

    No op with a residual: skip_layer_norm has neither the sum nor a backward, fused_add_rms_norm overwrites its inputs.
    """
    gems = importlib.import_module("flag_gems")
    every_gradient = [True, True, True]

    class LayerNorm(Function):
        @staticmethod
        def forward(ctx: Any, x: Any, shape: tuple[int, ...], weight: Any, bias: Any, eps: float) -> Any:
            y, mean, rstd = gems.layer_norm(x, shape, weight, bias, eps)
            ctx.save_for_backward(x, mean, rstd, weight, bias)
            ctx.shape = shape
            return y

        @staticmethod
        def backward(ctx: Any, dy: Any) -> Any:
            x, mean, rstd, weight, bias = ctx.saved_tensors
            dx, dw, db = gems.layer_norm_backward(dy, x, ctx.shape, mean, rstd, weight, bias, every_gradient)
            return dx, None, dw, db, None

    class BatchNorm(Function):
        @staticmethod
        def forward(ctx: Any, x: Any, mean: Any, var: Any, weight: Any, bias: Any, *options: Any) -> Any:
            y, save_mean, save_invstd = gems.batch_norm(x, weight, bias, mean, var, *options)
            ctx.save_for_backward(x, weight, mean, var, save_mean, save_invstd)
            ctx.training, _, ctx.eps = options
            return y

        @staticmethod
        def backward(ctx: Any, dy: Any) -> Any:
            x, *others = ctx.saved_tensors
            dx, dw, db = gems.batch_norm_backward(dy, x, *others, ctx.training, ctx.eps, every_gradient)
            return dx, None, None, dw, db, None, None, None

    class GroupNorm(Function):
        @staticmethod
        def forward(ctx: Any, x: Any, num_groups: int, weight: Any, bias: Any, eps: float) -> Any:
            ctx.sizes = (*x.shape[:2], x[0, 0].numel(), num_groups)
            y, mean, rstd = gems.group_norm(x, weight, bias, *ctx.sizes, eps)
            ctx.save_for_backward(x, mean, rstd, weight)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Any) -> Any:
            dx, dw, db = gems.group_norm_backward(dy, *ctx.saved_tensors, *ctx.sizes, every_gradient)
            return dx, None, dw, db, None

    functions: dict[str, Callable[..., Any]] = {
        "layer_norm": LayerNorm.apply,
        "rms_norm": gems.rms_norm,
        "batch_norm": BatchNorm.apply,
        "batch_norm_eval": BatchNorm.apply,
    }
    if hasattr(gems, "group_norm_backward"):
        functions["group_norm"] = GroupNorm.apply
    if hasattr(gems, "instance_norm"):
        functions["instance_norm"] = lambda x, mean, var, weight, bias, *options: gems.instance_norm(
            x, weight, bias, mean, var, *options
        )
    return functions
