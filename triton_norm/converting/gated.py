"""Reproduces the gated RMSNorms of Hugging Face's transformers with the kernels, without an import of it."""

import inspect
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from triton_norm import explaining, reference, resolve
from triton_norm.dispatch import Explanation, goes_to_triton
from triton_norm.functional_modulated import normalize_modulated
from triton_norm.specs import ModulatedOptions, ModulatedTensors, RowOptions
from triton_norm.symbolic import of_sizes

Type = Literal["input", "weight", "promoted"]

COMPUTES_ELSE = "the model's own forward computes something else of these arguments"
# The classes compute float64 in float32, so it is missing here. A set, since `in` compares with a tuple's elements by
# ==, which fails for a torch.fx proxy.
SERVED = frozenset({torch.float32, torch.float16, torch.bfloat16})

ACTIVATIONS = {"silu": "silu", "swish": "silu", "sigmoid": "sigmoid"}
"""The names of activations in transformers, and here."""


class Gating(NamedTuple):
    """Describes a gated RMSNorm over the last axis, or groups of it.

    Args:
        activation: name of the attribute that holds the gate's activation; None: "silu".
        groups: name of the attribute that holds the size or the number of groups; None: one group.
        ranks: numbers of axes that the class takes; None: any.
        gate_first: the input is gated before it is normalized; None: unless the module has `norm_before_gate`.
        x_hat, product, y: dtype that each is rounded to, as in hugging_face.Arithmetic.
    """

    activation: str | None = "activation"
    groups: str | None = None
    ranks: tuple[int, ...] | None = None
    gate_first: bool | None = False
    x_hat: Type | None = None
    product: Type | None = None
    y: Type = "input"


QWEN_3_NEXT = Gating(x_hat="input", product="promoted")
KIMI = Gating()
MAMBA_2 = Gating(None, "group_size", gate_first=True, x_hat="input", y="promoted")
FALCON_H1 = Gating(None, "n_groups", ranks=(2, 3), gate_first=None)

_CLASSES = {
    QWEN_3_NEXT: """
        olmo_hybrid.OlmoHybridRMSNormGated qwen3_5.Qwen3_5RMSNormGated qwen3_5_moe.Qwen3_5MoeRMSNormGated
        qwen3_next.Qwen3NextRMSNormGated qwen4_exp.Qwen4ExpTextRMSNormGated
    """,
    KIMI: """
        bailing_hybrid.BailingHybridRMSNormGated glm5_next.Glm5NextTextRMSNormGated
        kimi_linear.KimiLinearRMSNormGated lara_mini.LaraMiniRMSNormGated
    """,
    MAMBA_2: """
        bamba.BambaRMSNormGated granitemoehybrid.GraniteMoeHybridRMSNormGated mamba2.MambaRMSNormGated
        nemotron_h.NemotronHRMSNormGated zamba2.Zamba2RMSNormGated
    """,
    FALCON_H1: """
        falcon_h1.FalconH1RMSNormGated
    """,
}
"""Each entry is model.Class, of transformers.models.model.modeling_model."""

GATED = {path: gating for gating, paths in _CLASSES.items() for path in paths.split()}


def dtype_of(kind: Type | None, x: Tensor, weight: Tensor) -> torch.dtype | None:
    """Returns the dtype that a listed class rounds to, or None."""
    if kind == "input" or (kind == "promoted" and weight.dtype is x.dtype):  # to promote takes 0.2 µs
        return x.dtype
    if kind == "promoted":
        return torch.promote_types(x.dtype, weight.dtype)
    return weight.dtype if kind == "weight" else None


