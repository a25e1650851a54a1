"""Reproduces the adaptive norms of Hugging Face's diffusers with the kernels, without an import of it.

An adaptive norm multiplies a norm's output by 1 + scale, and adds shift. Both are chunks of a projected conditioning,
such as a timestep's embedding.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from triton_norm import explaining
from triton_norm.converting.gated import COMPUTES_ELSE, SERVED
from triton_norm.converting.joining import is_observed
from triton_norm.dispatch import Explanation, autocasts, explanation, goes_to_triton
from triton_norm.functional_modulated import normalize_modulated
from triton_norm.modules import LayerNorm
from triton_norm.specs import ModulatedOptions, ModulatedTensors, RowOptions
from triton_norm.symbolic import of_sizes

Call = tuple[str, ModulatedTensors, ModulatedOptions]

_UNKNOWN_NORM = "its norm has hooks or another forward, or is of a class that is not known"


class Modulated(NamedTuple):
    """Describes a result norm(x) · (1 + scale) + shift.

    Args:
        scale, shift: numbers of the chunks; shift None: no addition.
        x: name of the argument that is normalized; None: the first one.
        norm: name of the attribute that holds the norm.
    """

    scale: int
    shift: int | None
    x: str | None = None
    norm: str = "norm"


class Adaptive(NamedTuple):
    """Describes an adaptive norm over the last axis.

    Args:
        conditioning: name of the argument that is projected.
        n_chunks: number of chunks of the projected conditioning.
        results: each is a modulated norm, or the number of a chunk that is returned as it is.
        embedding: names of the arguments of the module `emb`, the last by keyword if it is hidden_dtype. Unless `emb`
            is None, it computes the conditioning.
        activation, projection: names of the modules before the chunks; None: none. Without a projection the
            conditioning is [B, n_chunks, D].
        casts: the activated conditioning is cast to x's dtype.
        casts_norm: the norm's result is cast to x's dtype.
        widens: x and the chunks are cast to float32 before the norm, and its modulated result to x's dtype.
        axis: axis of the projected conditioning that is split into chunks.
        expands: a chunk [B, D] modulates all rows of a sample.
        expands_results: the chunks that are returned are [B, 1, D].
        output: name of a module that is applied to the only result, unless it is None.
        batched: describes modules whose attribute chunk_dim is 1.
    """

    conditioning: str
    n_chunks: int
    results: tuple[Modulated | int, ...]
    embedding: tuple[str, ...] = ()
    activation: str | None = "silu"
    projection: str | None = "linear"
    casts: bool = False
    casts_norm: bool = False
    widens: bool = False
    axis: int = 1
    expands: bool = True
    expands_results: bool = False
    output: str | None = None
    batched: "Adaptive | None" = None

    @property
    def modulated(self) -> list[Modulated]:
        return [result for result in self.results if isinstance(result, Modulated)]


_ADA = Adaptive("temb", 2, (Modulated(1, 0),), ("timestep",))
_ZERO = Adaptive("emb", 6, (Modulated(1, 0), 2, 3, 4, 5))
_PRUNED = _ZERO._replace(activation=None, projection=None)
_CONTINUOUS = Adaptive("conditioning_embedding", 2, (Modulated(0, 1),), casts=True)
_VIDEO = Adaptive("temb", 6, (Modulated(1, 0), Modulated(4, 3, "encoder_hidden_states"), 2, 5))
_TEXT_IMAGE = Adaptive(
    "emb", 12, (Modulated(1, 0, norm="norm_x"), 2, 3, 4, 5, Modulated(7, 6, "context", "norm_c"), 8, 9, 10, 11)
)
_COGVIEW_4 = Adaptive(
    "temb",
    12,
    (Modulated(2, 0), 4, 6, 8, 10, Modulated(3, 1, "encoder_hidden_states", "norm_context"), 5, 7, 9, 11),
    activation=None,
    casts_norm=True,
)

ADAPTIVE = {
    "normalization.AdaLayerNorm": _ADA._replace(results=(Modulated(0, 1),), axis=0, expands=False, batched=_ADA),
    "normalization.AdaLayerNormContinuous": _CONTINUOUS,
    "normalization.AdaLayerNormZero": _ZERO._replace(embedding=("timestep", "class_labels", "hidden_dtype")),
    "normalization.AdaLayerNormZeroSingle": Adaptive("emb", 3, (Modulated(1, 0), 2)),
    "normalization.CogVideoXLayerNormZero": _VIDEO._replace(expands_results=True),
    "normalization.CogView3PlusAdaLayerNormZeroTextImage": _TEXT_IMAGE,
    "normalization.LuminaLayerNormContinuous": _CONTINUOUS._replace(
        n_chunks=1, results=(Modulated(0, None),), projection="linear_1", output="linear_2"
    ),
    "normalization.LuminaRMSNormZero": Adaptive("emb", 4, (Modulated(0, None), 1, 2, 3)),
    "normalization.SD35AdaLayerNormZeroX": Adaptive("emb", 9, (Modulated(1, 0), 2, 3, 4, 5, Modulated(7, 6), 8)),
    "transformers.transformer_chroma.ChromaAdaLayerNormContinuousPruned": _PRUNED._replace(
        n_chunks=2, results=(Modulated(1, 0),), casts=True
    ),
    "transformers.transformer_chroma.ChromaAdaLayerNormZeroPruned": _PRUNED._replace(
        embedding=("timestep", "class_labels", "hidden_dtype")
    ),
    "transformers.transformer_chroma.ChromaAdaLayerNormZeroSinglePruned": _PRUNED._replace(
        n_chunks=3, results=(Modulated(1, 0), 2)
    ),
    "transformers.transformer_cogview4.CogView4AdaLayerNormContinuous": _CONTINUOUS._replace(activation=None),
    "transformers.transformer_cogview4.CogView4AdaLayerNormZero": _COGVIEW_4,
    "transformers.transformer_easyanimate.EasyAnimateLayerNormZero": _VIDEO,
    "transformers.transformer_flux3.Flux3AdaLayerNorm": Adaptive(
        "temb", 2, (Modulated(0, 1),), activation="act_fn", axis=-1, expands=False
    ),
    "transformers.transformer_glm_image.GlmImageAdaLayerNormContinuous": _CONTINUOUS._replace(activation=None),
    "transformers.transformer_glm_image.GlmImageAdaLayerNormZero": _COGVIEW_4,
    "transformers.transformer_mochi.MochiRMSNormZero": Adaptive("emb", 4, (Modulated(0, None), 1, 2, 3), widens=True),
}
"""Each key is file.Class, of diffusers.models.file."""

FP32_LAYER_NORM, RMS_NORM = "normalization.FP32LayerNorm", "normalization.RMSNorm"


def path_of(cls: type) -> str:
    """Returns file.Class for a class of diffusers, "" for others."""
    package, _, file = cls.__module__.partition(".models.")
    return f"{file}.{cls.__qualname__}" if package == "diffusers" else ""


def kind_of(norm: Any) -> str | None:
    """Returns "LayerNorm", or the path of diffusers' class of the norm, or None for a class that is not known."""
    cls = type(norm)
    if cls is nn.LayerNorm or cls is LayerNorm:
        return "LayerNorm"
    path = path_of(cls.__dict__.get("original", cls))
    return path if path in (FP32_LAYER_NORM, RMS_NORM) else None


