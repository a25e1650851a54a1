"""Reproduces timm's norms with the kernels, those with an activation too, without an import of it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triton_norm import explaining, functional, modules, modules_groups
from triton_norm.converting.gated import COMPUTES_ELSE, SERVED
from triton_norm.converting.joining import Example, Fused, Fusible, built, is_observed, is_reverted, options_for
from triton_norm.dispatch import Explanation, explanation, goes_to_triton
from triton_norm.plain import FLOATING


def _after(norm: nn.Module) -> list[nn.Module]:
    """Returns the modules that timm's class calls on its norm's result."""
    return [norm._modules[name] for name in ("drop", "act") if norm._modules.get(name) is not None]  # type: ignore[misc]


def obstacle(norm: nn.Module) -> str | None:
    """Returns why a module of a listed class should stay of its class, or None."""
    return "timm's fast norm was set when it was made" if getattr(norm, "_fast_norm", False) else None


def _computes_else(norm: Any, x: Any, n_axes: int | None) -> bool:
    """Decides whether the class's own forward has to be called: it raises, records or rounds otherwise.

    Args:
        n_axes: number of axes that the class takes; None: any.
    """
    if not isinstance(x, Tensor) or (n_axes is not None and x.dim() != n_axes):
        return True
    return bool(getattr(norm, "_fast_norm", False))


class _ActivatedNorm(Fused):
    """Joins the activation, unless something is dropped before it."""

    _n_axes: int | None = None

    def _options(self: Any, x: Tensor) -> dict[str, Any]:
        """Returns the arguments by which the norm computes all that follows it, none if it can't."""
        *dropped, activation = _after(self) or [nn.Identity()]
        if any(type(part) is not nn.Identity or is_observed(part) for part in dropped):
            return {}
        return options_for(x, activation) or {}

    def forward(self: Any, x: Tensor) -> Tensor:
        if is_reverted(self):
            return type(self).forward(self, x)  # type: ignore[no-any-return]
        if _computes_else(self, x, self._n_axes):
            goes_to_triton(COMPUTES_ELSE)
            return self.original.forward(self, x)  # type: ignore[no-any-return]
        options = self._options(x)
        y = super().forward(x, **options)  # type: ignore[misc]
        for part in () if options else _after(self):
            y = part(y)
        return y  # type: ignore[no-any-return]

    def explain_call(self: Any, x: Tensor) -> Explanation:
        if _computes_else(self, x, self._n_axes):
            return Explanation(type(self).__name__, "torch", COMPUTES_ELSE)
        return super().explain_call(x, **self._options(x))  # type: ignore[misc, no-any-return]


class TimmBatchNorm(_ActivatedNorm, modules.BatchNorm2d):  # type: ignore[misc]
    """Precedes BatchNormAct2d."""

    _n_axes = 4


class TimmSyncBatchNorm(_ActivatedNorm, modules.SyncBatchNorm):  # type: ignore[misc]
    """Precedes SyncBatchNormAct."""


class TimmGroupNorm(_ActivatedNorm, modules_groups.GroupNorm):  # type: ignore[misc]
    """Precedes GroupNorm, GroupNorm1 and those with an activation."""


class _Rows(Fused):
    """Normalizes rows, and calls the activation.

    Attributes:
        _function: layer_norm or rms_norm.
        _channels_first: the rows lie along axis 1 of four.
        _float32: parameters and statistics are in float32, and the result in the input's dtype.
    """

    _function: Any
    _channels_first = False
    _float32 = False

    def _call(self: Any, x: Any) -> dict[str, Any] | None:
        """Returns the arguments of the function, or None if the class computes something else, or raises."""
        if _computes_else(self, x, 4 if self._channels_first else None) and not (
            self._float32 and isinstance(x, Tensor)
        ):
            return None
        weight, bias = self.weight, getattr(self, "bias", None)
        named = {"normalized_shape": self.normalized_shape, "weight": weight, "eps": self.eps}
        if self._function is functional.layer_norm:
            named["bias"] = bias
        if self._float32:
            if x.dtype not in SERVED or any(each is not None and each.dtype not in SERVED for each in (weight, bias)):
                return None
            named["out_dtype"] = x.dtype
        return named | {"input": x.permute(0, 2, 3, 1) if self._channels_first else x}

    def forward(self: Any, x: Tensor) -> Tensor:
        if is_reverted(self):
            return type(self).forward(self, x)  # type: ignore[no-any-return]
        call = self._call(x)
        if call is None:
            goes_to_triton(COMPUTES_ELSE)
            return self.original.forward(self, x)  # type: ignore[no-any-return]
        y = self._function(**call)
        if self._channels_first:
            y = y.permute(0, 3, 1, 2)
        for part in _after(self):
            y = part(y)
        return y  # type: ignore[no-any-return]

    def explain_call(self: Any, x: Tensor) -> Explanation:
        call = self._call(x)
        if call is None:
            return explanation(self._function.__name__, (), x, COMPUTES_ELSE)
        return explaining.explain(self._function, **call)


class TimmLayerNorm(_Rows):
    """Precedes LayerNorm and LayerNormAct."""

    _function = staticmethod(functional.layer_norm)


class TimmLayerNorm2d(TimmLayerNorm):
    """Precedes LayerNorm2d and LayerNormAct2d."""

    _channels_first = True


