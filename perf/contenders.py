"""Lists the contenders, by torch.nn.functional's signatures. One that cannot be imported is listed as missing."""

import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from perf import others
from perf.environment import version
from perf.ops import Function, Functions, torch_functions, triton_norm_functions
from perf.records import in_a_line


@dataclass(frozen=True)
class Contender:
    """`load` runs once for every point, inside `scope`, which is entered once a run; `accuracy` widens the gate for one
    that states a lower accuracy than torch's. One that `compiles` does so for each shape anew, and one that `searches`
    tries many ways each time."""

    name: str
    load: Callable[[], Functions]
    modules: tuple[str, ...] = ()
    distributions: tuple[str, ...] = ("torch",)
    compiles: bool = False
    searches: bool = False
    accuracy: float = 1.0
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext

    def missing(self) -> str:
        """Returns why it cannot run here, or an empty string."""
        for module in self.modules:
            try:
                importlib.import_module(module)
            except Exception as error:
                return in_a_line(error)
        return ""

    def status(self) -> str:
        missing = self.missing()
        if missing:
            return f"missing ({missing})"
        return ", ".join(f"{distribution} {_version(distribution)}" for distribution in self.distributions)


def _version(distribution: str) -> str:
    """Returns the version of a distribution, or of a package that is imported from a checkout."""
    installed = version(distribution)
    if installed != "not installed":
        return installed
    return getattr(sys.modules.get(distribution), "__version__", installed)


_at_this_point: set[str] = set()


def _compiled(name: str, load: Callable[[], Functions], **options: Any) -> Functions:
    """Compiles a contender's functions. When one comes again, the next point has begun, and torch's caches are
    cleared.

    They are not cleared whenever one comes, which would have those before it at this point compile a second time.
    """
    if not _at_this_point or name in _at_this_point:
        torch._dynamo.reset()
        _at_this_point.clear()
    _at_this_point.add(name)
    compiled = partial(torch.compile, dynamic=False, fullgraph=True, **options)
    return {op: compiled(function) for op, function in load().items()}


def _compiled_by_default() -> Functions:
    """Returns this library's functions, compiled and called by the default policy: the suite forces the kernels."""
    import triton_norm

    def by_default(function: Function) -> Function:
        def call(*arguments: Any) -> Any:
            with triton_norm.backend("auto"):
                return function(*arguments)

        return call

    compiled = _compiled("triton_norm", triton_norm_functions)
    return {op: by_default(function) for op, function in compiled.items()}


def _kernels_only() -> AbstractContextManager[Any]:
    """Makes a call that the kernels do not serve an error, instead of torch's time under our name."""
    import triton_norm

    return triton_norm.backend("triton")


# torch's dweight and dbias of BatchNorm in bf16 are off by more than the gate allows, on an H100.
ACCURACY_OF_TORCH = 2.0

_OURS = ("triton", "triton_norm")
_TORCH = ("torch", "triton")

CONTENDERS = [
    Contender("triton_norm", triton_norm_functions, _OURS, ("triton_norm", "triton"), scope=_kernels_only),
    Contender("torch", torch_functions, ("torch",), accuracy=ACCURACY_OF_TORCH),
    Contender(
        "torch.compile",
        partial(_compiled, "torch", torch_functions),
        _TORCH,
        _TORCH,
        compiles=True,
        accuracy=ACCURACY_OF_TORCH,
    ),
    Contender(
        "torch.compile, max-autotune",
        partial(_compiled, "torch, max-autotune", torch_functions, mode="max-autotune-no-cudagraphs"),
        _TORCH,
        _TORCH,
        compiles=True,
        searches=True,
        accuracy=ACCURACY_OF_TORCH,
    ),
    Contender("triton_norm, compiled", _compiled_by_default, _OURS, ("triton_norm", "torch", "triton"), compiles=True),
    Contender(
        "triton_norm, compiled, kernels forced",
        partial(_compiled, "triton_norm, kernels forced", triton_norm_functions),
        _OURS,
        ("triton_norm", "torch", "triton"),
        compiles=True,
        scope=_kernels_only,
    ),
    Contender("Liger-Kernel", others.liger, ("triton", "liger_kernel.transformers.functional"), ("liger-kernel",)),
    Contender("QuACK", others.quack, ("quack.rmsnorm",), ("quack-kernels",)),
    Contender(
        "flash-linear-attention",
        others.flash_linear_attention,
        ("triton", "fla.modules.layernorm", "fla.modules.fused_norm_gate"),
        ("fla-core",),
    ),
    Contender("mamba-ssm", others.mamba_ssm, ("triton", "mamba_ssm.ops.triton.layernorm_gated"), ("mamba-ssm",)),
    Contender("apex", others.apex, ("apex.normalization.fused_layer_norm", "fused_layer_norm_cuda"), ("apex",)),
    Contender("FlagGems", others.flag_gems, ("triton", "flag_gems"), ("flag_gems",)),
]
