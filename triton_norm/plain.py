"""Recognises tensors that the kernels can read: their values are in memory of their own, at their data pointer."""

from collections.abc import Sequence
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
"""Tensors of these classes have no behaviour of their own. The order is fixed: stored compiled code guards on it."""

has_memory = torch._C._has_storage
"""Returns whether a tensor has memory. Tensors from a torch.func transform, finished or not, and from autograd's
`is_grads_batched` have none."""


def computed_in(*dtypes: torch.dtype | None) -> torch.dtype:
    """Returns the type that a call computes in.

    Args:
        dtypes: of x and of total.
    """
    return torch.float64 if torch.float64 in dtypes else torch.float32


def is_subclass(tensor: Tensor) -> bool:
    """Decides whether the tensor's class has behaviour of its own."""
    return tensor.__class__ not in TYPES  # torch.compile can store no guard on type(tensor) for another process


def is_distributed(tensor: Tensor | None) -> bool:
    """Decides whether the tensor is a DTensor."""
    if tensor is None or not is_subclass(tensor) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # a slow import, which whoever has such a tensor has paid for

    return tensor.__class__ is DTensor


def is_plain(tensor: Tensor) -> bool:
    """Decides whether the kernels can read the tensor, at least once a pending negation is applied."""
    is_strided = tensor.layout is torch.strided and not tensor.is_nested
    return type(tensor) in TYPES and is_strided and has_memory(tensor)


def holds(of_sizes: Any) -> bool:
    """Returns a comparison of sizes as a bool; False if the sizes are unknown while recording.

    Args:
        of_sizes: a bool, a SymBool, or a tensor, as torch.jit.trace makes of sizes.
    """
    if not (torch.compiler.is_compiling() or isinstance(of_sizes, torch.SymBool)):
        return bool(of_sizes)
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # a slow import, as long as torch's

    return guard_or_false(of_sizes)


def has_known_sizes(x: Tensor) -> bool:
    """Decides whether x's number of elements is known. While recording it may depend on data."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

    is_empty = x.numel() == 0
    return guard_or_true(is_empty) == guard_or_false(is_empty)


def collapsed_stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """Returns the stride if these axes are equivalent to one axis, 0 for a single element, or None."""
    inner, reach = 0, None
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length == 1:
            continue
        if reach is None:
            inner = stride
        elif stride != reach:
            return None
        reach = stride * length
    return inner
