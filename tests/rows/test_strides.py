"""Rows wherever they lie: slices and permutations that are read without a copy, and those that are copied."""

import pytest
import torch

import triton_norm
from support.oracle import differentiated

pytestmark = pytest.mark.usefixtures("through_the_kernels")

B, T, H, D = 2, 5, 3, 16

WITHOUT_A_COPY = {
    "q of a packed qkv": lambda: torch.randn(B, T, 3 * H * D)[..., : H * D].view(B, T, H, D),
    "k of a packed qkv, heads first": lambda: (
        torch.randn(B, T, 3 * H * D)[..., H * D : -H * D].view(B, T, H, D).transpose(1, 2)
    ),
    "heads first": lambda: torch.randn(B, T, 3 * H * D)[..., : H * D].view(B, T, H, D).transpose(1, 2),
    "all but the first token": lambda: torch.randn(B, T, D)[:, 1:],
    "one of three": lambda: torch.randn(B, T, 3, H, D)[:, :, 1],
    "time first": lambda: torch.randn(T, B, H, D).transpose(0, 1),
    "three axes in reverse": lambda: torch.randn(B, T, H, D).permute(2, 1, 0, 3),
    "every other row": lambda: torch.randn(2 * T, D)[::2],
    "one sample for all": lambda: torch.randn(1, T, 1, D).expand(B, T, H, D),
    "wide rows": lambda: torch.randn(3, 4, 2, 9000)[:, 1:].transpose(0, 1),
}
COPIED = {
    "columns apart": lambda: torch.randn(B, T, D, H).mT,
    "four axes in reverse": lambda: torch.randn(2, 3, 4, 5, D).permute(3, 2, 1, 0, 4),
}


@pytest.mark.parametrize("order", ["as x", "dense", "expanded"])
@pytest.mark.parametrize("place", [*WITHOUT_A_COPY, *COPIED])
def test_rows_of_any_strides(place, order, norm, device):
    drawn = (WITHOUT_A_COPY | COPIED)[place]
    x = drawn().to(device)
    if order == "dense":
        dy = torch.randn(x.shape, device=device)
    else:
        dy = drawn().to(device) if order == "as x" else torch.ones((), device=device).expand(x.shape)
    if order == "as x":
        assert dy.stride() == x.stride()
    weight, bias = torch.randn(2, x.shape[-1], device=device)
    norm.against_oracle(x, weight, bias if norm.has_bias else None, dy)


@pytest.mark.parametrize("place", [*WITHOUT_A_COPY, *COPIED])
def test_explain_tells_of_copies(place, device):
    x = (WITHOUT_A_COPY | COPIED)[place]().to(device)
    explained = triton_norm.explain(triton_norm.rms_norm, x, x.shape[-1:])
    assert [copy.split(":")[0] for copy in explained.copies] == ["the input"] * (place in COPIED)


@pytest.mark.parametrize("place", ["heads first", "three axes in reverse", "all but the first token"])
def test_a_residual_with_another_order_of_axes(place, norm, device):
    """The sum, the gradients of both and of the sum are as those of contiguous tensors."""
    x = WITHOUT_A_COPY[place]().to(device)
    residual = torch.randn(x.shape[::-1], device=device).permute(*reversed(range(x.dim())))
    residual = residual.mT.contiguous().mT if place == "heads first" else residual.contiguous()
    dy, dtotal = torch.randn(2, *x.shape, device=device)
    weight = torch.randn(x.shape[-1], device=device)

    def call(x, r, w, b):
        return norm.ours(x.shape[-1:], residual=r)(x, w, b)

    actual, expected = (
        differentiated(call, (*tensors, weight, None), (dy, dtotal))
        for tensors in ((x, residual), (x.contiguous(), residual.contiguous()))
    )
    for one, other in zip(actual.tensors(), expected.tensors(), strict=True):
        assert torch.equal(one, other)
