"""Lists the functions of torch and of this library, by torch.nn.functional's signatures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.nn import functional

Function = Callable[..., Any]


@dataclass(frozen=True)
class Functions:
    """Functions of a contender; None where it has no such op.

    Those with a residual take it after x, and those of rows return y and total = x + residual.
    """

    layer_norm: Function | None = None
    batch_norm: Function | None = None
    rms_norm: Function | None = None
    layer_norm_residual: Function | None = None
    rms_norm_residual: Function | None = None
    batch_norm_add_relu: Function | None = None
    group_norm: Function | None = None
    group_norm_silu: Function | None = None
    instance_norm: Function | None = None


def _layer_norm_of_sum(x: Any, residual: Any, *arguments: Any) -> Any:
    total = x + residual
    return functional.layer_norm(total, *arguments), total


def _rms_norm_of_sum(x: Any, residual: Any, *arguments: Any) -> Any:
    total = x + residual
    return functional.rms_norm(total, *arguments), total


def _batch_norm_add_relu(x: Any, residual: Any, *arguments: Any) -> Any:
    return functional.relu(functional.batch_norm(x, *arguments) + residual)


def _group_norm_silu(*arguments: Any) -> Any:
    return functional.silu(functional.group_norm(*arguments))


def torch_functions() -> Functions:
    return Functions(
        functional.layer_norm,
        functional.batch_norm,
        functional.rms_norm,
        _layer_norm_of_sum,
        _rms_norm_of_sum,
        _batch_norm_add_relu,
        functional.group_norm,
        _group_norm_silu,
        functional.instance_norm,
    )


def triton_norm_functions() -> Functions:
    import triton_norm as tn

    def layer_norm_residual(x: Any, residual: Any, *arguments: Any) -> Any:
        return tn.layer_norm(x, *arguments, residual=residual)

    def rms_norm_residual(x: Any, residual: Any, *arguments: Any) -> Any:
        return tn.rms_norm(x, *arguments, residual=residual)

    def batch_norm_add_relu(x: Any, residual: Any, *arguments: Any) -> Any:
        return tn.batch_norm(x, *arguments, residual=residual, activation="relu")

    def group_norm_silu(*arguments: Any) -> Any:
        return tn.group_norm(*arguments, activation="silu")

    return Functions(
        tn.layer_norm,
        tn.batch_norm,
        tn.rms_norm,
        layer_norm_residual,
        rms_norm_residual,
        batch_norm_add_relu,
        tn.group_norm,
        group_norm_silu,
        tn.instance_norm,
    )
