"""Adaptive norms of Hugging Face's diffusers: every listed class, with arguments for it and inputs."""

import copy
import importlib
import inspect
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import triton_norm as tn

HALF, SINGLE = torch.bfloat16, torch.float32
COLUMNS, WIDTH = 48, 32
"""Columns of x; width of the conditioning where it may differ."""


class Form(NamedTuple):
    """A class with arguments for it.

    Args:
        parts: number of its modulated norms.
        casts: the conditioning is cast to x's type, which the projection needs to have.
    """

    path: str
    arguments: tuple[Any, ...] = (COLUMNS,)
    options: Any = MappingProxyType({})
    parts: int = 1
    casts: bool = False

    def __str__(self) -> str:
        return "-".join([self.path.rpartition(".")[2], *(str(value) for value in self.options.values())])


def forms() -> list[Form]:
    norm, model, both = "normalization.", "transformers.transformer_", (WIDTH, COLUMNS)
    result = [
        Form(norm + "AdaLayerNorm"),
        Form(norm + "AdaLayerNorm", (COLUMNS, 4), {"norm_elementwise_affine": True}),
        Form(norm + "AdaLayerNorm", (WIDTH,), {"output_dim": 2 * COLUMNS, "chunk_dim": 1}),
        Form(norm + "AdaLayerNormZero"),
        Form(norm + "AdaLayerNormZero", (COLUMNS, 4)),
        Form(norm + "AdaLayerNormZero", (COLUMNS,), {"norm_type": "fp32_layer_norm", "bias": False}),
        Form(norm + "AdaLayerNormZeroSingle"),
        Form(norm + "CogVideoXLayerNormZero", both, parts=2),
        Form(norm + "CogView3PlusAdaLayerNormZeroTextImage", both, parts=2),
        Form(norm + "LuminaRMSNormZero", (COLUMNS, 1e-5, True)),
        Form(norm + "SD35AdaLayerNormZeroX", parts=2),
        Form(norm + "LuminaLayerNormContinuous", (COLUMNS, WIDTH), {"out_dim": 8}, casts=True),
        Form(model + "chroma.ChromaAdaLayerNormZeroPruned", (COLUMNS,), {"norm_type": "fp32_layer_norm"}),
        Form(model + "chroma.ChromaAdaLayerNormZeroSinglePruned"),
        Form(model + "chroma.ChromaAdaLayerNormContinuousPruned", (COLUMNS, WIDTH), {"elementwise_affine": False}),
        Form(model + "cogview4.CogView4AdaLayerNormZero", both, parts=2),
        Form(model + "easyanimate.EasyAnimateLayerNormZero", both, parts=2),
        Form(model + "flux3.Flux3AdaLayerNorm"),
        Form(model + "glm_image.GlmImageAdaLayerNormZero", both, parts=2),
        Form(model + "mochi.MochiRMSNormZero", (WIDTH, 4 * COLUMNS)),
    ]
    continuous = norm + "AdaLayerNorm", norm + "LuminaLayerNorm", model + "cogview4.CogView4AdaLayerNorm"
    for path in (*continuous, model + "glm_image.GlmImageAdaLayerNorm"):
        for options in ({"norm_type": "layer_norm"}, {"norm_type": "rms_norm"}):
            result.append(Form(path + "Continuous", (COLUMNS, WIDTH), options, casts=True))
    return result


FORMS = forms()
ZERO = FORMS[3]


def made(form: Form, dtype: torch.dtype = SINGLE, device: str = "cpu") -> nn.Module:
    """Returns a module with random parameters, in evaluation: one of its embeddings drops labels in training."""
    file, _, name = form.path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(f"diffusers.models.{file}"), name)
    except (ModuleNotFoundError, AttributeError):
        pytest.skip("diffusers has no such class")
    module = cls(*form.arguments, **form.options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(device, dtype).eval()


def converted(module: nn.Module) -> nn.Module:
    other = copy.deepcopy(module)
    assert "" in tn.convert(other).converted
    return other


def drawn(module: nn.Module, form: Form, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Returns arguments of the module, by name. The second text is shorter than the first one."""
    embeds, cls = getattr(module, "emb", None) is not None, form.path.rpartition(".")[2]
    width = next((part.in_features for part in module.modules() if isinstance(part, nn.Linear)), COLUMNS)
    pruned = {"ZeroPruned": (2, 6), "ZeroSinglePruned": (2, 3), "ContinuousPruned": (2, 2)}
    chroma = pruned.get(cls.removeprefix("ChromaAdaLayerNorm"))
    outer = (
        chroma
        if chroma
        else (2, 7)
        if cls == "Flux3AdaLayerNorm"
        else ()
        if cls == "AdaLayerNorm" and module.chunk_dim == 0
        else (2,)
    )
    labels = torch.tensor(3) if cls == "AdaLayerNorm" else torch.tensor([3, 1])
    conditioning = None if embeds else torch.randn(*outer, width, device=device).to(dtype)
    every = {name: 3 * torch.randn(2, 7, COLUMNS, device=device) for name in ("x", "hidden_states")}
    every |= {name: torch.randn(2, 4, COLUMNS, device=device) + 2 for name in ("context", "encoder_hidden_states")}
    every = {name: tensor.to(dtype) for name, tensor in every.items()}
    every |= dict.fromkeys(("emb", "temb", "conditioning_embedding"), conditioning)
    if embeds:
        every |= {"timestep": labels.to(device), "class_labels": labels.to(device), "hidden_dtype": dtype}
    names = list(inspect.signature(module.forward).parameters)
    return {name: every[name] for name in names if every.get(name) is not None}


def results(module: nn.Module, arguments: dict[str, Any], seed: int = 0) -> tuple[Any, list[Tensor], list[Tensor]]:
    """Returns the module's result, its tensors, and the gradients of all inputs and parameters."""
    leaves = {
        name: value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    whole = module(**leaves)
    ys = [whole] if isinstance(whole, Tensor) else list(whole)
    generator = torch.Generator().manual_seed(seed)
    dys = [torch.randn(y.shape, generator=generator).to(y) for y in ys]
    inputs = [leaf for leaf in leaves.values() if isinstance(leaf, Tensor) and leaf.requires_grad]
    return whole, ys, list(torch.autograd.grad(ys, [*inputs, *module.parameters()], dys))


def agree(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """torch rounds after the norm, the addition of 1, the multiplication and the addition, and gradients likewise."""
    eps = torch.finfo(dtype).eps
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=8 * eps, atol=8 * eps * other.abs().max().item())
