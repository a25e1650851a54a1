"""Decomposes the forward of LayerNorm and RMSNorm to torch functions, which Inductor fuses with their neighbours."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from triton_norm import reference
from triton_norm.specs import ModulatedSpec, ModulatedTensors, RowSpec

T = TypeVar("T")

VERSION, MODULATED_VERSION = 3, 2
"""Every change of a decomposition increments its version: torch's caches of compiled code identify an operator by its
name."""

NAME = f"_rows_forward_v{VERSION}"
MODULATED = f"_modulated_rows_forward_v{MODULATED_VERSION}"


def _axes(x: Tensor, n_cols: int) -> tuple[int, ...]:
    """Returns the trailing axes that form a row of n_cols elements."""
    n_axes, n = 1, x.shape[-1]
    while n != n_cols:
        n_axes += 1
        n = n * x.shape[-n_axes]
    return tuple(range(-n_axes, 0))


def _stored(x: Tensor) -> Tensor:
    """Returns a 16-bit tensor rounded as in memory.

    Inductor computes such tensors in float32, and may use the unrounded values in the statistics, but store the rounded
    ones for the backward. It removes casts, but not operations on the bits.
    """
    return x.view(torch.int16).bitwise_or(0).view(x.dtype) if x.itemsize == 2 else x


def decomposed(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    saves: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the operator's (y, total, statistics, rstd); results that the call doesn't need are empty.

    Statistics are LayerNorm's means; for RMSNorm they are rstd, and rstd is empty. The moments are computed as torch's
    LayerNorm computes them under Inductor, which makes one reduction of both.
    """
    spec = RowSpec(*options)
    normalized, total = x, None
    if residual is not None:
        dtype = spec.total_dtype or residual.dtype
        normalized = total = reference.add(x, residual, dtype).to(dtype).contiguous()
    nothing = x.new_empty(0)
    axes = _axes(x, spec.n_cols)
    wide = (_stored(normalized) if saves else normalized).to(reference.compute_dtype(x, total))
    if spec.centred:
        var, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
        rstd = torch.rsqrt(var + spec.eps)
        x_hat, statistics = (wide - mean) * rstd, (mean.flatten(), rstd.flatten())
    else:
        rstd = torch.rsqrt(wide.square().mean(axes, keepdim=True) + spec.eps)
        x_hat, statistics = wide * rstd, (rstd.flatten(), nothing)
    if spec.x_hat_dtype is not None:
        x_hat = x_hat.to(spec.x_hat_dtype).to(wide.dtype)
    y = reference.affine(x_hat, weight, bias, spec.weight_offset).to(spec.out_dtype or x.dtype).contiguous()
    return y, nothing if total is None else total, *(statistics if saves else (nothing, nothing))


def decomposed_modulated(x: Tensor, residual: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the operator's (y, total, statistics); results that the call doesn't need are empty.

    Args:
        arguments: the other fields of ModulatedTensors, `saves`, and the fields of ModulatedSpec, flat.
    """
    n_tensors, n_rows = len(ModulatedTensors._fields) - 2, len(RowSpec._fields)
    inner, (saves, *options) = arguments[:n_tensors], arguments[n_tensors:]
    spec = ModulatedSpec(RowSpec(*options[:n_rows]), *options[n_rows:])
    tensors = ModulatedTensors._make((x, residual, *inner))
    total, nothing, axes = x, x.new_empty(0), _axes(x, spec.rows.n_cols)
    n_outer = x.dim() - len(axes)
    if residual is not None:
        dtype = spec.rows.total_dtype or residual.dtype
        if tensors.residual_gate is None:
            total = reference.add(x, residual, dtype)
        else:
            total = reference.add_gated(x, residual, tensors.residual_gate, n_outer, dtype)
        total = total.to(dtype).contiguous()
    row = x.shape[n_outer:]
    read = (_stored(total) if saves else total).to(reference.compute_dtype(x, total))
    if spec.rows.out_dtype is None:
        spec = spec._replace(rows=spec.rows._replace(out_dtype=x.dtype))
    y = reference.modulate(read, row, tensors, spec).contiguous()
    statistics = reference.statistics(read, tensors.gate, axes, spec) if saves else nothing
    return y, nothing if residual is None else total, statistics


DECOMPOSITIONS: dict[str, Callable[..., Any]] = {NAME: decomposed, MODULATED: decomposed_modulated}


def _register(name: str) -> None:
    """Adds a decomposition to Inductor's table and its cached copy, which another thread may be building without it."""
    from torch._inductor import decomposition

    from triton_norm.library import DEFINED

    operator = DEFINED[name]
    decomposition.decompositions[operator] = DECOMPOSITIONS[name]
    if decomposition.fast_random_decomps().get(operator) is not DECOMPOSITIONS[name]:
        decomposition.fast_random_decomps.cache_clear()


def registering(fake: Callable[..., T], name: str) -> Callable[..., T]:
    """Wraps the operator's fake, which runs before any compilation, to register the decomposition with Inductor."""

    def register_and_fake(*arguments: Any) -> T:
        with torch.utils._python_dispatch._disable_current_modes():
            _register(name)
        return fake(*arguments)

    return register_and_fake