class Inner(NamedTuple):
    """Describes the norm of a module, as it normalizes x.

    Args:
        function: "layer_norm" or "rms_norm".
        dtype: dtype of its result.
    """

    function: str
    shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    dtype: torch.dtype


def _inner(norm: Any, x: Tensor) -> Inner | None:
    """Returns None if the norm computes something else, or raises."""
    kind, weight = kind_of(norm), norm.weight
    if kind is None or (weight is not None and (weight.dtype not in SERVED or weight.shape != x.shape[-1:])):
        return None
    if kind == RMS_NORM:
        dtype = x.dtype if weight is None else weight.dtype
        return None if norm.bias is not None else Inner("rms_norm", x.shape[-1:], weight, None, norm.eps, dtype)
    if tuple(norm.normalized_shape) != tuple(x.shape[-1:]):
        return None
    # diffusers' class casts its result; autocast leaves torch's in float32.
    dtype = torch.float32 if kind == "LayerNorm" and autocasts("layer_norm", x) else x.dtype
    return Inner("layer_norm", norm.normalized_shape, weight, norm.bias, norm.eps, dtype)


def _fits(own: Tensor | None, x: Tensor) -> bool:
    """Decides whether broadcasting the chunk against x changes no length of x, and aligns axes as the kernels do."""
    if own is None:
        return True
    if own.dtype not in SERVED or own.shape[-1:] != x.shape[-1:]:
        return False
    return own.dim() == 1 or (
        own.dim() == x.dim() and all(length in (1, whole) for length, whole in zip(own.shape, x.shape, strict=True))
    )


