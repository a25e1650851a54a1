"""Two small networks trained on scikit-learn's digits, with torch.nn's norms and triton_norm's, from one state_dict.

Two trainings that differ only in rounding drift apart, and how fast depends on the network and the step size, not on
the norm. So each bound is measured: the torch.nn network is trained again with every parameter moved by at most one ulp
before every step, and triton_norm may stray from it by a small multiple of the change that this makes to the losses.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import triton_norm as tn

ULP = 2.0**-23
# A norm rounds each element a handful of times forward (mean, difference, rstd, products, sum) and again backward; a
# perturbed run moves each parameter once a step.
SLACK = 8.0


Digits = tuple[Tensor, Tensor]
Network = Callable[[ModuleType], nn.Module]


class ConvNet(nn.Module):
    """[B, 1, 8, 8] → [B, 10], with two BatchNorm2d."""

    def __init__(self, norms: ModuleType) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            norms.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
            norms.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 4 * 4, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Block(nn.Module):
    def __init__(self, norms: ModuleType, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = norms.LayerNorm(width), norms.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )
        weights = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """[B, 1, 8, 8] → [B, 10]: the eight rows of an image are the tokens; with five LayerNorms."""

    def __init__(self, norms: ModuleType, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(torch.zeros(8, width))
        self.blocks = nn.Sequential(Block(norms, width, heads=4), Block(norms, width, heads=4))
        self.norm, self.head = norms.LayerNorm(width), nn.Linear(8 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images.squeeze(1)) + self.position
        return self.head(self.norm(self.blocks(tokens)).flatten(1))


RATE = {ConvNet: 0.05, Transformer: 0.02}
networks = pytest.mark.parametrize("network", [ConvNet, Transformer])


@pytest.fixture(scope="module")
def digits() -> Digits:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images, dtype=torch.float32)[order, None] / 16, torch.tensor(data.target)[order]


def train(model: nn.Module, digits: Digits, steps: int, batch: int, jitter: int | None = None) -> list[float]:
    """The loss of each step of SGD with momentum, `jitter` the seed of the perturbation."""
    device = next(model.parameters()).device
    images, labels = (t.to(device) for t in digits)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE[type(model)], momentum=0.9)
    generator = torch.Generator().manual_seed(jitter or 0)
    losses = []
    model.train()
    for step in range(steps):
        if jitter is not None:
            _move_by_an_ulp(model, generator)
        chosen = slice(step * batch, (step + 1) * batch)
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _move_by_an_ulp(model: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for p in model.parameters():
            sign = torch.randint(-1, 2, p.shape, generator=generator).to(p)
            p.mul_(1 + ULP * sign)


def twins(network: Network, device: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    theirs = network(nn)
    ours = network(tn)
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(device), ours.to(device)


def accuracy(model: nn.Module, digits: Digits) -> float:
    """Returns the accuracy on the last 297 images, which no training here sees, in evaluation mode."""
    device = next(model.parameters()).device
    images, labels = (t[1500:].to(device) for t in digits)
    with torch.no_grad():
        return (model.eval()(images).argmax(-1) == labels).float().mean().item()


def assert_losses_agree(network: Network, digits: Digits, device: str, steps: int, batch: int) -> nn.Module:
    """Train with triton_norm's kernels and with torch.nn's norms, compare step by step, and return the former."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        theirs, ours = twins(network, device)
        expected = train(theirs, digits, steps, batch)
        perturbed = [train(twins(network, device)[0], digits, steps, batch, jitter) for jitter in (1, 2, 3)]
        with tn.backend("triton"):
            got = train(ours, digits, steps, batch)
    drift = 0.0
    for step, (want, have) in enumerate(zip(expected, got, strict=True)):
        drift = max(drift, *(abs(losses[step] - want) for losses in perturbed))
        bound = SLACK * (drift + ULP * max(1.0, want))
        assert abs(have - want) <= bound, f"step {step}: loss {have!r} against {want!r}, bound {bound:.1e}"
    return ours


@networks
def test_torch_path_is_torch(network: Network, digits: Digits) -> None:
    theirs, ours = twins(network, "cpu")
    expected = train(theirs, digits, steps=40, batch=32)
    with tn.backend("torch"):
        got = train(ours, digits, steps=40, batch=32)
        assert got == expected
        assert sum(got[-5:]) / 5 < 0.2 * got[0]
        assert accuracy(ours, digits) == accuracy(theirs, digits) > 0.85


@networks
def test_two_steps(network: Network, digits: Digits, device: str) -> None:
    """The loss of the second step holds the gradients and the update of the first."""
    assert_losses_agree(network, digits, device, steps=2, batch=4)


@networks
@pytest.mark.unguarded
def test_few_steps(network: Network, digits: Digits, device: str) -> None:
    assert_losses_agree(network, digits, device, steps=4, batch=8)


@networks
@pytest.mark.gpu
def test_in_full(network: Network, digits: Digits, device: str) -> None:
    ours = assert_losses_agree(network, digits, device, steps=40, batch=32)
    assert accuracy(ours, digits) > 0.85
