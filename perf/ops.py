"""Declares the ops that are measured: titles, bytes, and the functions of torch and of this library.

An op is one record of `OPS`, and a tensor that no other op has is one record of `TENSORS`. All else follows from them:
options, inputs, gradients, floors, the gate, tables and pictures. Other libraries' functions stand in `perf/others.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perf.points import Workload

Function = Callable[..., Any]
Functions = Mapping[str, Function]
"""Functions of one contender by the names of their ops. It has no other op.

A function takes x and the other tensors of x's size in the order of the op's forward, then the arguments of
torch.nn.functional's function, with modulations behind the weight, or in its place. Those that write a total return y
and total.
"""


@dataclass(frozen=True)
class Tensor:
    """Describes the tensors of one name.

    Args:
        kind: "bulk" (of x's size and type), "bits" (one bit an element), "parameters" (one number a feature),
            "modulations" (one a feature and sample) or "statistics" (one a mean).
        mean, std: of the values that an input is drawn with.
    """

    kind: str
    mean: float = 0.0
    std: float = 1.0


TENSORS = {
    "x": Tensor("bulk", 0.5, 2.0),
    "residual": Tensor("bulk", -0.25),
    "gate": Tensor("bulk"),
    "y": Tensor("bulk"),
    "total": Tensor("bulk"),
    "dy": Tensor("bulk"),
    "dtotal": Tensor("bulk"),
    "dx": Tensor("bulk"),
    "dresidual": Tensor("bulk"),
    "dgate": Tensor("bulk"),
    "bits": Tensor("bits"),  # the side of 0 that an activation was taken on
    "weight": Tensor("parameters", 1.0, 0.25),
    "bias": Tensor("parameters", 0.0, 0.25),
    "dweight": Tensor("parameters"),
    "dbias": Tensor("parameters"),
    "scale": Tensor("modulations", 0.0, 0.25),
    "shift": Tensor("modulations", 0.0, 0.25),
    "residual_gate": Tensor("modulations", 0.5, 0.25),
    "dscale": Tensor("modulations"),
    "dshift": Tensor("modulations"),
    "dresidual_gate": Tensor("modulations"),
    "mean": Tensor("statistics"),
    "rstd": Tensor("statistics"),
    "running_mean": Tensor("statistics", 0.25, 0.0),
    "running_var": Tensor("statistics", 1.5, 0.0),
}


def named(kind: str) -> tuple[str, ...]:
    """Returns the names of the tensors of one kind."""
    return tuple(name for name, tensor in TENSORS.items() if tensor.kind == kind)


BULK, BITS, PARAMETERS, MODULATIONS, STATISTICS = map(
    named, ("bulk", "bits", "parameters", "modulations", "statistics")
)
ROW_FAMILIES = ("rows", "gated", "modulated")
"""Families whose ops normalize the last axis."""


@dataclass(frozen=True)
class Floor:
    """Names the tensors that must cross the memory bus once each.

    Args:
        reduced: those that have to be read from end to end before the first element can be written.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    reduced: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return f"{self.short}: {' + '.join(self.reads)} read once, {' + '.join(self.writes)} written once"

    @property
    def short(self) -> str:
        bulk = f"{sum(t in BULK for t in self.reads)}R{sum(t in BULK for t in self.writes)}W"
        return f"{bulk} + 1 bit" if set(BITS) & {*self.reads, *self.writes} else bulk


def moves(text: str, reduced: str = "") -> Floor:
    """Returns the floor of "x weight -> y": names of tensors that are read, and of those that are written."""
    reads, writes = text.split("->")
    return Floor(tuple(reads.split()), tuple(writes.split()), tuple(reduced.split()))


def _quick(workload: Workload) -> bool:
    return workload.quick or workload.landmark


def _quick_residual(workload: Workload) -> bool:
    return workload.landmark and workload.features in (1024, 4096, 16384)


def _quick_add_relu(workload: Workload) -> bool:
    """Returns whether a workload is at the end of a bottleneck block of ResNet-50."""
    return workload.quick and workload.source == "ResNet-50" and workload.features in (256, 2048)


@dataclass(frozen=True)
class Op:
    """Declares one op.

    Args:
        family: "rows", "channels", "groups" or "instances": the elements that share a mean, and torch's arguments;
            "gated" or "modulated": rows with a gate or with modulations.
        forward, backward: tensors that each pass moves. The forward's reads are the inputs. Tensors for the backward
            are saved in a forward that writes "bits", and in no other one that is timed alone.
        torch: returns torch's function from torch.nn.functional.
        triton_norm: returns this library's function from its package.
        training: False where the statistics are inputs.
        quick: whether a workload belongs to a quick run.
        compiled: whether a quick run compiles the op on a landmark, from the landmark and the dtype.
    """

    title: str
    family: str
    forward: Floor
    backward: Floor
    torch: Callable[[Any], Function]
    triton_norm: Callable[[Any], Function]
    training: bool = True
    quick: Callable[[Workload], bool] = _quick
    compiled: Callable[[Workload, str], bool] = lambda workload, dtype: dtype == "bf16"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Returns the names of a call's tensors, and of the gradients that its backward takes."""
        gradients = [f"d{name}" for name in self.forward.writes]
        return (*self.forward.reads, *(name for name in self.backward.reads if name in gradients))

    @property
    def leaves(self) -> tuple[str, ...]:
        """Returns the inputs that the backward differentiates by."""
        return tuple(name for name in self.forward.reads if name not in STATISTICS)


def of_sum(norm: Function, rounded: Function = lambda total: total) -> Function:
    """Returns a function of x and a residual that normalizes their sum, and returns the sum too."""

    def norm_of_sum(x: Any, residual: Any, *arguments: Any) -> Any:
        total = rounded(x + residual)
        return norm(total, *arguments), total

    return norm_of_sum


def modulated(norm: Function) -> Function:
    """Returns torch's modulated norm of x [samples, ..., features], scale and shift [samples, features], with or
    without a weight."""

    def norm_modulated(x: Any, shape: Any, *arguments: Any) -> Any:
        *weight, scale, shift, eps = arguments
        return norm(x, shape, *weight, eps=eps) * (1 + _to_tokens(scale, x)) + _to_tokens(shift, x)

    return norm_modulated


def modulated_of_sum(norm: Function, rounded: Function = lambda total: total) -> Function:
    """Returns torch's modulated norm of total = residual + residual_gate · x, which is returned too."""

    def modulated_of_total(x: Any, residual: Any, shape: Any, residual_gate: Any, *arguments: Any) -> Any:
        total = rounded(residual + _to_tokens(residual_gate, x) * x)
        return modulated(norm)(total, shape, *arguments), total

    return modulated_of_total


def _to_tokens(modulation: Any, x: Any) -> Any:
    """Returns [samples, features] in the shape [samples, 1, ..., features], which broadcasts to the tokens of x."""
    samples, features = modulation.shape
    return modulation.view(samples, *[1] * (x.dim() - 2), features)


def _gated_by_torch(F: Any, gate_first: bool) -> Function:
    def gated(x: Any, gate: Any, shape: Any, weight: Any, eps: float) -> Any:
        own, by_group = (weight, 1) if weight.dim() == 1 else (None, weight)
        if gate_first:
            return F.rms_norm(x * F.silu(gate), shape, own, eps) * by_group
        return F.rms_norm(x, shape, own, eps) * by_group * F.silu(gate)

    return gated


def _gated(function: Function, gate_first: bool) -> Function:
    """Returns a function of this library with a gate. A weight of each group of features is [groups, features]."""

    def gated(x: Any, gate: Any, shape: Any, weight: Any, eps: float) -> Any:
        named = {"weight" if weight.dim() == 1 else "head_weight": weight}
        return function(x, shape, **named, eps=eps, gate=gate, gate_first=gate_first)

    return gated


def _modulated(function: Function) -> Function:
    def norm(x: Any, shape: Any, *arguments: Any) -> Any:
        *weight, scale, shift, eps = arguments
        return function(x, shape, *weight, eps=eps, scale=scale, shift=shift)

    return norm


def _modulated_of_sum(function: Function) -> Function:
    def norm(x: Any, residual: Any, shape: Any, residual_gate: Any, scale: Any, shift: Any, eps: float) -> Any:
        named = {"residual": residual, "residual_gate": residual_gate, "scale": scale, "shift": shift}
        return function(x, shape, None, None, eps, **named)

    return norm


def _add_relu(F: Any) -> Function:
    return lambda x, residual, *arguments: F.relu(F.batch_norm(x, *arguments) + residual)


def _residual_second(function: Function, **options: Any) -> Function:
    """Returns a function of this library with the residual as the second argument."""
    return lambda x, residual, *arguments: function(x, *arguments, residual=residual, **options)


_AFFINE = moves("x weight bias -> y")
_AFFINE_BACKWARD = moves("x dy weight mean rstd -> dx dweight dbias")
_GATED = moves("x gate weight -> y")
_GATED_BACKWARD = moves("x gate dy weight rstd -> dx dgate dweight")
_REDUCED = moves("x weight bias -> y", reduced="x")
_REDUCED_BACKWARD = moves("x dy weight mean rstd -> dx dweight dbias", reduced="x dy")

OPS = {
    "layer_norm": Op(
        "LayerNorm", "rows", _AFFINE, _AFFINE_BACKWARD,
        lambda F: F.layer_norm, lambda tn: tn.layer_norm,
        compiled=lambda workload, dtype: True,
    ),
    "rms_norm": Op(
        "RMSNorm", "rows", moves("x weight -> y"), moves("x dy weight rstd -> dx dweight"),
        lambda F: F.rms_norm, lambda tn: tn.rms_norm,
    ),
    # In the two with a total, dx is the residual's gradient too.
    "layer_norm_residual": Op(
        "LayerNorm + residual", "rows", moves("x residual weight bias -> y total"),
        moves("total dy dtotal weight mean rstd -> dx dweight dbias"),
        lambda F: of_sum(F.layer_norm), lambda tn: _residual_second(tn.layer_norm),
        quick=_quick_residual,
    ),
    "rms_norm_residual": Op(
        "RMSNorm + residual", "rows", moves("x residual weight -> y total"),
        moves("total dy dtotal weight rstd -> dx dweight"),
        lambda F: of_sum(F.rms_norm), lambda tn: _residual_second(tn.rms_norm),
        quick=_quick_residual,
    ),
    "rms_norm_gated": Op(
        "RMSNorm · SiLU(gate)", "gated", _GATED, _GATED_BACKWARD,
        lambda F: _gated_by_torch(F, False), lambda tn: _gated(tn.rms_norm, False),
    ),
    "rms_norm_gate_first": Op(
        "RMSNorm of x · SiLU(gate)", "gated", _GATED, _GATED_BACKWARD,
        lambda F: _gated_by_torch(F, True), lambda tn: _gated(tn.rms_norm, True),
    ),
    "layer_norm_modulated": Op(
        "LayerNorm, modulated", "modulated",
        moves("x scale shift -> y"), moves("x dy scale mean rstd -> dx dscale dshift"),
        lambda F: modulated(F.layer_norm), lambda tn: _modulated(tn.layer_norm),
    ),
    "rms_norm_modulated": Op(
        "RMSNorm, modulated", "modulated",
        moves("x weight scale shift -> y"), moves("x dy weight scale rstd -> dx dweight dscale dshift"),
        lambda F: modulated(F.rms_norm), lambda tn: _modulated(tn.rms_norm),
    ),
    "layer_norm_modulated_residual": Op(
        "LayerNorm + gated residual, modulated", "modulated",
        moves("x residual residual_gate scale shift -> y total"),
        moves("total x dy dtotal residual_gate scale mean rstd -> dx dresidual dresidual_gate dscale dshift"),
        lambda F: modulated_of_sum(F.layer_norm), lambda tn: _modulated_of_sum(tn.layer_norm),
    ),
    "batch_norm": Op(
        "BatchNorm, training", "channels",
        moves("x weight bias running_mean running_var -> y running_mean running_var", reduced="x"), _REDUCED_BACKWARD,
        lambda F: F.batch_norm, lambda tn: tn.batch_norm,
        compiled=lambda workload, dtype: True,
    ),
    "batch_norm_eval": Op(
        "BatchNorm, evaluation", "channels", moves("x weight bias running_mean running_var -> y"),
        moves("x dy weight running_mean running_var -> dx dweight dbias"),
        lambda F: F.batch_norm, lambda tn: tn.batch_norm,
        training=False, compiled=lambda workload, dtype: False,
    ),
    # The residual's gradient is the activation's, and dx is not. A ResNet is trained channels-last where speed matters.
    "batch_norm_add_relu": Op(
        "BatchNorm + add + ReLU", "channels",
        moves(
            "x residual weight bias running_mean running_var -> y bits mean rstd running_mean running_var",
            reduced="x",
        ),
        moves("x dy bits weight mean rstd -> dx dresidual dweight dbias", reduced="x dy bits"),
        _add_relu, lambda tn: _residual_second(tn.batch_norm, activation="relu"),
        quick=_quick_add_relu,
        compiled=lambda workload, dtype: workload.layout == "channels_last" and dtype == "bf16",
    ),
    "group_norm": Op(
        "GroupNorm", "groups", _REDUCED, _REDUCED_BACKWARD, lambda F: F.group_norm, lambda tn: tn.group_norm
    ),
    "group_norm_silu": Op(
        "GroupNorm + SiLU", "groups", _REDUCED, moves("x dy weight bias mean rstd -> dx dweight dbias", reduced="x dy"),
        lambda F: lambda *arguments: F.silu(F.group_norm(*arguments)),
        lambda tn: lambda *arguments: tn.group_norm(*arguments, activation="silu"),
    ),
    "instance_norm": Op(
        "InstanceNorm", "instances", _REDUCED, _REDUCED_BACKWARD,
        lambda F: F.instance_norm, lambda tn: tn.instance_norm,
    ),
}  # fmt: skip
"""Ops by their names, in the order of tables and pictures."""
TITLE = {name: op.title for name, op in OPS.items()}
FAMILY = {name: op.family for name, op in OPS.items()}


def of_family(*families: str) -> tuple[str, ...]:
    return tuple(name for name, family in FAMILY.items() if family in families)


def torch_functions() -> Functions:
    from torch.nn import functional

    return {name: op.torch(functional) for name, op in OPS.items()}


def triton_norm_functions() -> Functions:
    import triton_norm

    return {name: op.triton_norm(triton_norm) for name, op in OPS.items()}
