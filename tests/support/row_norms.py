"""LayerNorm and RMSNorm behind one face, so that a test of rows is a test of both."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import triton_norm
from support.oracle import Results, check, run


@dataclass(frozen=True)
class Norm:
    name: str
    function: Callable[..., Any]
    torch_function: Callable[..., Tensor]
    module: type[nn.Module]
    torch_module: type[nn.Module]
    has_bias: bool

    def __repr__(self) -> str:
        return self.name

    def _of(self, function: Callable[..., Any], normalized_shape: tuple[int, ...], eps: float, options: dict[str, Any]):
        if self.has_bias:
            return lambda x, weight=None, bias=None: function(x, normalized_shape, weight, bias, eps, **options)
        return lambda x, weight=None, bias=None: function(x, normalized_shape, weight, eps, **options)

    def ours(self, normalized_shape: tuple[int, ...], eps: float = 1e-5, **options: Any) -> Callable[..., Any]:
        """function(x, weight=None, bias=None); RMSNorm leaves the bias out."""
        return self._of(self.function, normalized_shape, eps, options)

    def theirs(self, normalized_shape: tuple[int, ...], eps: float = 1e-5) -> Callable[..., Tensor]:
        return self._of(self.torch_function, normalized_shape, eps, {})

    def exact(self, normalized_shape: tuple[int, ...], rank: int, eps: float = 1e-5) -> Callable[..., Tensor]:
        """torch's, for `oracle.check` to call in fp64."""
        function = self.theirs(normalized_shape, eps)
        function.parameter_axes = tuple(range(rank - len(normalized_shape), rank))  # type: ignore[attr-defined]
        return function

    def drawn(self, shape: tuple[int, ...], n_axes: int, dtype: torch.dtype, device: str) -> tuple[Tensor | None, ...]:
        """x, weight, bias (None for RMSNorm) and dy."""
        normalized = shape[len(shape) - n_axes :]
        x = (3 * torch.randn(shape, dtype=torch.float64) + 2).to(device, dtype)
        weight, bias = (torch.randn(normalized, dtype=torch.float64).to(device, dtype) for _ in range(2))
        dy = torch.randn(shape, dtype=torch.float64).to(device, dtype)
        return x, weight, bias if self.has_bias else None, dy

    def against_oracle(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor, n_axes: int = 1, eps: float = 1e-5
    ) -> Results:
        normalized = tuple(x.shape[x.dim() - n_axes :])
        actual = run(self.ours(normalized, eps), x, weight, bias, dy)
        self.check(actual, x, weight, bias, dy, n_axes, eps)
        return actual

    def check(
        self,
        actual: Results,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        dy: Tensor,
        n_axes: int = 1,
        eps: float = 1e-5,
    ) -> None:
        axes = tuple(range(x.dim() - n_axes, x.dim()))
        normalized = tuple(x.shape[x.dim() - n_axes :])
        zero = None if self.has_bias else torch.zeros((), dtype=torch.float64, device=x.device)
        rms = None if self.has_bias else torch.rsqrt(x.double().square().mean(axes, keepdim=True) + eps)
        exact = self.exact(normalized, x.dim(), eps)
        check(actual, x, weight, bias, dy, axes, exact, zero, rms, eps, constant=False)


LAYER_NORM = Norm("layer_norm", triton_norm.layer_norm, F.layer_norm, triton_norm.LayerNorm, nn.LayerNorm, True)
RMS_NORM = Norm("rms_norm", triton_norm.rms_norm, F.rms_norm, triton_norm.RMSNorm, nn.RMSNorm, False)
NORMS = (LAYER_NORM, RMS_NORM)
