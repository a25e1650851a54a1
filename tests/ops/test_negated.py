"""Tensors whose negation torch has not applied yet, as the imaginary part of a conjugate is."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import triton_norm

SHAPE = (6, 8)


class Watched(TorchDispatchMode):
    """Mode under which calls go through the operators."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


def layer_norm(x, residual, weight, bias):
    return triton_norm.layer_norm(x, (8,), weight, bias, residual=residual)


def rms_norm(x, residual, weight, bias):
    return triton_norm.rms_norm(x, (8,), weight, residual=residual)


def batch_norm(x, residual, weight, bias):
    return triton_norm.batch_norm(x, None, None, weight, bias, True, residual=residual, activation="relu")


def evaluated(x, residual, weight, bias):
    running = torch.linspace(-1, 1, 8, device=x.device), torch.linspace(0.5, 1, 8, device=x.device)
    return triton_norm.batch_norm(x, *running, weight, bias, residual=residual, activation="silu")


FUNCTIONS = [layer_norm, rms_norm, batch_norm, evaluated]


def drawn(device):
    shapes = {"x": SHAPE, "residual": SHAPE, "weight": (8,), "bias": (8,)}
    return {name: torch.randn(shape, device=device) for name, shape in shapes.items()}


def negated(tensor):
    """Returns a tensor of the same values that holds the opposite ones."""
    found = torch._neg_view(-tensor)
    assert found.is_neg()
    return found


@pytest.mark.parametrize("name", ["x", "residual", "weight", "bias"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_inputs(function, name, device):
    """An earlier call on tensors that differ in nothing else is remembered."""
    tensors = drawn(device)
    expected = function(**tensors)
    with triton_norm.backend("auto"):
        found = function(**tensors | {name: negated(tensors[name])})
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", [contextlib.nullcontext, Watched])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients(function, has_residual, mode, device):
    tensors = drawn(device)
    given = [t.requires_grad_() for name, t in tensors.items() if name != "residual" or has_residual]
    if not has_residual:
        tensors["residual"] = None
    results = function(**tensors)
    results = [t for t in (results if isinstance(results, tuple) else (results,)) if t is not None]
    gradients = [torch.randn_like(t) for t in results]

    def of(gradients):
        with mode():
            return torch.autograd.grad(results, given, gradients, retain_graph=True, allow_unused=True)

    assert of(gradients)[0].any()
    torch.testing.assert_close(of([negated(t) for t in gradients]), of(gradients), rtol=0, atol=0)


def test_a_loss_of_the_conjugates_imaginary_part(device):
    gradients = []
    for module in (torch.nn.LayerNorm(8, device=device), triton_norm.LayerNorm(8, device=device)):
        x = torch.linspace(-1, 3, 48, device=device).view(SHAPE)
        y = module(x)
        (torch.complex(torch.ones_like(y), y).conj().sum() * (2 - 3j)).real.backward()
        gradients.append(module.bias.grad)
    torch.testing.assert_close(*gradients)
