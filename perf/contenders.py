"""Who is timed, by torch.nn.functional's signatures. One that cannot be imported is listed as missing."""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from perf.environment import version

Function = Callable[..., Any]


@dataclass(frozen=True)
class Functions:
    """What a contender computes with; None where it has no such op."""

    layer_norm: Function | None = None
    batch_norm: Function | None = None


@dataclass(frozen=True)
class Contender:
    """`load` runs once for every point, inside `scope`, which is entered once a run; `accuracy` widens the gate for one
    that states a lower accuracy than torch's."""

    name: str
    load: Callable[[], Functions]
    modules: tuple[str, ...] = ()
    distribution: str = "torch"
    compiles: bool = False
    accuracy: float = 1.0
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext

    def missing(self) -> str:
        """Why it cannot run here, or nothing."""
        for module in self.modules:
            try:
                importlib.import_module(module)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
        return ""

    def status(self) -> str:
        missing = self.missing()
        return f"missing ({missing})" if missing else f"{self.distribution} {version(self.distribution)}"


def _torch() -> Functions:
    from torch.nn import functional

    return Functions(functional.layer_norm, functional.batch_norm)


def _torch_compile() -> Functions:
    import torch
    from torch.nn import functional

    torch._dynamo.reset()
    layer_norm = torch.compile(functional.layer_norm, dynamic=False, fullgraph=True)
    batch_norm = torch.compile(functional.batch_norm, dynamic=False, fullgraph=True)
    return Functions(layer_norm, batch_norm)


def _triton_norm() -> Functions:
    import triton_norm

    return Functions(triton_norm.layer_norm, triton_norm.batch_norm)


def _kernels_only() -> AbstractContextManager[Any]:
    """A call that the kernels do not serve is an error here, never torch's time under our name."""
    import triton_norm

    return triton_norm.backend("triton")


CONTENDERS = [
    Contender("triton_norm", _triton_norm, ("triton", "triton_norm"), "triton", scope=_kernels_only),
    Contender("torch", _torch, ("torch",)),
    Contender("torch.compile", _torch_compile, ("torch", "triton"), compiles=True),
]
