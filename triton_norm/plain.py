"""Tensors that the kernels can read: whose values lie in memory of their own, at the address that they give."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Buffer, Parameter

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TYPES = {Tensor, Parameter, Buffer, FakeTensor}
"""Classes of tensors without behaviour of their own."""

has_memory = torch._C._has_storage
"""Returns whether a tensor has memory. One that a transform of torch.func has made has none, also when it was kept from
a finished transform, and neither has a batch of autograd's `is_grads_batched`."""


def is_plain(tensor: Tensor) -> bool:
    """Returns whether the kernels can read the tensor, or could once a pending negation is applied."""
    return type(tensor) in TYPES and tensor.layout is torch.strided and has_memory(tensor)
