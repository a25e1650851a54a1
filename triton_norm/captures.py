"""Decides what becomes of a call that one of torch's tools records or intercepts, instead of running it: one policy.

| who has the call | LayerNorm, RMSNorm | BatchNorm |
|---|---|---|
| torch.export | torch's functions | torch's functions |
| torch.compile | an operator that Inductor takes apart | torch's functions; operators where torch has no form |
| both, with backend "triton" | operators | operators |
| torch.jit.trace, torch.fx, torch.func, modes of functions | torch's functions | torch's functions |
| modes of operators, such as make_fx and checkpoint policies | operators | operators |

What is recorded is run later, elsewhere and by others. torch's functions go wherever torch goes, and its tools know how
to switch, fold and fuse them. The operators have derivatives and fakes, and launch this library's kernels. For
SyncBatchNorm in a group of processes torch has no form: it is operators always. docs/compile-and-export.md says more.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from triton_norm.plain import has_known_sizes

_included = torch._C._dispatch_tls_is_dispatch_key_included
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
_dispatch_modes = torch._C._len_torch_dispatch_stack
is_traced = torch._C._get_tracing_state
"""Returns whether TorchScript records a call: something true if so."""


def records_torch(backend: str, exports: bool, compiles: Tensor | None) -> bool:
    """Returns whether torch's own functions are to be recorded of a call that torch.export or torch.compile has.

    Args:
        exports: whether torch has a form of the call at all.
        compiles: the input of a call that Inductor fuses in that form, where its sizes are known.
    """
    if backend == "triton":
        return False
    if torch.compiler.is_exporting():
        return exports
    return compiles is not None and has_known_sizes(compiles)


def is_fusible(backend: str) -> bool:
    """Returns whether torch.compile has the call, and may fuse it with what stands beside it."""
    return torch.compiler.is_compiling() and backend != "triton"


def is_intercepted(*tensors: Tensor | None) -> bool:
    """Returns whether something records or intercepts operators on these tensors; otherwise one costs time and does
    what its function does."""
    if torch.compiler.is_compiling():
        return True
    if _dispatch_modes() != 0 or _included(_PRE_DISPATCH):
        return True
    return any(isinstance(tensor, FakeTensor) for tensor in tensors)
