"""Names what travels through a call: its tensors, what was asked for, and the spec that follows from that.

A spec holds no tensor, is hashable, and is the same for all calls that the same kernels serve. Bundles are made by
`_make`: of a NamedTuple's constructor torch.compile guards on an address, which is another one in another process.
"""

import enum
from typing import Any, NamedTuple

import torch
from torch import Tensor


class RowTensors(NamedTuple):
    """The tensors of a LayerNorm's or RMSNorm's call.

    x, residual: [*, *normalized_shape].
    weight, bias: [*normalized_shape]; RMSNorm has no bias.
    """

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class RowOptions(NamedTuple):
    """The other arguments of layer_norm and rms_norm, as they were given; functional.py documents them."""

    normalized_shape: Any
    eps: Any
    residual_dtype: Any = None
    weight_offset: Any = 0.0
    x_hat_dtype: Any = None
    out_dtype: Any = None


class RowSpec(NamedTuple):
    """What a LayerNorm or RMSNorm computes, in the order of the operators' schemas.

    n_cols: elements of a row.
    centred: whether the mean is subtracted: LayerNorm's, otherwise RMSNorm's.
    out_dtype: of y; None is x's.
    total_dtype: of x + residual; None is the residual's.
    x_hat_dtype: what x_hat is rounded to before the weight is applied; None: it is not rounded.
    """

    n_cols: int
    eps: float
    weight_offset: float
    centred: bool
    out_dtype: torch.dtype | None = None
    total_dtype: torch.dtype | None = None
    x_hat_dtype: torch.dtype | None = None


class BatchNormTensors(NamedTuple):
    """The tensors of a BatchNorm's call.

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
    """Those of a BatchNorm's tensors that have gradients."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class BatchNormOptions(NamedTuple):
    """The other arguments of batch_norm, as they were given; functional.py documents them."""

    training: Any
    momentum: Any
    eps: Any
    activation: Any = None
    negative_slope: Any = 0.01


class BatchNormSpec(NamedTuple):
    """What a BatchNorm computes.

    training: whether the statistics are the batch's, not the running ones.
    momentum: of the running statistics; None averages over batches.
    slope: leaky_relu's below 0.
    """

    training: bool
    momentum: float | None
    eps: float
    activation: str | None = None
    slope: float = 0.0


class Epilogue(NamedTuple):
    """The activation behind a BatchNorm."""

    activation: str | None
    slope: float


class Formula(NamedTuple):
    """The part of a BatchNorm's spec that an operator takes: what running statistics do is another one's."""

    eps: float
    epilogue: Epilogue

    def spec(self, training: bool) -> BatchNormSpec:
        return BatchNormSpec(training, 0.0, self.eps, *self.epilogue)


class Phase(enum.Enum):
    """The halves of a BatchNorm's work that a launch does, or that a call asks for.

    REDUCE finds the statistics, or the sums of a backward; APPLY computes y or dx from them; FUSED is both.
    """

    FUSED = enum.auto()
    REDUCE = enum.auto()
    APPLY = enum.auto()

    @property
    def reduces(self) -> bool:
        return self is not Phase.APPLY

    @property
    def applies(self) -> bool:
        return self is not Phase.REDUCE


class Wanted(NamedTuple):
    """The types of the gradients that a backward is asked for, None for those that it is not."""

    dx_dtype: torch.dtype | None
    dresidual_dtype: torch.dtype | None
    dweight_dtype: torch.dtype | None
    dbias_dtype: torch.dtype | None