def takes(function: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Decides whether the function can be called with these arguments."""
    try:
        inspect.signature(function).bind(*inputs, **named)
    except TypeError:
        return False
    return True


def width_of(module: Any, gating: Gating | None) -> int:
    """Returns a number of columns that the module takes."""
    if gating is None or gating.groups is None:
        return 64
    size = int(getattr(module, gating.groups))
    return 2 * size if gating.groups == "group_size" else 64 * size


def _fits(x: Tensor, gate: Tensor, weight: Tensor) -> bool:
    return gate.shape == x.shape and x.shape[-1:] == weight.shape


class GatedRMSNorm:
    """Precedes a listed gated RMSNorm in the order of inheritance. Calls that the kernels can't serve go to that class.

    Attributes:
        original: the listed class.
    """

    gating: Gating
    original: Any

    def _arguments(self: Any, x: Tensor, gate: Any) -> tuple[ModulatedTensors, ModulatedOptions] | None:
        """Returns the arguments of rms_norm, or None if the class computes something else, or raises."""
        gating, weight = self.gating, self.weight
        if not isinstance(gate, Tensor) or weight is None or weight.dim() != 1:
            return None
        activation = ACTIVATIONS.get("silu" if gating.activation is None else getattr(self, gating.activation))
        serves = x.dtype in SERVED and gate.dtype in SERVED and weight.dtype in SERVED and activation is not None
        if not serves or not of_sizes(_fits, x, gate, weight):
            return None
        if gating.ranks is not None and x.dim() not in gating.ranks:
            return None
        gate_first = not self.norm_before_gate if gating.gate_first is None else gating.gate_first
        dtypes = dtype_of(gating.x_hat, x, weight), dtype_of(gating.y, x, weight)
        product = None if gate_first else dtype_of(gating.product, x, weight)
        n_groups = self._n_groups(weight.shape[0])
        if n_groups > 1:
            x, gate, weight = (tensor.unflatten(-1, (n_groups, -1)) for tensor in (x, gate, weight))
        inner = (None, None, gate, weight) if n_groups > 1 else (weight, None, gate, None)
        rows = RowOptions._make((x.shape[-1:], self.variance_epsilon, None, 0.0, *dtypes))
        options = ModulatedOptions._make((rows, activation, gate_first, product, n_groups > 1))
        return ModulatedTensors._make((x, None, *inner, None, None)), options

    def _n_groups(self: Any, n_cols: int) -> int:
        groups = self.gating.groups
        if groups is None:
            return 1
        return n_cols // int(self.group_size) if groups == "group_size" else int(getattr(self, groups))

    def _bound(self: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Returns the call's arguments (x, gate), or None for a call that the class does not take."""
        try:
            bound = inspect.signature(self.original.forward).bind(self, *inputs, **named)
        except TypeError:
            return None
        bound.apply_defaults()
        _, x, gate = bound.args
        return x, gate

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        if not isinstance(self, GatedRMSNorm):  # a wrapper calls it after the module was reverted
            return type(self).forward(self, *inputs, **named)
        own = super().forward  # type: ignore[misc]
        bound = self._bound(inputs, named) if len(inputs) != 2 or named else inputs
        arguments = None if bound is None else self._arguments(*bound)
        if arguments is None:
            if bound is not None:
                goes_to_triton(COMPUTES_ELSE)
            return own(*inputs, **named)
        x, gate = bound
        y = normalize_modulated("rms_norm", *arguments, lambda: own(x, gate))
        return y.reshape(x.shape)

    def expected(self: Any, x: Tensor, gate: Tensor) -> Tensor | None:
        """Returns y by reference.py, or None if the class computes something else."""
        arguments = self._arguments(x, gate)
        if arguments is None:
            return None
        tensors, options = arguments
        call = resolve.check_modulated("rms_norm", tensors, options)
        return reference.modulate(tensors.x, options.rows.normalized_shape, tensors, call.spec).reshape(x.shape)

    def explain_call(self: Any, *inputs: Any, **named: Any) -> Explanation:
        bound = self._bound(inputs, named)
        if bound is None:
            inspect.signature(self.original.forward).bind(self, *inputs, **named)
        arguments = self._arguments(*bound)
        if arguments is None:
            return Explanation("rms_norm", "torch", COMPUTES_ELSE)
        return explaining.explain_modulated("rms_norm", *arguments)
