"""Where a call would go, and what would be copied for it, without making it."""

import inspect
import math
from typing import Any

from torch import Tensor

from triton_norm import checks, functional
from triton_norm.dispatch import Explanation, explanation
from triton_norm.ops import layout, row_launches


def _explain_rows(function: str, input: Tensor, *arguments: Any, **named_arguments: Any) -> Explanation:
    """Of the arguments of layer_norm or rms_norm, which are checked as there."""
    given = inspect.signature(getattr(functional, function)).bind(input, *arguments, **named_arguments)
    given.apply_defaults()
    named = given.arguments
    weight, bias, residual = named["weight"], named.get("bias"), named["residual"]
    shape = checks.rows(function, input, named["normalized_shape"], weight, bias, named["eps"])
    fused = tuple(named[name] for name in ("residual_dtype", "weight_offset", "x_hat_dtype", "out_dtype"))
    if residual is not None or fused != (None, 0.0, None, None):
        checks.fused(function, input, weight, residual, *fused)
    columns = math.prod(shape)
    copied = [
        f"the {name}: its rows are not contiguous, or not evenly spaced"
        for name, tensor in (("input", input), ("residual", residual))
        if tensor is not None and tensor.numel() and row_launches.copies(tensor, columns)
    ]
    return explanation(function, tuple(copied), input, weight, bias, residual, columns=columns)


def explain_batch_norm(*arguments: Any, whole: bool = True, **named_arguments: Any) -> Explanation:
    """Of the arguments of batch_norm, which are checked as there; unless the input is the `whole` batch, it may be of
    one value per channel."""
    given = inspect.signature(functional.batch_norm).bind(*arguments, **named_arguments)
    given.apply_defaults()
    named = given.arguments
    x, residual = named["input"], named["residual"]
    fused = {name: named.pop(name) for name in ("residual", "activation", "negative_slope")}
    checked: list[Any] = [*named.values(), whole]
    checks.batch_norm(*checked)
    checks.activated(x, **fused)
    kind = layout.kind_of(x) if x.numel() else ""
    copied = [
        f"the {name}: neither its channels nor its positions lie side by side"
        for name, tensor in (("input", x), ("residual", residual))
        if tensor is not None and tensor.numel() and layout.copies(tensor, kind)
    ]
    tensors = (named[name] for name in ("running_mean", "running_var", "weight", "bias"))
    return explanation("batch_norm", tuple(copied), x, *tensors, residual)


def explain(target: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Where `target(*args, **kwargs)` would go, and why, and what it would have to copy; computes and moves nothing.

    `target` is layer_norm, rms_norm, batch_norm or one of this library's modules. Raises what the call itself would
    raise for its arguments, and TypeError for another target. A gradient is copied where its strides are unlike its
    input's and it is not one element expanded; that is only known in the backward. Of parameters that a hook exchanges
    before the call, as `fully_shard`'s does, those are explained that are there outside it.
    """
    if target is functional.layer_norm or target is functional.rms_norm:
        return _explain_rows(target.__name__, *args, **kwargs)
    if target is functional.batch_norm:
        return explain_batch_norm(*args, **kwargs)
    explain_call = getattr(target, "explain_call", None)
    if explain_call is None:
        raise TypeError(f"explain(): expected a function or module of triton_norm, but got {target!r}")
    found: Explanation = explain_call(*args, **kwargs)
    return found
