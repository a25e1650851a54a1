"""Small models of transformers whose layers add a residual and normalize the sum, and calls of them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import triton_norm as tn
from support.models import norms_of

if TYPE_CHECKING:
    pass


transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

PICTURE = {"image_size": 8, "patch_size": 4, "num_channels": 3}

DROPOUTS = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"), 0.0)

EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}

MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "llama": ({}, ("post_attention_layernorm",)),
    "mixtral": (EXPERTS, ("post_attention_layernorm",)),
    "gemma2": ({}, ("pre_feedforward_layernorm",)),
    "phi3": ({"resid_pdrop": 0.0}, ("post_attention_layernorm",)),
    "granite": ({"residual_multiplier": 0.3}, ("post_attention_layernorm",)),
    "gpt_neox": (DROPOUTS | {"use_parallel_residual": False}, ("post_attention_layernorm",)),
    "vit": (PICTURE | DROPOUTS, ("layernorm_after",)),
    "siglip_vision_model": (PICTURE | DROPOUTS, ("layer_norm2",)),
    "dinov2": (PICTURE | DROPOUTS, ("norm2",)),
    "bert": (DROPOUTS, ("LayerNorm", "LayerNorm")),
}
"""Options of each model, and the norms of a layer that take a sum."""


def model_of(kind: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    options, _ = MODELS[kind]
    config = transformers.AutoConfig.for_model(kind, **SIZES | options)
    causal = kind in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind != "bert"
    model = (transformers.AutoModelForCausalLM if causal else transformers.AutoModel).from_config(config)
    with torch.no_grad():
        for norm in norms_of(model).values():
            for parameter in norm.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(device, dtype)


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    parameter = next(model.parameters())
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(1, 3, 8, 8).to(parameter)}
    return {"input_ids": torch.randint(3, 32, (2, 3), device=parameter.device)}


def fused(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    assert tn.convert(other, fuse=True).fused
    return other


def unfused(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    assert tn.convert(other).fused == {}
    return other


def run(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the output and the gradients."""
    model.zero_grad()
    y = model(**inputs)[0]
    (y * torch.sin(torch.arange(float(y.numel()), device=y.device)).view_as(y)).sum().backward()
    return y.detach(), {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def run_layer(layer: nn.Module, call: Any = None) -> tuple[Tensor, list[Tensor]]:
    """Returns the output of a decoder layer and its gradients; `call`: the layer, compiled."""
    device = next(layer.parameters()).device
    leaf = torch.sin(torch.arange(48.0, device=device)).view(1, 3, 16).requires_grad_()
    angles = torch.sin(torch.arange(48.0, device=device)).view(2, 1, 3, 8)
    y = (layer if call is None else call)(leaf, position_embeddings=(angles[0], angles[1]))
    gradients = torch.autograd.grad((y * torch.cos(leaf)).sum(), [leaf, *layer.parameters()])
    return y.detach(), list(gradients)
