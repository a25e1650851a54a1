"""Replaces the forward of torch.nn's normalization layers. Parameters, buffers and state_dicts are torch's own."""

import dataclasses
import operator
import sys
import warnings
from collections.abc import Iterator
from types import FrameType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import has_torch_function_unary, has_torch_function_variadic

from triton_norm import checks, distributed, explaining, functional, symbolic
from triton_norm.dispatch import Explanation
from triton_norm.functional_modulated import SILU
from triton_norm.specs import BatchNormOptions, BatchNormTensors
from triton_norm.symbolic import REVERTED

_weight, _weight_and_bias = operator.itemgetter("weight"), operator.itemgetter("weight", "bias")


def weight_of(module: nn.Module) -> Any:
    """Returns the weight from the module's dict, since torch.nn.Module's own look-up takes a Python call.

    The dict has no parametrized tensor; torch.nn.Module's look-up finds those.
    """
    if not is_compiling():
        try:
            return _weight(module._parameters)
        except KeyError:
            pass
    return module.weight


def weight_and_bias_of(module: nn.Module) -> tuple[Any, Any]:
    """Returns the weight and the bias, as `weight_of`."""
    if not is_compiling():
        try:
            return _weight_and_bias(module._parameters)  # type: ignore[no-any-return]
        except KeyError:
            pass
    return module.weight, module.bias


def tensors_of(module: Any, counts: bool) -> tuple[Any, ...]:
    """Returns a BatchNorm's weight, bias, running_mean, running_var, and its counter if it counts, as `weight_of`."""
    if not is_compiling():
        parameters, buffers = module._parameters, module._buffers
        try:
            counter = buffers["num_batches_tracked"] if counts else None  # an old pickle lacks it
            return parameters["weight"], parameters["bias"], buffers["running_mean"], buffers["running_var"], counter
        except KeyError:
            pass
    # An exported program has its tensors in the order in which they are read here: the counter comes last.
    of_channels = module.weight, module.bias, module.running_mean, module.running_var
    return *of_channels, module.num_batches_tracked if counts else None


def _modulated_or_overridden(module: Any, forward: Any, x: Tensor, fused: tuple[Any, ...]) -> Any:
    """Computes a LayerNorm or RMSNorm with a gate or a modulation, or one whose call a mode, a tensor or a tracer may
    override.

    Args:
        forward: the layer's forward, which is called.
        fused: values of its keyword arguments, in order.
    """
    instead = symbolic.instead(module, forward, x)
    if instead is not None:
        return instead(x, **changed(forward, fused))
    named = by_name(forward, fused) | {"weight": module.weight, "eps": module.eps}  # a tracer makes the weight a node
    if isinstance(module, nn.RMSNorm):
        return functional.rms_norm(x, module.normalized_shape, **named)
    return functional.layer_norm(x, module.normalized_shape, bias=module.bias, **named)


class LayerNorm(symbolic.Scriptable, nn.LayerNorm):
    """Computes y = (x − mean) / sqrt(var + eps) · weight + bias, as torch.nn.LayerNorm, whose arguments it has.

    forward also takes the keyword arguments of `triton_norm.layer_norm`.
    """

    original = nn.LayerNorm

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        residual_dtype: torch.dtype | None = None,
        weight_offset: float = 0.0,
        x_hat_dtype: torch.dtype | None = None,
        out_dtype: torch.dtype | None = None,
        gate: Tensor | None = None,
        gate_activation: str | None = SILU,
        gate_first: bool = False,
        product_dtype: torch.dtype | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual_gate: Tensor | None = None,
        head_weight: Tensor | None = None,
    ) -> Any:
        own = residual_dtype, weight_offset, x_hat_dtype, out_dtype
        if gate is None and scale is None and shift is None and residual_gate is None and head_weight is None:
            plain = product_dtype is None and gate_first is False and gate_activation is SILU
            if plain and REVERTED not in self.__dict__ and not has_torch_function_unary(input):
                tensors = input, residual, *weight_and_bias_of(self)
                if not has_torch_function_variadic(*tensors):
                    options = self.normalized_shape, self.eps, *own
                    return functional.normalize_rows("layer_norm", tensors, options)
        of_gate = gate, gate_activation, gate_first, product_dtype
        fused = residual, *own, *of_gate, scale, shift, residual_gate, head_weight
        return _modulated_or_overridden(self, LayerNorm.forward, input, fused)

    def explain_call(self, input: Tensor, **fused: Any) -> Explanation:
        arguments = (self.normalized_shape, self.weight, self.bias, self.eps)
        return explaining.explain(functional.layer_norm, input, *arguments, **fused)


