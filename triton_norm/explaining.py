"""Explains where a call would go, and which tensors it would copy, without running it."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from triton_norm import functional, functional_groups, overrides, resolve
from triton_norm.channels import group_layout, layout
from triton_norm.dispatch import Explanation, explained_by, explanation
from triton_norm.functional_modulated import bundled, is_plain
from triton_norm.rows import sharded
from triton_norm.rows.layout import copies
from triton_norm.rows.modulation import copied_modulations
from triton_norm.specs import (
    BatchNormOptions,
    BatchNormTensors,
    GroupNormOptions,
    GroupNormSpec,
    Inputs,
    InstanceNormOptions,
    ModulatedOptions,
    ModulatedTensors,
    RowOptions,
    RowTensors,
)


def _named(function: Any, arguments: tuple[Any, ...], named_arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns a call's arguments by name, defaults included, and the input as x, too."""
    try:
        bound = inspect.signature(function).bind(*arguments, **named_arguments)
    except TypeError as error:
        raise TypeError(f"{function.__name__}(): {error}") from None
    bound.apply_defaults()
    return {**bound.arguments, "x": bound.arguments["input"]}


def _bundle(kind: Any, named: dict[str, Any]) -> Any:
    """Returns a NamedTuple of this type with the arguments that its fields name, None for those that are missing."""
    return kind._make(named.get(name) for name in kind._fields)


def _unsavable(inputs: dict[str, Tensor | None], parameters: Iterable[Tensor | None]) -> list[str]:
    """Lists the inputs that have to be copied for autograd to save them."""
    tensors = [tensor for tensor in (*inputs.values(), *parameters) if tensor is not None]
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
        return []
    return [
        f"the {name}: it was made under torch.inference_mode, and autograd can't save it"
        for name, tensor in inputs.items()
        if tensor is not None and tensor.is_inference()
    ]


def _explain_rows(function: str, named: dict[str, Any]) -> Explanation:
    tensors, options = _bundle(RowTensors, named), _bundle(RowOptions, named)
    modulation = tuple(named[name] for name in ("gate", "scale", "shift", "residual_gate", "head_weight"))
    of_gate = named["gate_activation"], named["gate_first"], named["product_dtype"]
    overriding = overrides.overriding_argument((*tensors, *modulation))
    if overriding is not None:
        return explained_by(function, overriding)
    if not is_plain(modulation, of_gate):
        inputs, (_, *rest) = bundled(function, tensors, modulation, options, of_gate)
        return explain_modulated(function, ModulatedTensors(*inputs), ModulatedOptions(options, *rest))
    call = resolve.check_rows(function, tensors, options)
    x, residual, *_ = tensors if call.sharding is None else sharded.local_tensors(tensors)
    copied = _copied_rows({"input": x, "residual": residual}, call.spec.n_cols)
    if tensors.residual is None:  # with a residual the total is saved
        copied += _unsavable({"input": tensors.x}, (tensors.weight, tensors.bias))
    return explanation(function, tuple(copied), tensors.x, call.reason)


def _copied_rows(tensors: dict[str, Tensor | None], n_cols: int) -> list[str]:
    return [
        f"the {name}: its columns are not adjacent, or its rows run along more than three axes"
        for name, tensor in tensors.items()
        if tensor is not None and tensor.numel() and copies(tensor, n_cols)
    ]


def explain_modulated(function: str, tensors: ModulatedTensors, options: ModulatedOptions) -> Explanation:
    """Explains a call of layer_norm or rms_norm with a gate or a modulation, after the same checks."""
    call = resolve.check_modulated(function, tensors, options)
    x, gate, n_cols = tensors.x, tensors.gate, call.spec.rows.n_cols
    copied = _copied_rows({"input": x, "residual": tensors.residual, "gate": gate}, n_cols)
    if x.numel():
        copied += [
            f"the {'head_weight' if options.per_head and name == 'scale' else name}: {why}"
            for name, why in copied_modulations(tensors, call.spec).items()
        ]
    saved = {"gate": gate}
    if tensors.residual is None or tensors.residual_gate is not None:
        saved["input"] = x
    inner = tensors.weight, tensors.bias, tensors.scale, tensors.shift, tensors.residual_gate
    copied += _unsavable(saved, inner)
    return explanation(function, tuple(copied), x, call.reason)


