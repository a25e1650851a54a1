"""Gradients that y and total require, as in torch's composition: total where a part of the sum does."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import triton_norm

SUMMED = {"x", "residual", "residual_gate"}
SHAPE = (2, 3, 8)
FORMS = {
    "plain": ("weight",),
    "gated": ("weight", "gate"),
    "modulated": ("scale", "shift", "residual_gate"),
}
CASES = [(form, leaf) for form, own in FORMS.items() for leaf in ("x", "residual", *own)]


class Passed(TorchDispatchMode):
    """Runs operators as they are; calls become operators."""

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        return operator(*arguments, **(named or {}))


def results(tensors, how):
    def function(x, weight=None, **named):
        return triton_norm.rms_norm(x, (8,), weight, **named)

    if how == "compiled":
        return torch.compile(function, backend="aot_eager", fullgraph=True)(**tensors)
    if how == "operators":
        with Passed():
            return function(**tensors)
    with triton_norm.backend(how):
        return function(**tensors)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("form", "leaf"), CASES)
def test_total_requires_a_gradient_if_a_part_of_the_sum_does(form, leaf, device):
    """Layers behind a frozen sum would otherwise compute gradients that nothing takes."""
    shapes = dict.fromkeys(("weight",), (8,)) | dict.fromkeys(("scale", "shift", "residual_gate"), (2, 8))
    named = ("x", "residual", *FORMS[form])
    tensors = {name: torch.randn(shapes.get(name, SHAPE), device=device) for name in named}
    gradients = []
    for how in ("triton", "torch", "operators", "compiled") if leaf in ("residual", "weight") else ("triton", "torch"):
        own = tensors | {leaf: tensors[leaf].clone().requires_grad_()}
        y, total = results(own, how)
        assert (y.requires_grad, total.requires_grad) == (True, leaf in SUMMED), how
        outputs = [y, total] if total.requires_grad else [y]
        gradients += torch.autograd.grad([output.square().sum() for output in outputs], own[leaf])
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-4)
