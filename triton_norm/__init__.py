"""Normalization layers for PyTorch as Triton kernels, with the interface of torch.nn and torch.nn.functional."""

from triton_norm.converting.convert import Report, convert, revert
from triton_norm.converting.folding import fold_batch_norm
from triton_norm.dispatch import Explanation, backend
from triton_norm.explaining import explain
from triton_norm.functional import batch_norm, layer_norm, rms_norm
from triton_norm.functional_groups import group_norm, instance_norm
from triton_norm.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, LayerNorm, RMSNorm, SyncBatchNorm
from triton_norm.modules_groups import GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from triton_norm.operators import OPERATORS

__all__ = [
    "OPERATORS",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Explanation",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
    "Report",
    "SyncBatchNorm",
    "backend",
    "batch_norm",
    "convert",
    "explain",
    "fold_batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "revert",
    "rms_norm",
]
__version__ = "0.1.0"