class AdaptiveNorm:
    """Precedes a listed adaptive norm in the order of inheritance. Calls that the kernels can't serve go to that class.

    The class's own embedding, activation and projection are called. One modulated norm takes the place of the norm, the
    multiplication and the addition.

    Attributes:
        original: the listed class.
        names: names of the arguments of its forward.
        defaults: the defaults of those that have one.
    """

    adaptive: Adaptive
    original: Any
    names: tuple[str, ...]
    defaults: dict[str, Any]

    @property
    def described(self: Any) -> Adaptive:
        adaptive: Adaptive = self.adaptive
        return adaptive.batched if adaptive.batched is not None and self.chunk_dim == 1 else adaptive

    def _bound(self: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any] | None:
        """Returns the call's arguments by name, or None for a call that the class does not take."""
        if len(inputs) > len(self.names):
            return None
        arguments = dict(zip(self.names, inputs, strict=False))
        for name, value in named.items():
            if name not in self.names or name in arguments:
                return None
            arguments[name] = value
        arguments = {**self.defaults, **arguments}
        return arguments if len(arguments) == len(self.names) else None

    def _x(self: Any, part: Modulated, arguments: dict[str, Any]) -> Any:
        return arguments[part.x or self.names[0]]

    def _embeds(self: Any, adaptive: Adaptive) -> bool:
        return bool(adaptive.embedding) and self.emb is not None

    def _conditioning(self: Any, arguments: dict[str, Any]) -> Any:
        """Returns the argument that is projected, or the first that is embedded before."""
        adaptive = self.described
        return arguments[adaptive.embedding[0] if self._embeds(adaptive) else adaptive.conditioning]

    def _obstacle(self: Any, arguments: dict[str, Any]) -> str | None:
        """Returns why the class's own forward has to be called, or None."""
        adaptive = self.described
        if not isinstance(self._conditioning(arguments), Tensor):
            return COMPUTES_ELSE
        for part in adaptive.modulated:
            x, norm = self._x(part, arguments), getattr(self, part.norm)
            if not isinstance(x, Tensor) or x.dtype not in SERVED or x.dim() == 0:
                return COMPUTES_ELSE
            if kind_of(norm) is None or is_observed(norm):
                return _UNKNOWN_NORM
        return None

    def _chunks(self: Any, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        adaptive = self.described
        conditioning = self._conditioning(arguments)
        if self._embeds(adaptive):
            inputs = [arguments[name] for name in adaptive.embedding if name != "hidden_dtype"]
            named = {name: arguments[name] for name in adaptive.embedding if name == "hidden_dtype"}
            conditioning = self.emb(*inputs, **named)
        if adaptive.activation is not None:
            conditioning = getattr(self, adaptive.activation)(conditioning)
        if adaptive.casts:
            conditioning = conditioning.to(self._x(adaptive.modulated[0], arguments).dtype)
        if adaptive.projection is None:
            projected: Tensor = conditioning.flatten(1, 2)
        else:
            projected = getattr(self, adaptive.projection)(conditioning)
        return projected.chunk(adaptive.n_chunks, dim=adaptive.axis)

    def _modulation(
        self: Any, part: Modulated, chunks: tuple[Tensor, ...], adaptive: Adaptive
    ) -> tuple[Tensor, Tensor | None]:
        scale, shift = chunks[part.scale], None if part.shift is None else chunks[part.shift]
        if adaptive.expands:
            scale, shift = scale[:, None], None if shift is None else shift[:, None]
        return scale, shift

    def _call(self: Any, part: Modulated, arguments: dict[str, Any], chunks: tuple[Tensor, ...]) -> Call | None:
        """Returns the arguments of normalize_modulated, or None if the class computes something else, or raises."""
        adaptive = self.described
        scale, shift = self._modulation(part, chunks, adaptive)
        x = self._x(part, arguments)
        inner = of_sizes(_inner, getattr(self, part.norm), x)
        if inner is None or not (of_sizes(_fits, scale, x) and of_sizes(_fits, shift, x)):
            return None
        if adaptive.widens and torch.float64 in (x.dtype, scale.dtype):
            return None
        out_dtype = torch.promote_types(x.dtype if adaptive.casts_norm else inner.dtype, scale.dtype)
        if shift is not None:
            out_dtype = torch.promote_types(out_dtype, shift.dtype)
        if adaptive.widens:
            out_dtype = x.dtype
        options = ModulatedOptions._make(
            (RowOptions._make((inner.shape, inner.eps, None, 0.0, None, out_dtype)), "silu", False, None, False)
        )
        tensors = ModulatedTensors._make((x, None, inner.weight, inner.bias, None, scale, shift, None))
        return inner.function, tensors, options

    def _results(
        self: Any, arguments: dict[str, Any], chunks: tuple[Tensor, ...], normalize: Callable[..., Tensor]
    ) -> Any:
        """Returns the results of forward.

        Args:
            normalize: computes a modulated norm, as normalize_modulated.
        """
        adaptive = self.described
        normalized: dict[tuple[str, str | None], Tensor] = {}  # two results may share a norm

        def composed(part: Modulated) -> Tensor:
            key, x = (part.norm, part.x), self._x(part, arguments)
            if key not in normalized:
                y: Tensor = getattr(self, part.norm)(x.float() if adaptive.widens else x)
                normalized[key] = y.to(x.dtype) if adaptive.casts_norm else y
            scale, shift = self._modulation(part, chunks, adaptive)
            scaled: Tensor = normalized[key] * (1 + (scale.float() if adaptive.widens else scale))
            modulated = scaled if shift is None else scaled + shift
            return modulated.to(x.dtype) if adaptive.widens else modulated

        results = []
        for result in adaptive.results:
            if not isinstance(result, Modulated):
                results.append(chunks[result][:, None] if adaptive.expands_results else chunks[result])
                continue
            call = self._call(result, arguments, chunks)
            if call is None:
                goes_to_triton(COMPUTES_ELSE)
                results.append(composed(result))
            else:
                results.append(normalize(*call, lambda part=result: composed(part)))
        if len(results) > 1:
            return tuple(results)
        output = None if adaptive.output is None else getattr(self, adaptive.output)
        return results[0] if output is None else output(results[0])

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        if not isinstance(self, AdaptiveNorm):  # a wrapper calls it after the module was reverted
            return type(self).forward(self, *inputs, **named)
        own = super().forward  # type: ignore[misc]
        arguments = self._bound(inputs, named)
        if arguments is None:
            return own(*inputs, **named)
        obstacle = self._obstacle(arguments)
        if obstacle is not None:
            goes_to_triton(obstacle)
            return own(*inputs, **named)
        chunks = self._chunks(arguments)
        if len(chunks) != self.described.n_chunks:
            return own(*inputs, **named)  # which raises
        return self._results(arguments, chunks, normalize_modulated)

    def _empty_chunks(self: Any, arguments: dict[str, Any], x: Tensor) -> tuple[Tensor, ...]:
        """Returns chunks of the shapes, strides and dtype that `_chunks` would compute."""
        adaptive, conditioning = self.described, self._conditioning(arguments)
        embeds = self._embeds(adaptive)
        if adaptive.projection is None and not embeds:
            return self._chunks(arguments)  # type: ignore[no-any-return]
        outer = conditioning.shape if embeds else conditioning.shape[:-1]
        dtype = _projected_dtype(getattr(self, adaptive.projection or "emb"), x)
        projected = x.new_empty(*outer, adaptive.n_chunks * x.shape[-1], dtype=dtype)
        return projected.chunk(adaptive.n_chunks, dim=adaptive.axis)

    def explain_call(self: Any, *inputs: Any, **named: Any) -> Explanation:
        """Explains the call. Chunks of the projection's shape and dtype stand for those that it would compute."""
        arguments = self._bound(inputs, named)
        if arguments is None:
            inspect.signature(self.original.forward).bind(self, *inputs, **named)
        adaptive = self.described
        first = adaptive.modulated[0]
        x, obstacle = self._x(first, arguments), self._obstacle(arguments)
        function = "rms_norm" if kind_of(getattr(self, first.norm)) == RMS_NORM else "layer_norm"
        if obstacle is not None:
            return explanation(function, (), x, obstacle)
        chunks = self._empty_chunks(arguments, x)
        calls = [self._call(part, arguments, chunks) for part in adaptive.modulated]
        if any(call is None for call in calls):
            return explanation(function, (), x, COMPUTES_ELSE)
        explained = [explaining.explain_modulated(*call) for call in calls]
        chosen = next((each for each in explained if each.backend == "torch"), explained[0])
        return Explanation(function, chosen.backend, chosen.reason, sum((each.copies for each in explained), ()))


def _projected_dtype(projection: nn.Module, x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    weight = getattr(projection, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else x.dtype


def unknown_norm(module: Any, adaptive: Adaptive) -> str | None:
    """Returns why the module's norms can't be joined with the modulation, or None."""
    for part in adaptive.modulated:
        norm = getattr(module, part.norm, None)
        if kind_of(norm) is None:
            return f"its {part.norm} is a {type(norm).__name__}, whose forward may differ"
    return None