def explain_batch_norm(tensors: BatchNormTensors, options: BatchNormOptions, whole: bool = True) -> Explanation:
    """Explains a call of batch_norm, after the same checks.

    Args:
        whole: x is the whole batch; otherwise it may have one value a channel.
    """
    return _explain_channels("batch_norm", tensors, options, functools.partial(resolve.check_batch_norm, whole=whole))


def explain_group_norm(tensors: Inputs, options: GroupNormOptions) -> Explanation:
    """Explains a call of group_norm, after the same checks."""
    return _explain_channels("group_norm", tensors, options, resolve.check_group_norm)


def explain_instance_norm(tensors: BatchNormTensors, options: InstanceNormOptions) -> Explanation:
    """Explains a call of instance_norm, after the same checks."""
    return _explain_channels("instance_norm", tensors, options, resolve.check_instance_norm)


def _explain_channels(
    function: str, tensors: Any, options: Any, check: Callable[[Any, Any], resolve.Call]
) -> Explanation:
    overriding = overrides.overriding_argument((*tensors, *options))
    if overriding is not None:
        return explained_by(function, overriding)
    call = check(tensors, options)
    x, residual, weight, bias, *_ = tensors
    read: Any = layout
    reason = "neither its channels nor its positions are adjacent"
    if isinstance(call.spec, GroupNormSpec):
        read, reason = group_layout, "a sample has gaps, and is neither channels-first nor channels-last"
    kind = read.kind_of(x) if x.numel() else ""
    copied = [
        f"the {name}: {reason}"
        for name, tensor in (("input", x), ("residual", residual))
        if tensor is not None and tensor.numel() and read.copies(tensor, kind)
    ]
    saved: dict[str, Tensor | None] = {"input": x}
    if options.activation is not None:
        saved["residual"] = residual
    copied += _unsavable(saved, (weight, bias))
    return explanation(function, tuple(copied), x, call.reason)


_OVER_CHANNELS: dict[Any, tuple[Any, Any, Callable[[Any, Any], Explanation]]] = {
    functional.batch_norm: (BatchNormTensors, BatchNormOptions, explain_batch_norm),
    functional_groups.group_norm: (Inputs, GroupNormOptions, explain_group_norm),
    functional_groups.instance_norm: (BatchNormTensors, InstanceNormOptions, explain_instance_norm),
}
"""Each function over channels has the types of its tensors and options, and the function that explains them."""


def explain(target: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Explains where `target(*args, **kwargs)` would go, why, and which tensors it would copy. Runs nothing.

    A gradient is copied if its strides differ from its input's and it is not one element expanded, which is known in
    the backward only. Hooks that exchange parameters before a call, as `fully_shard`'s, don't run: the explanation is
    for the parameters outside the call.

    Args:
        target: layer_norm, rms_norm, batch_norm, group_norm, instance_norm or a module of this library.

    Returns:
        an `Explanation`.

    Raises:
        TypeError: another target. Errors of the call's arguments are those of the call itself.
    """
    if target is functional.layer_norm or target is functional.rms_norm:
        return _explain_rows(target.__name__, _named(target, args, kwargs))
    for function, (tensors, options, explain_call) in _OVER_CHANNELS.items():
        if target is function:
            named = _named(function, args, kwargs)
            return explain_call(_bundle(tensors, named), _bundle(options, named))
    own = getattr(target, "explain_call", None) if isinstance(target, nn.Module) else None
    if own is None:
        raise TypeError(f"explain(): expected a function or module of triton_norm, but got {target!r}")
    result: Explanation = own(*args, **kwargs)
    return result