class RMSNorm(symbolic.Scriptable, nn.RMSNorm):
    """Computes y = x / sqrt(E[x²] + eps) · weight, as torch.nn.RMSNorm, whose arguments it has.

    forward also takes the keyword arguments of `triton_norm.rms_norm`.
    """

    original = nn.RMSNorm

    def forward(
        self,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        residual_dtype: torch.dtype | None = None,
        weight_offset: float = 0.0,
        x_hat_dtype: torch.dtype | None = None,
        out_dtype: torch.dtype | None = None,
        gate: Tensor | None = None,
        gate_activation: str | None = SILU,
        gate_first: bool = False,
        product_dtype: torch.dtype | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual_gate: Tensor | None = None,
        head_weight: Tensor | None = None,
    ) -> Any:
        own = residual_dtype, weight_offset, x_hat_dtype, out_dtype
        if gate is None and scale is None and shift is None and residual_gate is None and head_weight is None:
            plain = product_dtype is None and gate_first is False and gate_activation is SILU
            if plain and REVERTED not in self.__dict__ and not has_torch_function_unary(x):
                tensors = x, residual, weight_of(self), None
                if not has_torch_function_variadic(*tensors):
                    options = self.normalized_shape, self.eps, *own
                    return functional.normalize_rows("rms_norm", tensors, options)
        of_gate = gate, gate_activation, gate_first, product_dtype
        fused = residual, *own, *of_gate, scale, shift, residual_gate, head_weight
        return _modulated_or_overridden(self, RMSNorm.forward, x, fused)

    def explain_call(self, x: Tensor, **fused: Any) -> Explanation:
        arguments = (self.normalized_shape, self.weight, self.eps)
        return explaining.explain(functional.rms_norm, x, *arguments, **fused)


