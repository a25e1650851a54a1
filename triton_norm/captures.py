"""Decides how a call is recorded or intercepted by torch's tools.

| who has the call | LayerNorm, RMSNorm | BatchNorm, GroupNorm, InstanceNorm |
|---|---|---|
| torch.export | torch's functions | torch's functions |
| torch.compile | an operator that Inductor takes apart | torch's functions; operators where torch has no form |
| both, with backend "triton" | operators | operators |
| torch.jit.trace, torch.fx, torch.func, modes of functions | torch's functions | torch's functions |
| modes of operators, such as make_fx and checkpoint policies | operators | operators |

A recorded call is run later, elsewhere, and by other tools. torch's functions run wherever torch does, and its tools
can switch, fold and fuse them. The operators have derivatives and fakes, and launch this library's kernels.
SyncBatchNorm in a group of processes is always operators: torch has no form of it. See docs/compile-and-export.md.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from triton_norm.plain import has_known_sizes

_included = torch._C._dispatch_tls_is_dispatch_key_included
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
_dispatch_modes = torch._C._len_torch_dispatch_stack
is_traced = torch._C._get_tracing_state
"""Returns a true value if TorchScript records a call."""


def records_torch(backend: str, exports: bool, compiles: Tensor | None) -> bool:
    """Decides whether torch.export or torch.compile should record torch's own functions for a call.

    Args:
        exports: torch has a form of the call.
        compiles: input of a call that Inductor fuses in torch's form if the sizes are known; otherwise None.
    """
    if backend == "triton":
        return False
    if torch.compiler.is_exporting():
        return exports
    return compiles is not None and has_known_sizes(compiles)


def is_fusible(backend: str) -> bool:
    """Decides whether torch.compile records the call, and may fuse it with neighbouring operations."""
    return torch.compiler.is_compiling() and backend != "triton"


def is_intercepted(*tensors: Tensor | None) -> bool:
    """Decides whether something records or intercepts operators on these tensors. If not, operators only cost time."""
    if torch.compiler.is_compiling():
        return True
    if _dispatch_modes() != 0 or _included(_PRE_DISPATCH):
        return True
    return any(isinstance(tensor, FakeTensor) for tensor in tensors)
