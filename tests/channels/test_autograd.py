"""BatchNorm under autograd: tensors that are kept, gradients that are asked for, second derivatives, frozen tensors."""

import contextlib

import pytest
import torch
from torch import nn

import triton_norm
from support.activations import MASKED
from support.channel_norms import KINDS, MODES, SPLIT, bits_of, drawn
from support.pairwise import pairwise
from triton_norm.tuning.limits import INTERPRETED

if INTERPRETED:
    from triton_norm.testing import interpreter


pytestmark = pytest.mark.usefixtures("through_the_kernels")

HALF = torch.bfloat16


SOME_FUSED = [(None, torch.float32), ("relu", torch.float32), ("silu", None), ("silu", torch.float32)]


@pairwise({"activation, residual": SOME_FUSED, "kind": KINDS, "training": [True, False]})
def test_no_more_bytes_are_moved_than_necessary(activation, residual, kind, training, guard, device):
    """2R1W forward and 2R2W backward, by programs that hold x and dy. Bits, or silu's residual, are read again where
    dx waits for the sums; without an activation dy itself is the residual's gradient."""
    if guard is None:
        pytest.skip("bytes are counted under the interpreter")
    call = drawn(SPLIT[kind][0], kind, device, training=training, residual=residual, activation=activation)
    call.run()
    size, bits = call.x.nbytes, 0
    if residual and activation == "relu":
        bits = bits_of(kind, tuple(call.x.shape))
    forward, backward = (launched.arguments for launched in guard.launches)
    times = 2 if training else 1
    added = size if residual else 0
    recomputed = added if activation == "silu" else 0
    for launched, kind_of_access, expected in (
        (forward, "load", {"x_ptr": size, "residual_ptr": added}),
        (forward, "store", {"y_ptr": size, "bits_ptr": bits}),
        (
            backward,
            "load",
            {"x_ptr": size, "dy_ptr": size, "bits_ptr": times * bits, "residual_ptr": times * recomputed},
        ),
        (backward, "store", {"dx_ptr": size, "dresidual_ptr": added if activation else 0}),
    ):
        for name, n_bytes in expected.items():
            actual = launched[name].bytes[kind_of_access] if name in launched else 0
            assert actual == n_bytes, (name, kind_of_access)


def test_tensors_that_are_not_saved_may_be_overwritten(device):
    """y, and a residual beside which bits are kept; but not the one that silu's gradient is computed from."""
    for activation in ("relu", "silu"):
        call = drawn((3, 4, 5, 3), "flat", device, residual=torch.float32, activation=activation)
        expected = call.run()
        x, residual = call.x.clone().requires_grad_(), call.residual.clone()
        y = call.ours(x, residual, call.weight, call.bias)
        y.mul_(2.0)
        assert torch.equal(torch.autograd.grad(y, x, call.dy / 2, retain_graph=True)[0], expected.dx)
        residual.add_(100.0)
        if activation == "relu":
            assert torch.equal(torch.autograd.grad(y, x, call.dy / 2)[0], expected.dx)
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(y, x, call.dy / 2)


