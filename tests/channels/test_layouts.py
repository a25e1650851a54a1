"""Layouts of BatchNorm's tensors: those of outputs and gradients, copies, and calls that differ in nothing else."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import triton_norm
from support.channel_norms import drawn, laid
from support.pairwise import pairwise
from triton_norm import launch
from triton_norm.tuning.limits import INTERPRETED

pytestmark = pytest.mark.usefixtures("through_the_kernels")


FORMATS = [
    ((4, 6), torch.contiguous_format),
    ((4, 6, 5), torch.contiguous_format),
    ((4, 6, 5, 7), torch.contiguous_format),
    ((4, 6, 5, 7), torch.channels_last),
    ((2, 6, 3, 4, 5), torch.contiguous_format),
    ((2, 6, 3, 4, 5), torch.channels_last_3d),
    ((9, 6, 3, 3), torch.contiguous_format),
    ((4, 6, 1, 1), torch.channels_last),  # contiguous in both formats
    ((4, 1, 5, 7), torch.channels_last),  # likewise
    ((1, 6, 5, 7), torch.channels_last),
]


@pairwise({"shape, memory_format": FORMATS, "dy_format": ["as x", "the other"], "training": [True, False]})
def test_memory_formats_are_the_inputs(dy_format, shape, memory_format, training, device):
    x, residual = torch.randn(2, *shape, device=device)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    residual = residual.contiguous(memory_format=memory_format).requires_grad_()
    dy = torch.randn(shape, device=device)
    dy = laid(dy, "last" if memory_format == torch.contiguous_format else "flat") if dy_format != "as x" else dy
    module = triton_norm.BatchNorm1d(shape[1], device=device).train(training)
    module._check_input_dim = lambda input: None
    y = module(x, residual=residual, activation="relu")
    dx, dresidual = torch.autograd.grad(y, (x, residual), dy)
    for result in (y, dx, dresidual):
        assert result.is_contiguous(memory_format=memory_format)
        assert result.is_contiguous() == x.is_contiguous()


def test_channels_last_sequences_stay_so(device):
    """[N, C, L] has no memory format of torch's; its strides are kept all the same."""
    x = torch.randn(4, 5, 6, device=device).mT.requires_grad_()
    y = triton_norm.batch_norm(x, None, None, training=True)
    (dx,) = torch.autograd.grad(y, x, torch.randn(4, 6, 5, device=device))
    assert y.stride() == dx.stride() == x.stride()


STRIDED = {
    "without gaps": lambda x: x.contiguous(),
    "channels last": lambda x: laid(x, "last"),
    "every second sample": lambda x: torch.stack((x, x), 1)[:, 0],
    "offset by one element": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "rows of an image padded": lambda x: F.pad(x, (0, 2))[..., :-2],
}


@pytest.mark.parametrize("of", ["x", "residual", "dy"])
def test_calls_that_differ_in_strides_alone(of, device):
    """One after the other, and once more: no plan is taken for another call's."""
    call = drawn((4, 8, 6, 6), "flat", device, residual=torch.float32, activation="silu")
    for laid_out in (*STRIDED.values(), *STRIDED.values()):
        call.of(**{of: laid_out(getattr(call, of))}).against_oracle()


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU not every launch goes that way")
@pytest.mark.parametrize(("of", "widths"), [("x", [1, 1]), ("residual", [1, 1]), ("dy", [4, 1])])
def test_unaligned_tensors_have_narrow_accesses(of, widths, monkeypatch, device):
    """Elements an access, forward and backward: the interpreter would forgive wide accesses anywhere, a GPU not."""
    results, start = [], launch.start
    monkeypatch.setattr(launch, "start", lambda *launched: results.append(launched[3]["V"]) or start(*launched))
    call = drawn((4, 8, 6, 6), "flat", device, residual=torch.float32, activation="silu")
    for tensor, expected in (
        (getattr(call, of), [4, 4]),
        (STRIDED["offset by one element"](getattr(call, of)), widths),
    ):
        results.clear()
        call.of(**{of: tensor}).run()
        assert results == expected


EXPANDED = {"one element": (1, 1, 1, 1), "one an image": (4, 1, 1, 1), "one a map": (4, 8, 1, 1)}


@pytest.mark.parametrize("kind", ["flat", "last"])
@pytest.mark.parametrize("expanded", EXPANDED)
def test_strided_and_expanded_tensors_are_not_copied(expanded, kind, guard, device, monkeypatch):
    x = laid(torch.randn(4, 8, 4, 6, device=device), kind)
    x = torch.stack((x, x), 1)[:, 0].requires_grad_()
    dy = torch.randn(EXPANDED[expanded], device=device).expand(x.shape)
    assert not triton_norm.explain(triton_norm.batch_norm, x, None, None, training=True).copies
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "copy_", _must_not_copy)
        y = triton_norm.batch_norm(x, None, None, training=True)
        torch.autograd.grad(y, x, dy)
    if guard is not None:
        assert guard.loaded(x) == 2 * x.numel() * x.itemsize  # once forward, once backward


def _must_not_copy(self, *args, **kwargs):
    raise AssertionError("copied")


def test_explain_tells_of_copies(device):
    x = torch.randn(3, 4, 6, 6, device=device)
    other = laid(x, "last")
    explain = triton_norm.explain
    assert explain(triton_norm.batch_norm, x[..., ::2], None, None, training=True).copies
    assert not explain(triton_norm.batch_norm, x, None, None, training=True).copies
    said = explain(triton_norm.batch_norm, x, None, None, training=True, residual=other)
    assert said.copies == ("the residual: neither its channels nor its positions are adjacent",)
    assert not explain(triton_norm.batch_norm, x, None, None, training=True, residual=x + 1).copies
    assert not explain(triton_norm.BatchNorm2d(4, device=device), other, residual=other + 1, activation="relu").copies
