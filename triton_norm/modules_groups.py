"""Replaces the forward of torch.nn's GroupNorm and InstanceNorm layers, as modules.py does for the others."""

import warnings
from typing import Any

from torch import Tensor, nn
from torch.overrides import has_torch_function_unary, has_torch_function_variadic

from triton_norm import explaining, functional_groups, symbolic
from triton_norm.dispatch import Explanation
from triton_norm.modules import changed, tensors_of, weight_and_bias_of
from triton_norm.specs import BatchNormTensors, GroupNormOptions, Inputs, InstanceNormOptions
from triton_norm.symbolic import REVERTED


class GroupNorm(symbolic.Scriptable, nn.GroupNorm):
    """Computes y = f((x − mean) / sqrt(var + eps) · weight + bias + residual) for each group of channels of a sample,
    as torch.nn.GroupNorm, whose arguments it has.

    forward also takes `residual`, `activation` and `negative_slope` of `triton_norm.group_norm`.
    """

    original = nn.GroupNorm

    def _call(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Returns the fields of Inputs and those of GroupNormOptions."""
        weight, bias = weight_and_bias_of(self)
        return (input, residual, weight, bias), (self.num_groups, self.eps, activation, negative_slope)

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> Tensor:
        if REVERTED in self.__dict__ or has_torch_function_unary(input):
            instead = symbolic.instead(self, GroupNorm.forward, input)
            if instead is not None:
                fused = residual, activation, negative_slope
                return instead(input, **changed(GroupNorm.forward, fused))  # type: ignore[no-any-return]
        tensors, options = self._call(input, residual, activation, negative_slope)
        if has_torch_function_variadic(*tensors):
            return functional_groups.overridable_group_norm(tensors, options)
        return functional_groups.normalize_groups(tensors, options)

    def explain_call(self, input: Tensor, **fused: Any) -> Explanation:
        tensors, options = self._call(input, **fused)
        return explaining.explain_group_norm(Inputs._make(tensors), GroupNormOptions._make(options))


class _InstanceNorm(symbolic.Scriptable, nn.modules.instancenorm._InstanceNorm):
    """Implements the forward of the three layers; torch's own `_check_input_dim` checks the rank."""

    def _refuse_features(self, input: Tensor, axis: int) -> None:
        """Raises ValueError, or warns if the layer has no parameters, as torch's, for an axis of another length."""
        if self.affine:
            raise ValueError(
                f"expected input's size at dim={axis} to match num_features"
                f" ({self.num_features}), but got: {input.size(axis)}."
            )
        warnings.warn(
            f"input's size at dim={axis} does not match num_features. "
            "You can silence this warning by not passing in num_features, "
            "which is not used because affine=False",
            stacklevel=4,
        )

    def _call(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Returns the fields of BatchNormTensors and those of InstanceNormOptions. Unbatched input is one sample."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        axis = input.dim() - self._get_no_batch_dim()  # type: ignore[no-untyped-call]
        if input.size(axis) != self.num_features:
            self._refuse_features(input, axis)
        if axis == 0:
            input = input.unsqueeze(0)
            residual = residual.unsqueeze(0) if isinstance(residual, Tensor) else residual
        weight, bias, running_mean, running_var, _ = tensors_of(self, counts=False)
        momentum = 0.0 if self.momentum is None else self.momentum
        uses_input = bool(self.training or not self.track_running_stats)
        tensors = input, residual, weight, bias, running_mean, running_var, None
        return tensors, (uses_input, momentum, self.eps, activation, negative_slope)

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> Tensor:
        if REVERTED in self.__dict__ or has_torch_function_unary(input):
            instead = symbolic.instead(self, _InstanceNorm.forward, input)
            if instead is not None:
                fused = residual, activation, negative_slope
                return instead(input, **changed(_InstanceNorm.forward, fused))  # type: ignore[no-any-return]
        tensors, options = self._call(input, residual, activation, negative_slope)
        if has_torch_function_variadic(*tensors):
            y = functional_groups.overridable_instance_norm(tensors, options)
        else:
            y = functional_groups.normalize_instances(tensors, options)
        x, *_ = tensors
        return y if x is input else y.squeeze(0)

    def explain_call(self, input: Tensor, **fused: Any) -> Explanation:
        tensors, options = self._call(input, **fused)
        return explaining.explain_instance_norm(BatchNormTensors._make(tensors), InstanceNormOptions._make(options))


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """Computes y = f((x − mean) / sqrt(var + eps) · weight + bias + residual) for each channel of each sample, as
    torch.nn.InstanceNorm1d, whose arguments it has. forward also takes `residual`, `activation` and `negative_slope` of
    `triton_norm.instance_norm`."""

    original = nn.InstanceNorm1d


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """Computes y = f((x − mean) / sqrt(var + eps) · weight + bias + residual) for each channel of each sample, as
    torch.nn.InstanceNorm2d, whose arguments it has. forward also takes `residual`, `activation` and `negative_slope` of
    `triton_norm.instance_norm`."""

    original = nn.InstanceNorm2d


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """Computes y = f((x − mean) / sqrt(var + eps) · weight + bias + residual) for each channel of each sample, as
    torch.nn.InstanceNorm3d, whose arguments it has. forward also takes `residual`, `activation` and `negative_slope` of
    `triton_norm.instance_norm`."""

    original = nn.InstanceNorm3d
