"""Fused layers of transformers whose parts are changed later."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from support.decoders import (
    fused,
    inputs_of,
    model_of,
    run_layer,
    unfused,
)
from support.operators import Operators

if TYPE_CHECKING:
    pass


class Wrapper(nn.Module):
    """Wraps a part, as adapters do."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * 1.5


def hooked(layer: nn.Module) -> None:
    layer.post_attention_layernorm.register_forward_hook(lambda norm, inputs, y: y * 2.0)


def doubled_input(layer: nn.Module) -> None:
    layer.post_attention_layernorm.register_forward_pre_hook(lambda norm, inputs: (inputs[0] * 2.0,))


def wrapped_norm(layer: nn.Module) -> None:
    layer.post_attention_layernorm = Wrapper(layer.post_attention_layernorm)


def another_forward(layer: nn.Module) -> None:
    norm = layer.post_attention_layernorm
    norm.forward = lambda x: type(norm).forward(norm, x) * 2.0


def another_class(layer: nn.Module) -> None:
    norm = layer.post_attention_layernorm
    cls = type(norm)
    norm.__class__ = type("Own", (cls,), {"forward": lambda self, x: cls.forward(self, x) * 2.0})


def wrapped_projection(layer: nn.Module) -> None:
    layer.self_attn.q_proj = Wrapper(layer.self_attn.q_proj)


def wide_stream(layer: nn.Module) -> None:
    layer.self_attn.register_forward_hook(lambda part, inputs, y: (y[0].double(), *y[1:]))
    layer.mlp.register_forward_pre_hook(lambda part, inputs: (inputs[0].float(),))
    layer.register_forward_hook(lambda layer, inputs, y: y.float())


def narrow_attention(layer: nn.Module) -> None:
    layer.self_attn.register_forward_hook(lambda part, inputs, y: (y[0].bfloat16(), *y[1:]))


def broadcast(layer: nn.Module) -> None:
    layer.self_attn.register_forward_hook(lambda part, inputs, y: (y[0][:, :1], *y[1:]))


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        doubled_input,
        wrapped_norm,
        another_forward,
        another_class,
        wrapped_projection,
        wide_stream,
        narrow_attention,
        broadcast,
    ],
)
def test_changes_to_a_fused_layer_act_as_on_its_parts(change, device):
    layer = model_of("llama", device).model.layers[0]
    ours, theirs = fused(layer), unfused(layer)
    before, _ = run_layer(theirs)
    for each in (ours, theirs):
        change(each)
    (y, grads), (expected_y, expected_grads) = run_layer(ours), run_layer(theirs)
    assert torch.equal(y, expected_y)
    assert not torch.equal(y, before)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)


def test_a_sum_of_two_types_is_one_launch(device):
    """Adds an attention's output to a residual stream in float32, as under autocast."""
    model = model_of("llama", device)
    inputs = inputs_of(model)
    results, additions = [], []
    for each in (unfused(model), fused(model)):
        with torch.autocast(device, torch.bfloat16), Operators() as operators:
            results.append(each(**inputs).logits)
        additions.append(operators.names.count("aten.add.Tensor"))
    assert torch.equal(*results)
    assert additions[0] - additions[1] == 2
