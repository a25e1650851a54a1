"""LayerNorm and RMSNorm with one interface, so that a test of rows is a test of both."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import triton_norm
from support.oracle import ErrorBound, Formula, Inputs, Results, compute_dtype, moments_about, run, widen


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
        """Returns function(x, weight=None, bias=None); RMSNorm leaves the bias out."""
        return self._of(self.function, normalized_shape, eps, options)

    def theirs(self, normalized_shape: tuple[int, ...], eps: float = 1e-5) -> Callable[..., Tensor]:
        return self._of(self.torch_function, normalized_shape, eps, {})

    def drawn(self, shape: tuple[int, ...], n_axes: int, dtype: torch.dtype, device: str) -> tuple[Tensor | None, ...]:
        """Returns x, weight, bias (None for RMSNorm) and dy."""
        normalized = shape[len(shape) - n_axes :]
        x = (3 * torch.randn(shape, dtype=torch.float64) + 2).to(device, dtype)
        weight, bias = (torch.randn(normalized, dtype=torch.float64).to(device, dtype) for _ in range(2))
        dy = torch.randn(shape, dtype=torch.float64).to(device, dtype)
        return x, weight, bias if self.has_bias else None, dy

    def bound(self, inputs: Inputs, n_axes: int = 1, eps: float = 1e-5) -> ErrorBound:
        """Returns the exact results and their bounds."""
        rank = inputs.x.dim()
        axes, normalized = tuple(range(rank - n_axes, rank)), tuple(inputs.x.shape[rank - n_axes :])
        x, theirs = widen(inputs.x), self.theirs(normalized, eps)
        mean = x.mean(axes, keepdim=True) if self.has_bias else torch.zeros((), dtype=torch.float64)
        formula = Formula(
            lambda x, _, weight, bias: theirs(x, weight, bias),
            axes,
            normalized,
            moments_about(mean, x, axes),
            eps,
            compute_dtype(inputs.x),
            centred=self.has_bias,
        )
        return ErrorBound(formula, inputs)

    def check(self, results: Results, *inputs: Tensor | None, n_axes: int = 1, eps: float = 1e-5) -> None:
        """Asserts that the results for these x, weight, bias and dy are within their bounds."""
        x, weight, bias, dy = inputs
        self.bound(Inputs(x, None, weight, bias, dy), n_axes, eps).check(results)

    def against_oracle(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor, n_axes: int = 1, eps: float = 1e-5
    ) -> Results:
        """Returns the kernels' results if they are within their bounds."""
        results = run(self.ours(tuple(x.shape[x.dim() - n_axes :]), eps), x, weight, bias, dy)
        self.check(results, x, weight, bias, dy, n_axes=n_axes, eps=eps)
        return results


LAYER_NORM = Norm("layer_norm", triton_norm.layer_norm, F.layer_norm, triton_norm.LayerNorm, nn.LayerNorm, True)
RMS_NORM = Norm("rms_norm", triton_norm.rms_norm, F.rms_norm, triton_norm.RMSNorm, nn.RMSNorm, False)
NORMS = (LAYER_NORM, RMS_NORM)
