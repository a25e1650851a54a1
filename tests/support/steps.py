"""Models of torch's norms, and the results of a few steps, for tests of tools that rewrite models."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import triton_norm as tn

SHAPES = {
    "LayerNorm": (3, 4),
    "RMSNorm": (3, 4),
    "BatchNorm1d": (3, 4),
    "BatchNorm2d": (2, 4, 3, 2),
    "BatchNorm3d": (2, 4, 1, 3, 2),
}
BATCH_NORMS = [name for name in SHAPES if name.startswith("Batch")]
NORMS = pytest.mark.parametrize("name", SHAPES)
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


class Model(nn.Module):
    """Calls a norm twice: counters move by two a call."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.norm(x)))


def drawn(name: str, training: bool, device: str) -> tuple[nn.Module, Tensor]:
    """A layer of torch's whose parameters and buffers are no defaults, and an input for it."""
    norm = getattr(nn, name)(4, device=device).train(training)
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return norm, torch.randn(SHAPES[name], device=device)


def ours_of(model: nn.Module) -> nn.Module:
    ours = copy.deepcopy(model)
    assert tn.convert(ours).converted
    return ours


def trained(model: Callable[..., Tensor], tensors: nn.Module, x: Tensor, calls: int = 2) -> dict[str, Tensor]:
    """The results of some steps, and the gradients and buffers of `tensors` after them."""
    x = x.clone().requires_grad_()
    for _ in range(calls):
        y = model(x)
        y.sin().sum().backward()
    gradients = {f"d{name}": parameter.grad.clone() for name, parameter in tensors.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in tensors.named_buffers()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **buffers}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def saved_and_loaded(module: nn.Module) -> nn.Module:
    """Returns a copy by way of torch.save."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def state_of(model: nn.Module) -> list[tuple[object, ...]]:
    """Returns the identity, the class and the attributes of each module."""
    return [(id(m), type(m), {name: id(value) for name, value in vars(m).items()}) for m in model.modules()]
