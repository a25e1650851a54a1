"""Who is timed, by torch.nn.functional's signatures. One that cannot be imported is listed as missing."""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from perf.environment import version

Function = Callable[..., Any]


@dataclass(frozen=True)
class Functions:
    """What a contender computes with; None where it has no such op.

    Those with a residual take it after x, and those of rows return y and total = x + residual.
    """

    layer_norm: Function | None = None
    batch_norm: Function | None = None
    rms_norm: Function | None = None
    layer_norm_residual: Function | None = None
    rms_norm_residual: Function | None = None
    batch_norm_add_relu: Function | None = None


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


def _layer_norm_of_sum(x: Any, residual: Any, *arguments: Any) -> Any:
    total = x + residual
    return functional.layer_norm(total, *arguments), total


def _rms_norm_of_sum(x: Any, residual: Any, *arguments: Any) -> Any:
    total = x + residual
    return functional.rms_norm(total, *arguments), total


def _batch_norm_add_relu(x: Any, residual: Any, *arguments: Any) -> Any:
    return functional.relu(functional.batch_norm(x, *arguments) + residual)


def torch_functions() -> Functions:
    return Functions(
        functional.layer_norm,
        functional.batch_norm,
        functional.rms_norm,
        _layer_norm_of_sum,
        _rms_norm_of_sum,
        _batch_norm_add_relu,
    )


def _torch_compile() -> Functions:
    torch._dynamo.reset()
    compiled = partial(torch.compile, dynamic=False, fullgraph=True)
    return Functions(**{name: compiled(function) for name, function in vars(torch_functions()).items()})


def triton_norm_functions() -> Functions:
    import triton_norm as tn

    def layer_norm_residual(x: Any, residual: Any, *arguments: Any) -> Any:
        return tn.layer_norm(x, *arguments, residual=residual)

    def rms_norm_residual(x: Any, residual: Any, *arguments: Any) -> Any:
        return tn.rms_norm(x, *arguments, residual=residual)

    def batch_norm_add_relu(x: Any, residual: Any, *arguments: Any) -> Any:
        return tn.batch_norm(x, *arguments, residual=residual, activation="relu")

    return Functions(
        tn.layer_norm, tn.batch_norm, tn.rms_norm, layer_norm_residual, rms_norm_residual, batch_norm_add_relu
    )


def _liger() -> Functions:
    """Its RMSNorm computing in fp32 throughout, as torch does, and leaving dy as it is."""
    liger = importlib.import_module("liger_kernel.transformers.functional")
    as_torch = {"offset": 0.0, "casting_mode": "gemma", "in_place": False}

    def layer_norm(x: Any, shape: tuple[int, ...], weight: Any, bias: Any, eps: float) -> Any:
        return liger.liger_layer_norm(x, weight, bias, eps)

    def rms_norm(x: Any, shape: tuple[int, ...], weight: Any, eps: float) -> Any:
        return liger.liger_rms_norm(x, weight, eps, **as_torch)

    def rms_norm_residual(x: Any, residual: Any, shape: tuple[int, ...], weight: Any, eps: float) -> Any:
        return liger.liger_fused_add_rms_norm(x, residual, weight, eps, **as_torch)

    return Functions(layer_norm, rms_norm=rms_norm, rms_norm_residual=rms_norm_residual)


def _kernels_only() -> AbstractContextManager[Any]:
    """A call that the kernels do not serve is an error here, never torch's time under our name."""
    import triton_norm

    return triton_norm.backend("triton")


CONTENDERS = [
    Contender("triton_norm", triton_norm_functions, ("triton", "triton_norm"), "triton", scope=_kernels_only),
    Contender("torch", torch_functions, ("torch",)),
    Contender("torch.compile", _torch_compile, ("torch", "triton"), compiles=True),
    Contender("Liger-Kernel", _liger, ("triton", "liger_kernel.transformers.functional"), "liger-kernel"),
]
