"""Defines the types that travel through a call: its tensors, its options as passed, and the spec derived from them.

A spec holds no tensor, is hashable, and is equal for all calls that the same kernels serve. Bundles are made by
`_make`: torch.compile guards on the address of a NamedTuple's constructor, which differs between processes.
"""

import enum
from typing import Any, NamedTuple

import torch
from torch import Tensor


class RowTensors(NamedTuple):
    """Holds the tensors of a LayerNorm or RMSNorm call.

    Args:
        x, residual: [*, *normalized_shape].
        weight, bias: [*normalized_shape]; RMSNorm has no bias.
    """

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class RowOptions(NamedTuple):
    """Holds the other arguments of layer_norm and rms_norm, as passed; functional.py documents them."""

    normalized_shape: Any
    eps: Any
    residual_dtype: Any = None
    weight_offset: Any = 0.0
    x_hat_dtype: Any = None
    out_dtype: Any = None


class RowSpec(NamedTuple):
    """Specifies a LayerNorm or RMSNorm, in the order of the operators' schemas.

    Args:
        n_cols: elements of a row.
        centred: subtracts the mean: LayerNorm; otherwise RMSNorm.
        out_dtype: dtype of y; None: x's.
        total_dtype: dtype of x + residual; None: the residual's.
        x_hat_dtype: dtype that x_hat is rounded to before the weight; None: no rounding.
    """

    n_cols: int
    eps: float
    weight_offset: float
    centred: bool
    out_dtype: torch.dtype | None = None
    total_dtype: torch.dtype | None = None
    x_hat_dtype: torch.dtype | None = None


class ModulatedTensors(NamedTuple):
    """Holds the tensors of a LayerNorm or RMSNorm call with a gate or a modulation.

    Args:
        x, residual, gate: [*, *normalized_shape].
        weight, bias: [*normalized_shape].
        scale, shift, residual_gate: [*, *normalized_shape]; the leading axes broadcast against x's, and may be missing
            behind the first ones. scale may be the weights [H, *normalized_shape] of x's last axis before these.
    """

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    residual_gate: Tensor | None


class ModulatedOptions(NamedTuple):
    """Holds the other arguments of layer_norm and rms_norm with a gate or a modulation, as passed.

    Args:
        rows: those that every call has.
        per_head: the call's head_weight is passed as the scale.
    """

    rows: RowOptions
    gate_activation: Any = "silu"
    gate_first: Any = False
    product_dtype: Any = None
    per_head: bool = False


class ModulatedSpec(NamedTuple):
    """Specifies a LayerNorm or RMSNorm with a gate or a modulation, in the order of the operators' schemas.

    Args:
        gate_activation: name of the gate's activation; None: the gate itself.
        gate_first: x is gated before it is normalized.
        product_dtype: dtype that the normalized x is rounded to before it is gated; None: no rounding.
        scale_offset: added to the scale.
        per_head: scale has a row for each of the last axis before normalized_shape.
    """

    rows: RowSpec
    gate_activation: str | None
    gate_first: bool
    product_dtype: torch.dtype | None
    scale_offset: float
    per_head: bool


class BatchNormTensors(NamedTuple):
    """Holds the tensors of a BatchNorm call.

    Args:
        x, residual: [N, C, *].
        weight, bias, running_mean, running_var: [C].
        num_batches_tracked: one integer.
    """

    x: Tensor
    residual: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None


class Inputs(NamedTuple):
    """Holds the tensors of a call over channels that have gradients.

    Args:
        x, residual: [N, C, *].
        weight, bias: [C].
    """

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class BatchNormOptions(NamedTuple):
    """Holds the other arguments of batch_norm, as passed; functional.py documents them."""

    training: Any
    momentum: Any
    eps: Any
    activation: Any = None
    negative_slope: Any = 0.01


class BatchNormSpec(NamedTuple):
    """Specifies a BatchNorm.

    Args:
        training: uses the batch's statistics, not the running ones.
        momentum: weight of the batch in the running statistics; None: 1 / number of batches.
        slope: leaky_relu's slope below 0.
    """

    training: bool
    momentum: float | None
    eps: float
    activation: str | None = None
    slope: float = 0.0


class GroupNormOptions(NamedTuple):
    """Holds the other arguments of group_norm, as passed; functional_groups.py documents them."""

    num_groups: Any
    eps: Any
    activation: Any = None
    negative_slope: Any = 0.01


class InstanceNormOptions(NamedTuple):
    """Holds the other arguments of instance_norm, as passed; functional_groups.py documents them."""

    use_input_stats: Any
    momentum: Any
    eps: Any
    activation: Any = None
    negative_slope: Any = 0.01


class GroupNormSpec(NamedTuple):
    """Specifies a GroupNorm, or an InstanceNorm with the input's own statistics.

    Args:
        n_groups: groups of channels of a sample; InstanceNorm: the number of channels.
        slope: leaky_relu's slope below 0.
        out_dtype: dtype of y; None: x's.
    """

    n_groups: int
    eps: float
    activation: str | None = None
    slope: float = 0.0
    out_dtype: torch.dtype | None = None


class Epilogue(NamedTuple):
    """Holds the activation behind a BatchNorm."""

    activation: str | None
    slope: float


class Formula(NamedTuple):
    """Holds the part of a BatchNormSpec that an operator needs. Another operator updates the running statistics."""

    eps: float
    epilogue: Epilogue

    def spec(self, training: bool) -> BatchNormSpec:
        return BatchNormSpec(training, 0.0, self.eps, *self.epilogue)


class Phase(enum.Enum):
    """Names halves of BatchNorm's work: REDUCE computes statistics, or a backward's sums, APPLY y or dx, FUSED both."""

    FUSED = enum.auto()
    REDUCE = enum.auto()
    APPLY = enum.auto()

    @property
    def reduces(self) -> bool:
        return self is not Phase.APPLY

    @property
    def applies(self) -> bool:
        return self is not Phase.REDUCE


class GradientDtypes(NamedTuple):
    """Holds the dtypes of the gradients that a backward has to compute; None for the others."""

    dx_dtype: torch.dtype | None
    dresidual_dtype: torch.dtype | None
    dweight_dtype: torch.dtype | None
    dbias_dtype: torch.dtype | None


class ModulatedGradientDtypes(NamedTuple):
    """Holds the dtypes of the gradients of ModulatedTensors that a backward has to compute; None for the others."""

    dx_dtype: torch.dtype | None
    dresidual_dtype: torch.dtype | None
    dweight_dtype: torch.dtype | None
    dbias_dtype: torch.dtype | None
    dgate_dtype: torch.dtype | None
    dscale_dtype: torch.dtype | None
    dshift_dtype: torch.dtype | None
    dresidual_gate_dtype: torch.dtype | None
