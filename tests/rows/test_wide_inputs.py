"""Types that differ between x, residual and total, and values at the ends of a type's range, on both paths."""

import itertools

import pytest
import torch
from torch.nn import functional as F

import triton_norm
from support.every_op import EACH_FUNCTION, PATHS
from triton_norm.rows import fusible, modulated
from triton_norm.rows.operator import ForwardCall, fusible_op
from triton_norm.specs import ModulatedSpec, ModulatedTensors, RowSpec, RowTensors

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
EXACT, ROUNDED = {"rtol": 1e-12, "atol": 1e-12}, {"rtol": 1e-6, "atol": 1e-6}
N_COLS = 33
GATED = pytest.mark.parametrize("gated", [None, "last", "first"])


def composed(name, x, residual, gate, gate_first):
    """Returns (y, total) in float64; total has the values of float32."""
    total = x + residual
    total = total + (total.float().double() - total).detach()
    f = None if gate is None else F.silu(gate)
    v = total * f if gate_first else total
    y = F.layer_norm(v, (N_COLS,)) if name == "layer_norm" else F.rms_norm(v, (N_COLS,), None, 1e-5)
    return (y if f is None or gate_first else y * f), total


@pytest.mark.parametrize("differentiated", [False, True])
@PATHS
@GATED
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_a_float64_input_is_computed_in_float64_whatever_totals_type(name, gated, path, differentiated, device):
    """float32 anywhere between x and dx leaves an error of 1e-7."""
    numbers = torch.randn(4, 4, N_COLS, dtype=F64, device=device)
    x, gate, dy, dtotal = numbers
    residual, dtotal = torch.randn(4, N_COLS, device=device), dtotal.float()
    first = gated == "first"
    results = []
    for function in (None, getattr(triton_norm, name)):
        exact = function is None
        leaves = [x.clone(), residual.double() if exact else residual.clone(), *([gate.clone()] if gated else [])]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        own = leaves[2] if gated else None
        if exact:
            outputs = composed(name, *leaves[:2], own, first)
        else:
            with triton_norm.backend(path):
                named = {"residual": leaves[1], "residual_dtype": F32, "gate": own, "gate_first": first}
                outputs = function(leaves[0], (N_COLS,), eps=1e-5, **named)
            assert [output.dtype for output in outputs] == [F64, F32]
        dys = dy, dtotal.double() if exact else dtotal
        gradients = torch.autograd.grad(outputs, leaves, dys, create_graph=differentiated)
        if differentiated:  # autograd rounds the gradients of total, which has float32
            second = torch.autograd.grad(gradients[0].square().sum(), leaves)
            gradients = (*gradients, *second)
        results.append([outputs[0], *gradients])
    expected, result = results
    n_first = 4 if gated else 3
    for place, (actual, exact) in enumerate(zip(result, expected, strict=True)):
        tolerance = EXACT if actual.dtype == F64 and place < n_first else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(actual.double(), exact, **tolerance)


TYPES = [(None, None), *itertools.product((F32, F64, BF16), (None, F32, F64, BF16))]
"""Types of the residual and of total."""


