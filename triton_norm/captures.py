"""Decides what becomes of a call that one of torch's tools records or intercepts, instead of running it: one policy.

| who has the call | LayerNorm, RMSNorm | BatchNorm | SyncBatchNorm in a group |
|---|---|---|---|
| torch.export | torch's functions | torch's functions | operators |
| torch.compile | an operator that Inductor takes apart | torch's functions; for `momentum=None` operators | operators |
| both, with backend "triton" | operators | operators | operators |
| torch.jit.trace, torch.fx, torch.func, function modes | torch's functions | torch's functions | torch's functions |
| dispatch modes, as of make_fx and of checkpoint policies | operators | operators | operators |

What is recorded is run later, elsewhere and by others. torch's functions go wherever torch goes, and its tools know how
to switch, fold and fuse them. The operators have derivatives and fakes, and are this library's kernels.
"""

import torch

_included = torch._C._dispatch_tls_is_dispatch_key_included
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def records_torch(backend: str, fuses: bool) -> bool:
    """Returns whether torch's own functions are to be recorded of a call that is compiled: where it is exported, and
    where Inductor `fuses` them as well as it can."""
    return backend != "triton" and (fuses or torch.compiler.is_exporting())


def is_fusible(backend: str) -> bool:
    """Returns whether torch.compile has the call, and may fuse it with what stands beside it."""
    return torch.compiler.is_compiling() and backend != "triton"


def is_intercepted() -> bool:
    """Returns whether something records or intercepts operators; otherwise one costs time and does what its function
    does."""
    if torch.compiler.is_compiling():
        return True
    return bool(torch._C._len_torch_dispatch_stack()) or _included(_PRE_DISPATCH)


def tracer() -> str | None:
    """Returns in words who records a call as TorchScript, None where nobody does."""
    return "torch.jit.trace is recording" if torch._C._get_tracing_state() else None
