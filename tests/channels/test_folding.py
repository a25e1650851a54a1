"""triton_norm.fold_batch_norm against the two layers one after the other."""

import copy

import pytest
import torch
from torch import nn

import triton_norm
from triton_norm import fold_batch_norm

LAYERS = {
    "Conv1d": (lambda **o: nn.Conv1d(4, 6, 3, **o), nn.BatchNorm1d, (2, 4, 9)),
    "Conv2d, grouped": (lambda **o: nn.Conv2d(4, 6, 3, padding=1, groups=2, **o), nn.BatchNorm2d, (2, 4, 5, 5)),
    "Conv3d": (lambda **o: nn.Conv3d(2, 6, 2, **o), triton_norm.BatchNorm3d, (2, 2, 4, 4, 4)),
    "ConvTranspose1d": (lambda **o: nn.ConvTranspose1d(4, 6, 3, **o), triton_norm.BatchNorm1d, (2, 4, 5)),
    "ConvTranspose2d, grouped": (
        lambda **o: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, **o),
        triton_norm.BatchNorm2d,
        (2, 4, 5, 5),
    ),
    "Linear": (lambda **o: nn.Linear(5, 6, **o), triton_norm.BatchNorm1d, (7, 5)),
}


def moved(batch_norm: nn.Module) -> nn.Module:
    """Makes a layer whose statistics and parameters have no special values."""
    for tensor in (*batch_norm.parameters(), *(b for b in batch_norm.buffers() if b.is_floating_point())):
        tensor.data = torch.rand_like(tensor) + 0.5
    return batch_norm.double().eval()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_one_layer_does_what_two_did(name, bias, affine):
    make, norm, shape = LAYERS[name]
    layer, batch_norm = make(bias=bias).double().eval(), moved(norm(6, affine=affine))
    before = copy.deepcopy((layer.state_dict(), batch_norm.state_dict()))
    folded = fold_batch_norm(layer, batch_norm)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(folded(x), batch_norm(layer(x)), rtol=1e-12, atol=1e-12)
    assert type(folded) is type(layer)
    torch.testing.assert_close((layer.state_dict(), batch_norm.state_dict()), before, rtol=0, atol=0)


def test_the_layers_types_stay():
    layer = nn.Conv2d(3, 6, 1).bfloat16().eval()
    folded = fold_batch_norm(layer, triton_norm.BatchNorm2d(6).eval())
    assert (folded.weight.dtype, folded.bias.dtype) == (torch.bfloat16, torch.bfloat16)


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Inside(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Named(nn.Conv2d):
    """Computes a Conv2d."""


class OfAnyRank(nn.modules.batchnorm._BatchNorm):
    """Derived from none of the three."""

    def _check_input_dim(self, input):
        return


def replaced(module):
    module.forward = lambda x: x
    return module


@pytest.mark.parametrize("make", [nn.SyncBatchNorm, triton_norm.SyncBatchNorm, OfAnyRank])
def test_a_subclass_that_computes_the_same(make):
    layer, norm = Named(3, 6, 1).double().eval(), moved(make(6))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    folded = fold_batch_norm(layer, norm)
    assert type(folded) is Named
    torch.testing.assert_close(folded(x), norm(layer(x)))


CONV, NORM = nn.Conv2d(3, 6, 1).eval(), triton_norm.BatchNorm2d(6).eval()


@pytest.mark.parametrize(
    ("layer", "batch_norm", "error", "words"),
    [
        (nn.ReLU(), NORM, TypeError, "'layer' must be a convolution or Linear, not ReLU"),
        (CONV, nn.LayerNorm(6), TypeError, "'batch_norm' must be BatchNorm, not LayerNorm"),
        (CONV, nn.LazyBatchNorm2d().eval(), RuntimeError, "must have their parameters; call them once first"),
        (CONV, Activated(6).eval(), TypeError, "'batch_norm', of Activated, may compute something else"),
        (Standardized(3, 6, 1).eval(), NORM, TypeError, "'layer', of Standardized, may compute something else"),
        (Inside(3, 6, 1).eval(), NORM, TypeError, "'layer', of Inside, may compute something else"),
        (replaced(nn.Conv2d(3, 6, 1).eval()), NORM, TypeError, "'layer', of Conv2d, may compute something else"),
        (CONV, replaced(nn.BatchNorm2d(6).eval()), TypeError, "'batch_norm', of BatchNorm2d, may compute"),
        (nn.Conv2d(3, 6, 1), NORM, RuntimeError, "layer is in training mode"),
        (CONV, nn.BatchNorm2d(6), RuntimeError, "batch_norm is in training mode"),
        (CONV, nn.BatchNorm2d(6, track_running_stats=False).eval(), RuntimeError, "no running statistics"),
        (CONV, nn.BatchNorm2d(5).eval(), RuntimeError, r"6 output channels \(weight of shape \[6, 3, 1, 1\]\).*5 fea"),
    ],
)
def test_layers_that_can_not_be_folded(layer, batch_norm, error, words):
    with pytest.raises(error, match=words):
        fold_batch_norm(layer, batch_norm)
