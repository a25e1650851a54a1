"""Normalization layers for PyTorch as Triton kernels, with the interface of torch.nn and torch.nn.functional."""

from triton_norm.dispatch import Explanation, backend
from triton_norm.functional import batch_norm, explain, layer_norm, rms_norm
from triton_norm.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, LayerNorm, RMSNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Explanation",
    "LayerNorm",
    "RMSNorm",
    "backend",
    "batch_norm",
    "explain",
    "layer_norm",
    "rms_norm",
]
__version__ = "0.1.0"
