"""Tensors that the kernels can read: whose values lie in memory of their own, at the address that they give."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import Buffer, Parameter

HALVES = (torch.float16, torch.bfloat16)
FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
REAL = Tensor, Parameter, Buffer
TYPES = (*REAL, FakeTensor, FunctionalTensor)
"""Classes of tensors without behaviour of their own, in one order: stored code that was compiled has a guard on it."""

has_memory = torch._C._has_storage
"""Returns whether a tensor has memory. One that a transform of torch.func has made has none, also when it was kept from
a finished transform, and neither has a batch of autograd's `is_grads_batched`."""


def is_subclass(tensor: Tensor) -> bool:
    """Returns whether the tensor is of a class with behaviour of its own."""
    return tensor.__class__ not in TYPES  # torch.compile can store no guard on type(tensor) for another process


def is_plain(tensor: Tensor) -> bool:
    """Returns whether the kernels can read the tensor, or could once a pending negation is applied."""
    is_strided = tensor.layout is torch.strided and not tensor.is_nested
    return type(tensor) in TYPES and is_strided and has_memory(tensor)


def holds(of_sizes: Any) -> bool:
    """Returns whether a comparison of sizes holds; of sizes that are not known while a call is recorded, False.

    Args:
        of_sizes: a bool, a SymBool, or a tensor, which sizes give while torch.jit.trace records.
    """
    if not (torch.compiler.is_compiling() or isinstance(of_sizes, torch.SymBool)):
        return bool(of_sizes)
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # whose import takes as long as torch's

    return guard_or_false(of_sizes)


def has_known_sizes(x: Tensor) -> bool:
    """Returns whether x's number of elements is known. It is not where a call is recorded and it depends on data."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

    is_empty = x.numel() == 0
    return guard_or_true(is_empty) == guard_or_false(is_empty)