@pytest.mark.unguarded  # fp64 through hundreds of launches; the kernels are guarded above
@pytest.mark.parametrize(
    ("activation", "residual", "training"),
    [
        ("relu", torch.float64, True),
        ("relu", None, False),
        ("leaky_relu", torch.float64, False),
        ("leaky_relu", None, True),
        ("relu6", torch.float64, True),
        ("hardswish", None, True),
        ("gelu", torch.float64, True),
        ("gelu_tanh", None, False),
    ],
)
def test_gradients_of_both_orders(activation, residual, training, device):
    """Covers what no op of test_saved.py has: activations with kinks, and GELU."""
    kind, shape = ("last", (3, 2)) if residual else ("flat", (2, 2, 2))
    call = drawn(shape, kind, device, torch.float64, training=training, residual=residual, activation=activation)
    leaves = [tensor.requires_grad_() for tensor in call.inputs() if tensor is not None]

    def function(x, *others):
        return call.ours(x, *(others if residual else (None, *others)))

    with interpreter.fast_launches() if INTERPRETED else contextlib.nullcontext():
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", MASKED)
def test_differentiated_twice_a_gradient_goes_by_the_same_bits(activation, kind, device):
    """create_graph=True has torch compute from the bits the gradients that the kernels compute from them."""
    shape, _ = SPLIT[kind]
    call = drawn(shape, kind, device, residual=torch.float32, activation=activation)
    leaves = [tensor.detach().requires_grad_() for tensor in call.inputs()]
    actual = torch.autograd.grad(call.ours(*leaves), leaves, call.dy, create_graph=True)
    expected = call.run()
    assert torch.equal(actual[1], expected.dresidual)
    for ours, kernels in zip(actual, expected.gradients, strict=True):
        torch.testing.assert_close(ours, kernels, rtol=1e-4, atol=1e-5 * kernels.abs().max().item())


@MODES
@pytest.mark.parametrize("frozen", ["weight", "bias", "weight bias", "input", "input weight", "input bias"])
def test_frozen(frozen, training, guard, device):
    theirs, ours = (norms.BatchNorm1d(6, device=device).train(training) for norms in (nn, triton_norm))
    data = torch.randn(4, 6, 5, device=device)
    grads = []
    for module in (theirs, ours):
        tensors = {"input": data.clone(), "weight": module.weight, "bias": module.bias}
        for name, tensor in tensors.items():
            tensor.requires_grad_(name not in frozen.split())
        module(tensors["input"]).pow(3).sum().backward()
        grads.append([tensor.grad for tensor in tensors.values()])
    for expected, actual in zip(*grads, strict=True):
        assert (expected is None) == (actual is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert guard is None or len(guard.launches) == 2


def test_all_frozen_needs_no_graph_and_still_moves(device):
    module = triton_norm.BatchNorm1d(3, device=device).requires_grad_(False)
    y = module(torch.randn(5, 3, device=device))
    assert not y.requires_grad
    assert module.num_batches_tracked.item() == 1
    with torch.inference_mode():
        assert module(torch.randn(5, 3, device=device)).is_inference()
    with torch.no_grad():
        assert module.requires_grad_()(torch.randn(5, 3, device=device)).grad_fn is None
    assert module.num_batches_tracked.item() == 3
    assert module.running_mean.abs().sum() > 0


def test_autograd_notices_what_is_overwritten(device):
    """The input, as torch does; and, unlike torch, the running statistics that an evaluation's backward needs."""
    module = triton_norm.BatchNorm1d(3, device=device)
    x = torch.randn(5, 3, device=device).requires_grad_() * 1.0
    y = module(x)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = module.eval()(x.detach().requires_grad_())
    module.train()(x.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_a_retained_graph_gives_the_same_bits_again(activation, device):
    call = drawn((3, 4, 5, 6), "flat", device, residual=torch.float32, activation=activation)
    leaves = [tensor.requires_grad_() for tensor in call.inputs()]
    y = call.ours(*leaves)
    first, second = (torch.autograd.grad(y, leaves, call.dy, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@MODES
@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_on_the_gradient(kind, training, device):
    """Second order, against torch in fp64."""
    shape, _ = SPLIT[kind]
    call = drawn(shape, kind, device, torch.float64, training=training)
    results = []
    for function in (call.ours, call.composed):
        leaves = [tensor.detach().contiguous().requires_grad_() for tensor in (call.x, call.weight, call.bias)]
        y = function(leaves[0], None, *leaves[1:])
        (dx,) = torch.autograd.grad(y, leaves[0], call.dy, create_graph=True)
        results.append(torch.autograd.grad(y.pow(2).sum() + dx.pow(2).sum(), leaves))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