class TimmLayerNormFp32(TimmLayerNorm):
    """Precedes LayerNormFp32 and LayerNormActFp32."""

    _float32 = True


class TimmLayerNorm2dFp32(TimmLayerNorm2d):
    """Precedes LayerNorm2dFp32 and LayerNormAct2dFp32."""

    _float32 = True


class TimmRmsNorm(_Rows):
    """Precedes RmsNorm and RmsNormAct."""

    _function = staticmethod(functional.rms_norm)


class TimmRmsNormFp32(TimmRmsNorm):
    """Precedes RmsNormFp32 and RmsNormActFp32."""

    _float32 = True


class TimmRmsNorm2d(TimmRmsNorm):
    """Precedes RmsNorm2d and RmsNormAct2d, for channels-last input: timm's result has the memory format of its input.

    The squares are summed in float32, which timm's class rounds to the input's dtype one by one.
    """

    _channels_first = True

    def _call(self: Any, x: Any) -> dict[str, Any] | None:
        call: dict[str, Any] | None = super()._call(x)
        if call is None or not x.is_contiguous(memory_format=torch.channels_last):
            return None
        if self._float32:
            return call
        weight = call["weight"]
        if x.dtype not in FLOATING or torch.is_autocast_enabled(x.device.type):
            return None
        return call | {"out_dtype": x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)}


class TimmRmsNorm2dFp32(TimmRmsNorm2d):
    """Precedes RmsNorm2dFp32 and RmsNormAct2dFp32."""

    _float32 = True


_DTYPES = torch.float32, torch.bfloat16


def _images() -> Tensor:
    return torch.empty(2, 4, 3, 5, memory_format=torch.channels_last)


def _parts(activated: bool) -> Iterator[dict[str, Any]]:
    if not activated:
        return iter([{}])
    return iter([{"drop": drop, "act": nn.SiLU()} for drop in (nn.Identity(), nn.ReLU())])


def _channel_examples(base: Any, arguments: tuple[Any, ...], activated: bool) -> Callable[[Any], list[Example]]:
    """Returns the `examples` of a subclass of a norm over channels.

    Args:
        arguments: those of the base's constructor.
    """

    def examples(cls: Any) -> list[Example]:
        result = []
        for parts in _parts(activated):
            norm = built(cls)
            base.__init__(norm, *arguments)
            for name, value in ({"_fast_norm": False} | parts).items():
                setattr(norm, name, value)
            result.append(Example(norm, (_images(),)))
        return result

    return examples


def _synchronized_examples(cls: Any) -> list[Example]:
    """Returns examples that exchange nothing: among processes, torch refuses tensors on the CPU in training."""
    alone = not (dist.is_available() and dist.is_initialized())
    examples = _channel_examples(nn.SyncBatchNorm, (4,), activated=True)(cls)
    return [example._replace(trains=alone) for example in examples]


def _row_examples(channels_first: bool, activated: bool, bias: bool) -> Callable[[Any], list[Example]]:
    def examples(cls: Any) -> list[Example]:
        width = 4 if channels_first else 8
        own = {"normalized_shape": (width,), "eps": 1e-5, "elementwise_affine": True, "_fast_norm": False}
        result = []
        for parts in _parts(activated):
            for dtype in _DTYPES:
                tensors = {name: nn.Parameter(torch.ones(width)) for name in ("weight", "bias")[: 1 + bias]}
                x = _images() if channels_first else torch.empty(5, width)
                result.append(Example(built(cls, **own, **tensors, **parts), (x,), dtype=dtype))
        return result

    return examples


def _no_joins(module: Any) -> list[Any]:
    return []


def _listed() -> Iterator[tuple[str, Fusible]]:
    of_rows = {
        "LayerNorm": (TimmLayerNorm, TimmLayerNormFp32, TimmLayerNorm2d, TimmLayerNorm2dFp32),
        "RmsNorm": (TimmRmsNorm, TimmRmsNormFp32, TimmRmsNorm2d, TimmRmsNorm2dFp32),
    }
    for kind, mixins in of_rows.items():
        for suffix, mixin in zip(("", "Fp32", "2d", "2dFp32"), mixins, strict=True):
            for activated, path in ((False, f"norm.{kind}{suffix}"), (True, f"norm_act.{kind}Act{suffix}")):
                examples = _row_examples(mixin._channels_first, activated, kind == "LayerNorm")
                yield path, Fusible(mixin, _no_joins, examples)
    for activated, name, arguments in (
        (False, "norm.GroupNorm", (2, 4)),
        (False, "norm.GroupNorm1", (1, 4)),
        (True, "norm_act.GroupNormAct", (2, 4)),
        (True, "norm_act.GroupNorm1Act", (1, 4)),
    ):
        yield name, Fusible(TimmGroupNorm, _no_joins, _channel_examples(nn.GroupNorm, arguments, activated))
    batch_norm = _channel_examples(nn.BatchNorm2d, (4,), activated=True)
    yield "norm_act.BatchNormAct2d", Fusible(TimmBatchNorm, _no_joins, batch_norm)
    yield "norm_act.SyncBatchNormAct", Fusible(TimmSyncBatchNorm, _no_joins, _synchronized_examples)


TIMM = {f"timm.layers.{path}": fusible for path, fusible in _listed()}
"""Each key is module.Class."""
