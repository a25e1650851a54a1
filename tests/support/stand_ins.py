"""Modules of other libraries that are not there: each has its own signatures and results, by torch's functions."""

import torch
from torch import nn
from torch.nn import functional


def layer_norm_of_sum(x, residual, weight, bias, eps):
    total = x + residual
    return functional.layer_norm(total, weight.shape, weight, bias, eps), total


def rms_norm_of_sum(x, residual, weight, eps):
    total = x + residual
    return functional.rms_norm(total, weight.shape, weight, eps), total


def layer_norm_statistics(x, eps):
    var, mean = torch.var_mean(x, -1, correction=0)
    return mean, torch.rsqrt(var + eps)


def layer_norm_gradients(dy, x, mean, rstd, weight, bias):
    return torch.ops.aten.native_layer_norm_backward(
        dy, x, weight.shape, mean[:, None], rstd[:, None], weight, bias, [True] * 3
    )


def liger():
    def liger_layer_norm(X, W, B, eps):
        return functional.layer_norm(X, W.shape, W, B, eps)

    def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert (offset, casting_mode, in_place) == (0.0, "gemma", False)
        return functional.rms_norm(X, W.shape, W, eps)

    def liger_fused_add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert (offset, casting_mode, in_place) == (0.0, "gemma", False)
        return rms_norm_of_sum(X, R, W, eps)

    def liger_modulated_rms_norm(X, W, scale, shift=None, eps=1e-6, offset=0.0, casting_mode="llama", in_place=True):
        assert (offset, casting_mode, in_place) == (0.0, "gemma", False)
        scale, shift = (own.repeat_interleave(X.shape[1], 0).view_as(X) for own in (scale, shift))
        return functional.rms_norm(X, W.shape, W, eps) * (1.0 + scale) + shift

    def liger_group_norm(X, affine_scaling_weight, affine_shifting_bias, num_channels, num_groups, eps):
        assert num_channels == X.shape[1]
        return functional.group_norm(X, num_groups, affine_scaling_weight, affine_shifting_bias, eps)

    return {"liger_kernel.transformers.functional": locals()}


def quack():
    def rmsnorm(
        x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False,
        weight_offset=0.0,
    ):  # fmt: skip
        assert prenorm == (residual is not None)
        return (
            rms_norm_of_sum(x, residual, weight, eps) if prenorm else functional.rms_norm(x, weight.shape, weight, eps)
        )

    def layernorm_fwd(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
        if weight.dtype != torch.float32:
            raise AssertionError("Weight must be float32")
        y = functional.layer_norm(x, weight.shape, weight, bias, eps)
        mean, rstd = layer_norm_statistics(x, eps)
        assert return_rstd == return_mean
        return (y, rstd, mean) if return_rstd else y

    def layernorm_bwd(x, weight, dout, rstd, mean, has_bias=True):
        assert has_bias
        return layer_norm_gradients(dout, x, mean, rstd, weight, weight)

    return {"quack.rmsnorm": locals()}


def flash_linear_attention():
    def layer_norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False, is_rms_norm=False):
        assert prenorm == (residual is not None)
        zero = torch.zeros_like(x) if residual is None else residual
        result = layer_norm_of_sum(x, zero, weight, bias, eps)
        return result if prenorm else result[0]

    def rms_norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False):
        assert bias is None
        assert prenorm == (residual is not None)
        zero = torch.zeros_like(x) if residual is None else residual
        result = rms_norm_of_sum(x, zero, weight, eps)
        return result if prenorm else result[0]

    def rms_norm_gated(
        x, g, weight, bias, activation="swish", residual=None, prenorm=False, residual_in_fp32=False, eps=1e-6
    ):
        assert activation in ("swish", "silu")
        assert bias is residual is None
        return functional.rms_norm(x, weight.shape, weight, eps) * functional.silu(g)

    norms = {"layer_norm": layer_norm, "rms_norm": rms_norm}
    return {"fla.modules.layernorm": norms, "fla.modules.fused_norm_gate": {"rms_norm_gated": rms_norm_gated}}


