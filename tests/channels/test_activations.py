"""The table of activations: each entry against torch, and an error for a name that it lacks, wherever that arrives."""

import pytest
import torch

import triton_norm
from support.activations import AT_KINKS, KINKS, MASKED, TORCHS, assert_kinks_are_torchs
from support.oracle import DTYPES
from triton_norm import activations, reference
from triton_norm.activations import ACTIVATIONS
from triton_norm.channels import plan, running
from triton_norm.channels.plan import BackwardTensors, Part
from triton_norm.specs import BatchNormSpec, BatchNormTensors, GradientDtypes, Phase
from triton_norm.sync import operator as synchronized

NAMES = pytest.mark.parametrize("name", ACTIVATIONS)
HARD = [0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0, 30.0, -30.0, float("inf"), -float("inf"), float("nan"), *AT_KINKS]


@NAMES
def test_each_entry_is_torchs(name):
    for z in (torch.tensor(HARD), 4 * torch.randn(100)):
        z = z.double().requires_grad_()
        y = TORCHS[name](z, 0.2)
        dy = torch.randn_like(y)
        (exact,) = torch.autograd.grad(y, z, dy)
        known = z.isfinite() if name not in MASKED else torch.ones_like(z, dtype=torch.bool)  # ∞ · 0 by any formula
        torch.testing.assert_close(activations.activate(z, name, 0.2), y, equal_nan=True)
        actual = activations.gradient(dy, z, name, 0.2)
        torch.testing.assert_close(actual[known], exact[known], equal_nan=True)


@NAMES
def test_an_entry_with_a_mask_needs_no_more(name):
    z, dy = 4 * torch.randn(2, 100, dtype=torch.float64)
    mask = ACTIVATIONS[name].mask
    assert (mask is not None) == (name in MASKED)
    if mask is None:
        with pytest.raises(ValueError, match="needs more than a mask"):
            activations.gradient_by_mask(dy, z > 0, name, 0.2)
    else:
        result = activations.gradient_by_mask(dy, mask(z), name, 0.2)
        assert torch.equal(result, activations.gradient(dy, z, name, 0.2))


@NAMES
@pytest.mark.parametrize("poison", [float("inf"), -float("inf"), float("nan")])
def test_the_kernels_know_every_entry(name, poison, device):
    """And compute it where the table does, at hard values too. In fp32 torch's GELU of ∞ is NaN on the CPU."""
    x = torch.linspace(-3, 3, 24, device=device).view(6, 4).requires_grad_()
    bias = torch.tensor([0.0, 1.0, poison, -30.0], device=device)
    result = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        with triton_norm.backend(backend):
            y = triton_norm.batch_norm(x.to(dtype), None, None, None, bias, True, activation=name)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        result.append((y.float(), dx if name in MASKED else dx[:, :2]))
    torch.testing.assert_close(*result, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", KINKS)
@pytest.mark.parametrize("added", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kinks_are_torchs(dtype, added, name, device):
    assert_kinks_are_torchs(name, dtype, added, device)


def test_an_unknown_one_is_an_error_wherever_it_arrives(device):
    x = torch.randn(6, 4, device=device)
    merged = running.move_op(synchronized.moments_op(x, True)[None], [], [], 0.1, 1e-5, True)
    statistics = merged[:-1].view(3, -1)
    spec, tensors = BatchNormSpec(True, 0.1, 1e-5, "tanhh", 0.0), BatchNormTensors(x)
    nothing = (None,) * 2
    requested, read = (
        GradientDtypes(x.dtype, None, None, None),
        BackwardTensors(x, x, *nothing, *nothing, statistics, *nothing),
    )
    forward_op, backward_op = torch.ops.triton_norm.batch_norm_forward, torch.ops.triton_norm.batch_norm_backward
    apply_op, sums_op = torch.ops.triton_norm.sync_batch_norm_apply, torch.ops.triton_norm.sync_batch_norm_sums
    calls = [
        lambda: triton_norm.batch_norm(x, None, None, training=True, activation="tanhh"),
        lambda: triton_norm.BatchNorm1d(4, device=device)(x, activation="tanhh"),
        lambda: triton_norm.explain(triton_norm.batch_norm, x, None, None, training=True, activation="tanhh"),
        lambda: reference.batch_norm(tensors, spec),
        lambda: activations.gradient(x, x, "tanhh", 0.0),
        lambda: activations.has_mask("tanhh"),
        lambda: plan.forward(spec, tensors, None),
        lambda: plan.backward_plan_of(spec, requested, Part(Phase.FUSED), read)(read),
        lambda: forward_op(x, None, None, None, None, False, 1e-5, "tanhh", 0.0),
        lambda: backward_op(
            *(x, x, *nothing, *nothing, statistics, *nothing, *requested),
            *(None, 1e-5, "tanhh", 0.0),
        ),
        *(
            lambda kernels=kernels: apply_op(x, *nothing, None, merged, None, 1e-5, "tanhh", 0.0, "0", kernels)
            for kernels in (False, True)
        ),
        *(
            lambda kernels=kernels: sums_op(x, x, *nothing, *nothing, merged, *nothing, None, "tanhh", 0.0, kernels)
            for kernels in (False, True)
        ),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"{', '.join(map(repr, ACTIVATIONS))} or None, but got 'tanhh'"):
            call()


def test_a_kernel_that_is_handed_an_unknown_one_does_not_compile(monkeypatch, device):
    """The table has an entry that the kernels lack."""
    monkeypatch.setitem(ACTIVATIONS, "tanhh", ACTIVATIONS["silu"])
    x = torch.randn(6, 4, device=device)
    with pytest.raises(Exception, match="unknown activation"):
        triton_norm.batch_norm(x, None, None, training=True, activation="tanhh")
    monkeypatch.setitem(ACTIVATIONS, "tanhh", ACTIVATIONS["relu"])
    with pytest.raises(Exception, match=r"unknown activation|more than a mask"):
        triton_norm.batch_norm(x, None, None, training=True, residual=x, activation="tanhh")