class _BatchNorm(symbolic.Scriptable, nn.modules.batchnorm._BatchNorm):
    """Implements the forward of the three layers; torch's own `_check_input_dim` checks the rank."""

    def _call(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Returns the fields of BatchNormTensors and those of BatchNormOptions."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        momentum, training = self.momentum, self.training
        moves = training and self.track_running_stats
        weight, bias, running_mean, running_var, counter = tensors_of(self, moves)
        if momentum is None and counter is None:
            momentum = 0.0
        uses_batch = training or (running_mean is None and running_var is None)
        if training and not moves:
            running_mean = running_var = None
        tensors = input, residual, weight, bias, running_mean, running_var, counter
        return tensors, (bool(uses_batch), momentum, self.eps, activation, negative_slope)

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> Tensor:
        if REVERTED in self.__dict__ or has_torch_function_unary(input):
            instead = symbolic.instead(self, _BatchNorm.forward, input)
            if instead is not None:
                options = residual, activation, negative_slope
                return instead(input, **changed(_BatchNorm.forward, options))  # type: ignore[no-any-return]
        return _called(*self._call(input, residual, activation, negative_slope))

    def explain_call(self, input: Tensor, **fused: Any) -> Explanation:
        return self._explained(self._call(input, **fused))

    def _explained(self, call: tuple[Any, Any], whole: bool = True) -> Explanation:
        tensors, options = call
        return explaining.explain_batch_norm(BatchNormTensors._make(tensors), BatchNormOptions._make(options), whole)


def _called(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    if has_torch_function_variadic(*tensors):
        return functional.overridable_batch_norm(tensors, options)
    return functional.normalize_channels(tensors, options)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """Computes y = f((x − mean) / sqrt(var + eps) · weight + bias + residual), as torch.nn.BatchNorm1d, whose arguments
    it has. forward also takes `residual`, `activation` and `negative_slope` of `triton_norm.batch_norm`."""

    original = nn.BatchNorm1d


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Computes y = f((x − mean) / sqrt(var + eps) · weight + bias + residual), as torch.nn.BatchNorm2d, whose arguments
    it has. forward also takes `residual`, `activation` and `negative_slope` of `triton_norm.batch_norm`."""

    original = nn.BatchNorm2d


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """Computes y = f((x − mean) / sqrt(var + eps) · weight + bias + residual), as torch.nn.BatchNorm3d, whose arguments
    it has. forward also takes `residual`, `activation` and `negative_slope` of `triton_norm.batch_norm`."""

    original = nn.BatchNorm3d


BATCH_NORMS: frozenset[type[nn.Module]] = frozenset(
    {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm1d, BatchNorm2d, BatchNorm3d}
)
"""Only modules of exactly these classes can become SyncBatchNorm."""


class SyncBatchNorm(_BatchNorm, nn.SyncBatchNorm):
    r"""Computes y = f((x − mean) / sqrt(var + eps) · weight + bias + residual) by channel, as torch.nn.SyncBatchNorm.

    In training, mean and var are those of the batch that all processes of a group share, and results, running
    statistics included, are those of BatchNorm over the joined batch. A process's part may have any length, or be
    empty. In evaluation, in a group of one process, and without torch.distributed, this is BatchNorm.

    The forward exchanges statistics once, [3C + 1] numbers a process, and so does the backward, [2C], on the GPU's
    stream. dx is the gradient of the sum of all processes' losses. dweight and dbias are this process's part, as
    torch's, for DistributedDataParallel to average.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as torch.nn.BatchNorm2d.
        process_group: a group of torch.distributed whose backend supports the input's device; None: all processes.

    forward takes input [N, C, *], and `residual`, `activation` and `negative_slope` of `triton_norm.batch_norm`.

    Raises:
        ValueError: input has less than two dimensions, or no channels; others as `triton_norm.batch_norm`.
        TypeError: process_group is not a group, in training.
        RuntimeError: process_group was destroyed.

    One value a channel on a process is valid. If the whole batch has one value a channel, running_var is unchanged; if
    it is empty, both running statistics are. An error would need a GPU sync.

    This class derives from torch.nn.SyncBatchNorm, so tools that look up layers by isinstance find it; it does not
    derive from BatchNorm1d to 3d. DistributedDataParallel accepts it on the CPU, unlike torch.nn.SyncBatchNorm.
    """

    original = nn.SyncBatchNorm

    def _check_input_dim(self, input: Tensor) -> None:
        super()._check_input_dim(input)
        self._check_non_zero_input_channels(input)

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> Tensor:
        if REVERTED in self.__dict__ or has_torch_function_unary(input):
            instead = symbolic.instead(self, SyncBatchNorm.forward, input)
            if instead is not None:
                options = residual, activation, negative_slope
                return instead(input, **changed(SyncBatchNorm.forward, options))  # type: ignore[no-any-return]
        tensors, options = self._call(input, residual, activation, negative_slope)
        group = distributed.shared_by(self.process_group) if self.training else None
        if group is None:
            return _called(tensors, options)
        call = BatchNormTensors._make(tensors), BatchNormOptions._make(options)
        return distributed.sync_batch_norm(*call, group)

    def explain_call(self, input: Tensor, **fused: Any) -> Explanation:
        whole = not self.training or distributed.shared_by(self.process_group) is None
        result = self._explained(self._call(input, **fused), whole)
        return result if whole else dataclasses.replace(result, function="sync_batch_norm")

    def named_modules(self, *arguments: Any, **named: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yields as torch.nn.Module's, but nothing to the check by which DistributedDataParallel refuses
        torch.nn.SyncBatchNorm on the CPU, where this class works."""
        if is_compiling() or not _is_for_refusal(sys._getframe(1)):
            yield from super().named_modules(*arguments, **named)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Replaces every BatchNorm in `module` by a SyncBatchNorm with its parameters and buffers, as torch's method.

        Replaces modules of exactly the classes BatchNorm1d to 3d and SyncBatchNorm, torch's or this library's. A
        subclass, a BatchNorm with a forward of its own, and a lazy one before its first call, stay, with a UserWarning
        that names them: their forward may do more. Hooks are lost; `triton_norm.convert` keeps them.

        Returns:
            `module`, or the new layer if `module` itself is replaced.

        Raises:
            TypeError: `module` is not a module, or a layer's weight or bias is not a parameter, as after pruning.
                Nothing has changed then.
        """
        checks.module("convert_sync_batchnorm", "module", module)
        exact = {*BATCH_NORMS, nn.SyncBatchNorm, SyncBatchNorm}
        replaced: dict[nn.Module, nn.Module] = {}
        left = []
        for name, part in module.named_modules():
            if type(part) in exact and part.forward == MethodType(type(part).forward, part):
                replaced[part] = cls._converted(part, process_group)
            elif isinstance(part, nn.modules.batchnorm._BatchNorm):
                left.append(f"{name or '(the module)'} ({type(part).__name__})")
        for parent in list(module.modules()):
            for name, child in tuple(parent._modules.items()):
                if child is not None and (child in replaced or parent in replaced):
                    replaced.get(parent, parent).add_module(name, replaced.get(child, child))
        if left:
            warnings.warn(
                f"convert_sync_batchnorm(): left as they are, for their forward may do more than BatchNorm's: "
                f"{', '.join(left)}",
                stacklevel=2,
            )
        return replaced.get(module, module)

    @classmethod
    def _converted(cls, module: Any, process_group: Any) -> "SyncBatchNorm":
        options = module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        converted = cls(*options, process_group, device="meta")
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(converted, name, getattr(module, name))
        converted.training = module.training
        if hasattr(module, "qconfig"):
            converted.qconfig = module.qconfig
        return converted


def by_name(forward: Any, options: tuple[Any, ...]) -> dict[str, Any]:
    """Returns the keyword arguments of a forward, by name."""
    return dict(zip(forward.__kwdefaults__, options, strict=True))


def changed(forward: Any, options: tuple[Any, ...]) -> dict[str, Any]:
    """Returns the keyword arguments of a forward that differ from its defaults, by name."""
    defaults: dict[str, Any] = forward.__kwdefaults__
    named = zip(defaults.items(), options, strict=True)
    return {name: value for (name, default), value in named if value is not default}


def _is_for_refusal(frame: FrameType | None) -> bool:
    """Decides whether DistributedDataParallel's check for SyncBatchNorm iterates over modules in this frame, or above
    it, behind the generators of enclosing modules."""
    while frame is not None and frame.f_code.co_name in ("modules", "named_modules"):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_passing_sync_batchnorm_handle"
