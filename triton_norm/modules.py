"""torch.nn's normalization layers with another forward: parameters, buffers and state_dicts are torch's own."""

import dataclasses
from typing import Any

from torch import Tensor, nn

from triton_norm import checks, distributed, explaining, functional
from triton_norm.dispatch import Explanation


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm, computed by `triton_norm.layer_norm`, whose keyword arguments forward takes too."""

    def forward(self, input: Tensor, **fused: Any) -> Any:
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, **fused)

    def explain_call(self, input: Tensor, **fused: Any) -> Explanation:
        arguments = (self.normalized_shape, self.weight, self.bias, self.eps)
        return explaining.explain(functional.layer_norm, input, *arguments, **fused)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm, computed by `triton_norm.rms_norm`, whose keyword arguments forward takes too."""

    def forward(self, x: Tensor, **fused: Any) -> Any:
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps, **fused)

    def explain_call(self, x: Tensor, **fused: Any) -> Explanation:
        arguments = (self.normalized_shape, self.weight, self.eps)
        return explaining.explain(functional.rms_norm, x, *arguments, **fused)


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """The forward that the three layers share; which ranks they take is torch's own `_check_input_dim`."""

    def _arguments(self, input: Tensor) -> dict[str, Any]:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        moves = self.training and self.track_running_stats
        uses_running = moves or not self.training
        counter = self.num_batches_tracked if moves else None
        return {
            "input": input,
            "running_mean": self.running_mean if uses_running else None,
            "running_var": self.running_var if uses_running else None,
            "weight": self.weight,
            "bias": self.bias,
            "training": bool(self.training or (self.running_mean is None and self.running_var is None)),
            "momentum": 0.0 if self.momentum is None and counter is None else self.momentum,
            "eps": self.eps,
            "num_batches_tracked": counter,
        }

    def forward(self, input: Tensor, **fused: Any) -> Tensor:
        return functional.batch_norm(**self._arguments(input), **fused)

    def explain_call(self, input: Tensor, **fused: Any) -> Explanation:
        return explaining.explain_batch_norm(**self._arguments(input), **fused)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d, computed by `triton_norm.batch_norm`, whose `residual` and `activation` forward takes."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d, computed by `triton_norm.batch_norm`, whose `residual` and `activation` forward takes."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d, computed by `triton_norm.batch_norm`, whose `residual` and `activation` forward takes."""


class SyncBatchNorm(_BatchNorm):
    r"""y = f((x − mean) / sqrt(var + eps) · weight + bias + residual), channel by channel, as torch.nn.SyncBatchNorm:
    in training, mean and var are those of the batch that all processes of a group share.

    The statistics are exchanged once in the forward, [3C + 1] numbers a process, and once in the backward, [2C], on the
    GPU's own stream; results, running statistics among them, are those of BatchNorm over the joined batch. Shares may
    be of different lengths, or empty. In evaluation, in a group of one process, and where torch.distributed is not
    initialised, this is BatchNorm.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as of torch.nn.BatchNorm2d, and so are
            parameters, buffers and the state_dict.
        process_group: of torch.distributed, with any backend that serves the input's device; None: all processes.

    The input is of shape [N, C, *], and forward takes `residual`, `activation` and `negative_slope` of
    `triton_norm.batch_norm` too. dx is the gradient of the sum of all processes' losses, dweight and dbias are of this
    process's share: as torch's, for DistributedDataParallel to average.

    Raises:
        ValueError: input of less than two dimensions, or of no channels.
        TypeError: in training, process_group is no group.
        RuntimeError: it is one that was destroyed.

    and as `triton_norm.batch_norm`, but that one value per channel on one process is no error. A batch of one value per
    channel in all moves no running variance, an empty one neither running statistic; to ask a GPU would be to wait for
    it. Not a subclass of torch.nn.SyncBatchNorm: DistributedDataParallel refuses those on the CPU.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        if input.size(1) == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")

    def forward(self, input: Tensor, **fused: Any) -> Tensor:
        arguments = self._arguments(input)
        group = distributed.shared_by(self.process_group) if self.training else None
        if group is None:
            return functional.batch_norm(**arguments, **fused)
        del arguments["training"]
        return distributed.sync_batch_norm(**arguments, group=group, **fused)

    def explain_call(self, input: Tensor, **fused: Any) -> Explanation:
        whole = not self.training or distributed.shared_by(self.process_group) is None
        found = explaining.explain_batch_norm(**self._arguments(input), whole=whole, **fused)
        return found if whole else dataclasses.replace(found, function="sync_batch_norm")

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """`module` with every BatchNorm in it, torch's or this library's, SyncBatchNorm among them, become one of these
        that has its parameters and buffers; a new layer where `module` itself is one. As torch.nn.SyncBatchNorm's.
        """
        checks.module("convert_sync_batchnorm", "module", module)
        converted = module
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            converted = cls._converted(module, process_group)
        for name, child in tuple(module._modules.items()):  # not named_children, which names a layer only once
            if child is not None:
                converted.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return converted

    @classmethod
    def _converted(cls, module: nn.modules.batchnorm._BatchNorm, process_group: Any) -> "SyncBatchNorm":
        options = module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        converted = cls(*options, process_group, device="meta")
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(converted, name, getattr(module, name))
        converted.training = module.training
        if hasattr(module, "qconfig"):
            converted.qconfig = module.qconfig
        return converted