def mamba_ssm():
    def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
        assert bias is None
        assert weight.shape == x.shape[-1:]
        gate = functional.silu(z)
        groups = (x if norm_before_gate else x * gate).unflatten(-1, (-1, group_size or x.shape[-1]))
        y = functional.rms_norm(groups, groups.shape[-1:], None, eps).view_as(x) * weight
        return y * gate if norm_before_gate else y

    return {"mamba_ssm.ops.triton.layernorm_gated": locals()}


def apex():
    def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
        return functional.layer_norm(input, normalized_shape, weight, bias, eps)

    def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
        return functional.rms_norm(input, normalized_shape, weight, eps)

    return {"apex.normalization.fused_layer_norm": locals(), "fused_layer_norm_cuda": {}}


def apex_with_extensions():
    class BatchNorm2d_NHWC(nn.modules.batchnorm._BatchNorm):
        def __init__(
            self, num_features, fuse_relu=False, bn_group=1, max_cta_per_sm=2, cta_launch_margin=12, multi_stream=False
        ):
            super().__init__(num_features)
            self.fuse_relu = fuse_relu

        def forward(self, x, z=None):
            assert x.is_contiguous()
            assert self.fuse_relu == (z is not None)
            y = functional.batch_norm(
                x.permute(0, 3, 1, 2), self.running_mean, self.running_var, self.weight, self.bias, self.training,
                self.momentum, self.eps,
            ).permute(0, 2, 3, 1)  # fmt: skip
            return functional.relu(y + z) if self.fuse_relu else y

    class GroupNorm(nn.Module):
        def __init__(self, num_groups, num_channels, eps=1e-5, affine=True, device=None, dtype=None, act=""):
            super().__init__()
            self.num_groups, self.eps, self.act = num_groups, eps, act
            self.weight = self.bias = nn.Parameter(torch.empty(num_channels))

        def _check_legality(self, input):
            return input.shape[1] == 128 and input.is_contiguous(memory_format=torch.channels_last)

        def forward(self, input):
            y = functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
            return functional.silu(y) if self.act == "silu" else y

    modules = {"bnp": {}, "apex.contrib.groupbn.batch_norm": {"BatchNorm2d_NHWC": BatchNorm2d_NHWC}}
    return {**apex(), **modules, "group_norm_cuda": {}, "apex.contrib.group_norm": {"GroupNorm": GroupNorm}}


def flag_gems():
    def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
        return functional.layer_norm(input, normalized_shape, weight, bias, eps), *layer_norm_statistics(input, eps)

    def layer_norm_backward(grad_out, input, normalized_shape, mean, rstd, weight=None, bias=None, output_mask=None):
        assert output_mask == [True] * 3
        return layer_norm_gradients(grad_out, input, mean, rstd, weight, bias)

    def rms_norm(x, normalized_shape, weight, eps=1e-5):
        return functional.rms_norm(x, normalized_shape, weight, eps)

    def batch_norm(
        input, weight=None, bias=None, running_mean=None, running_var=None, training=False, momentum=0.1, eps=1e-05
    ):
        return torch.native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)

    def batch_norm_backward(
        grad_out, input, weight=None, running_mean=None, running_var=None, save_mean=None, save_invstd=None,
        train=False, eps=1e-05, output_mask=None,
    ):  # fmt: skip
        return torch.ops.aten.native_batch_norm_backward(
            grad_out, input, weight, running_mean, running_var, save_mean, save_invstd, train, eps, output_mask
        )

    def group_norm(input, weight, bias, N, C, HxW, group, eps=1e-05):
        return torch.native_group_norm(input.contiguous(), weight, bias, N, C, HxW, group, eps)

    def group_norm_backward(grad_out, input, mean, rstd, weight, N, C, HxW, group, output_mask):
        return torch.ops.aten.native_group_norm_backward(
            grad_out.contiguous(), input.contiguous(), mean, rstd, weight, N, C, HxW, group, output_mask
        )

    def instance_norm(
        input, weight=None, bias=None, running_mean=None, running_var=None, use_input_stats=True, momentum=0.1,
        eps=1e-5, cudnn_enable=False,
    ):  # fmt: skip
        return functional.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)

    return {"flag_gems": locals()}
