"""Normalization layers for PyTorch as Triton kernels: functions of torch's interface, and layers for kernelize."""

from triton_norm.dispatch import backend
from triton_norm.explaining import explain
from triton_norm.functional import batch_norm, layer_norm, rms_norm
from triton_norm.functional_groups import group_norm, instance_norm
from triton_norm.hub import layers

__all__ = ["backend", "batch_norm", "explain", "group_norm", "instance_norm", "layer_norm", "layers", "rms_norm"]