def decomposed_and_recorded(x, residual, total_dtype, centred):
    """Yields the results of a decomposition, and those of the operator that it decomposes."""
    spec = RowSpec(8, 1e-5, 0.0, centred, None, total_dtype)
    tensors = RowTensors(x, residual, None, None)
    yield fusible.decomposed(*tensors, True, *spec), fusible_op(ForwardCall(tensors, True, spec))
    gated = ModulatedTensors(*tensors, torch.ones_like(x), None, None, None)
    of_gate = ModulatedSpec(spec, "silu", False, None, 1.0, False)
    recorded = modulated.fusible_op(modulated.ForwardCall(gated, True, of_gate))
    yield fusible.decomposed_modulated(*gated, True, *spec, *of_gate[1:]), recorded


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("x_dtype", [F32, F64, BF16])
def test_decompositions_return_what_the_operators_return(x_dtype, centred, device):
    """Inductor allocates by the operator's fake, and passes the decomposition's statistics to the backward's kernel."""
    x, added = torch.randn(2, 3, 8, device=device).unbind()
    for residual_dtype, total_dtype in TYPES:
        residual = None if residual_dtype is None else added.to(residual_dtype)
        for results, expected in decomposed_and_recorded(x.to(x_dtype), residual, total_dtype, centred):
            for actual, own in zip(results, expected, strict=True):
                if own is None:
                    assert actual.numel() == 0
                    continue
                assert (actual.dtype, actual.shape) == (own.dtype, own.shape)
                tolerance = {"rtol": 2**-6, "atol": 2**-6} if own.dtype == BF16 else ROUNDED
                exact = own.dtype == F64 and F64 in (x_dtype, total_dtype or residual_dtype)
                torch.testing.assert_close(actual, own, **(EXACT if exact else tolerance))


@pytest.mark.parametrize(("x_dtype", "residual_dtype"), [(F32, F64), (F64, F32), (BF16, F64)])
def test_rms_norms_own_epsilon_goes_by_the_inputs_type(x_dtype, residual_dtype, device):
    x, residual = (1e-7 * torch.randn(2, 3, 8, dtype=F64, device=device)).unbind()
    x, residual = x.to(x_dtype), residual.to(residual_dtype)
    results = []
    for path in ("triton", "torch"):
        with triton_norm.backend(path):
            results.append(triton_norm.rms_norm(x, (8,), residual=residual, out_dtype=residual_dtype)[0])
    torch.testing.assert_close(*results)
    eps = torch.finfo(F64 if x_dtype == F64 else F32).eps
    total = (x.double() + residual.double()).to(residual_dtype).double()
    torch.testing.assert_close(results[0].double(), F.rms_norm(total, (8,), None, eps), rtol=1e-5, atol=1e-7)


@PATHS
def test_an_infinite_product_is_infinite_when_it_is_rounded(path, device):
    """An infinite weight multiplies x_hat; the gate is positive."""
    weight = torch.tensor([float("inf"), 1.0, 2.0], device=device)
    x, gate = torch.tensor([[2.0, 1.0, 3.0], [-2.0, 1.0, 3.0]], device=device), torch.ones(2, 3, device=device)
    with triton_norm.backend(path):
        y = triton_norm.rms_norm(x, (3,), weight, gate=gate, product_dtype=BF16)
    assert y[:, 0].tolist() == [float("inf"), -float("inf")]
    assert y[:, 1:].isfinite().all()


@PATHS
def test_an_infinite_sum_is_infinite_in_total(path, device):
    """Its row is NaN, other rows are not."""
    x = torch.tensor([[float("inf"), 1.0, 2.0], [3.0, 1.0, 2.0]], dtype=F64, device=device)
    with triton_norm.backend(path):
        y, total = triton_norm.layer_norm(x, (3,), residual=torch.zeros(2, 3, device=device))
    assert total.dtype == F32
    assert torch.equal(total.double(), x)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("op", [op for op in EACH_FUNCTION if op.training], ids=str)
def test_a_gradient_of_huge_values_that_can_be_differentiated(op, device):
    """The third power of rstd, which torch.rsqrt's gradient has, is 0 in float32 for standard deviations of 1e15."""
    tensors = [tensor if tensor is None else tensor.detach() for tensor in op.drawn(device)]
    tensors[0], tensors[1] = (1e15 * tensor for tensor in tensors[:2])
    leaves = [tensor.requires_grad_() for tensor in tensors if tensor is not None]
    outputs = op.ours(*tensors)
    y, x = outputs[0], leaves[0]
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    assert dx.requires_grad
    torch.testing.assert_close(1e15 * dx, 1e15 * expected, rtol=1e-4, atol=1e-5)
