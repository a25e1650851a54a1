"""Tries adaptive norms of Hugging Face's diffusers on a few numbers, against their description."""

from typing import Any

import torch
from torch import Tensor, nn

from triton_norm import reference, resolve
from triton_norm.converting.adaptive import RMS_NORM, Adaptive, kind_of
from triton_norm.specs import ModulatedOptions, ModulatedTensors


class _First(nn.Module):
    """Returns its first argument: an embedding, for numbers."""

    def forward(self, first: Tensor, *others: Any, **named: Any) -> Tensor:
        return first


class _Multiples(nn.Module):
    """Returns multiples of x side by side: a projection, for numbers."""

    def __init__(self, n_chunks: int) -> None:
        super().__init__()
        self.n_chunks = n_chunks

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x * (number + 1) / self.n_chunks for number in range(self.n_chunks)], -1)


_TINY = 16
"""Columns of the numbers that are tried."""


def _tiny_norm(norm: Any, weights: Tensor) -> Any:
    """Returns a norm of the same class for the first columns, with weights [2, columns] in place of its own."""
    cls: type[nn.Module] = type(norm)
    tiny: Any = cls.__new__(cls)
    nn.Module.__init__(tiny)
    tiny.__dict__.update({name: value for name, value in vars(norm).items() if name[0] != "_" and name != "forward"})
    if "normalized_shape" in vars(norm):
        tiny.normalized_shape = (_TINY,)
    own = norm._parameters
    tiny._parameters.update(
        {
            name: None if own[name] is None else weights[place]
            for place, name in enumerate(("weight", "bias"))
            if name in own
        }
    )
    return tiny


def agrees(probe: Any, x_dtype: torch.dtype, dtype: torch.dtype) -> bool:
    """Decides whether the class computes as listed, within the rounding of its parts, on a few numbers.

    Args:
        probe: a module of the counterpart's class with the module's attributes; its parts are replaced.
        dtype: the conditioning's dtype.
    """
    adaptive: Adaptive = probe.described
    drawn = torch.sin(torch.arange(8.0 * _TINY, device="cpu").square()).view(8, _TINY)
    x = torch.stack([drawn[:4] * factor for factor in (1e-3, 1.0, 1e4)]).to(x_dtype)
    parts = dict(probe._modules)
    for part in adaptive.modulated:
        norm = parts[part.norm]
        parts[part.norm] = _tiny_norm(norm, drawn[4:6].to(dtype if kind_of(norm) == RMS_NORM else x_dtype))
    if adaptive.output is not None and getattr(probe, adaptive.output) is not None:
        parts[adaptive.output] = nn.Identity()
    conditioning = drawn[5] if adaptive.axis == 0 else drawn[5:8]
    if adaptive.axis == -1:
        conditioning = conditioning[:, None].expand(-1, 4, -1)
    multiples = _Multiples(adaptive.n_chunks)
    if adaptive.projection is None:
        conditioning = multiples(conditioning).unflatten(-1, (adaptive.n_chunks, _TINY))
    else:
        parts[adaptive.projection] = multiples
    embeds = probe._embeds(adaptive)
    if embeds:
        parts["emb"] = _First()
    probe.__dict__["_modules"] = parts
    arguments = dict.fromkeys(probe.names) | probe.defaults
    for part in adaptive.modulated:
        arguments[part.x or probe.names[0]] = x if part.x is None else x.flip(1)
    arguments[adaptive.embedding[0] if embeds else adaptive.conditioning] = conditioning.to(dtype)
    expected = probe._results(arguments, probe._chunks(arguments), _by_reference)
    actual = probe.original.forward(probe, **arguments)
    if isinstance(expected, Tensor):
        expected, actual = (expected,), (actual,)
    # torch rounds after the norm, the addition of 1, the multiplication and the addition. All values are below 32.
    tolerance = 32 * max(torch.finfo(x_dtype).eps, torch.finfo(dtype).eps)
    return len(actual) == len(expected) and all(
        one.dtype == other.dtype and one.shape == other.shape and bool((one - other).abs().max() <= tolerance)
        for one, other in zip(actual, expected, strict=True)
    )


def _by_reference(function: str, tensors: ModulatedTensors, options: ModulatedOptions, instead: Any) -> Tensor:
    call = resolve.check_modulated(function, tensors, options)
    return reference.modulate(tensors.x, options.rows.normalized_shape, tensors, call.spec)
