"""torch.nn's normalization layers with another forward: parameters, buffers and state_dicts are torch's own."""

from typing import Any

from torch import Tensor, nn

from triton_norm import functional
from triton_norm.dispatch import Explanation


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm, computed by `triton_norm.layer_norm`, whose keyword arguments forward takes too."""

    def forward(self, input: Tensor, **fused: Any) -> Any:
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, **fused)

    def explain_call(self, input: Tensor, **fused: Any) -> Explanation:
        arguments = (self.normalized_shape, self.weight, self.bias, self.eps)
        return functional.explain(functional.layer_norm, input, *arguments, **fused)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm, computed by `triton_norm.rms_norm`, whose keyword arguments forward takes too."""

    def forward(self, x: Tensor, **fused: Any) -> Any:
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps, **fused)

    def explain_call(self, x: Tensor, **fused: Any) -> Explanation:
        arguments = (self.normalized_shape, self.weight, self.eps)
        return functional.explain(functional.rms_norm, x, *arguments, **fused)


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """The forward that the three layers share; which ranks they take is torch's own `_check_input_dim`."""

    def _arguments(self, input: Tensor, fused: dict[str, Any]) -> dict[str, Any]:
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
            "training": self.training or (self.running_mean is None and self.running_var is None),
            "momentum": 0.0 if self.momentum is None and counter is None else self.momentum,
            "eps": self.eps,
            "num_batches_tracked": counter,
            **fused,
        }

    def forward(self, input: Tensor, **fused: Any) -> Tensor:
        return functional.batch_norm(**self._arguments(input, fused))

    def explain_call(self, input: Tensor, **fused: Any) -> Explanation:
        return functional.explain_batch_norm(**self._arguments(input, fused))


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d, computed by `triton_norm.batch_norm`."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d, computed by `triton_norm.batch_norm`."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d, computed by `triton_norm.batch_norm`."""
