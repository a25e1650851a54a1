"""Calls of batch_norm and its modules beside torch's: steps, options, errors, autocast and torch.compile."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import triton_norm
from support.activations import activated
from support.channel_norms import ACTIVATIONS, MODES, drawn, running_statistics
from triton_norm.tuning.limits import INTERPRETED

pytestmark = pytest.mark.usefixtures("through_the_kernels")

HALF = torch.bfloat16


def stepped(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx and the parameters' gradients of one step, and the buffers after it."""
    leaf = x.detach().requires_grad_()
    y = module(leaf)
    expected = [leaf, *(p for p in module.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, expected, dy), *(buffer.clone() for buffer in module.buffers())]


@MODES
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_steps_agree_with_torchs(affine, track, training, guard, device):
    """The batch's statistics are used in evaluation without running ones, and dx flows through them."""
    options = {"affine": affine, "track_running_stats": track, "device": device}
    theirs, ours = (norms.BatchNorm2d(5, **options).train(training) for norms in (nn, triton_norm))
    x, dy = torch.randn(2, 4, 5, 6, 6, device=device) + 1
    for actual, expected in zip(stepped(ours, x, dy), stepped(theirs, x, dy), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert guard is None or len(guard.launches) == 2
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert str(ours) == str(theirs)


def test_module_that_stops_tracking(device):
    """Buffers that exist but are not to move: training leaves them alone, evaluation uses them."""
    theirs, ours = nn.BatchNorm1d(6, device=device), triton_norm.BatchNorm1d(6, device=device)
    x = torch.randn(4, 6, device=device)
    for module in (theirs, ours):
        module(x)
        module.track_running_stats = False
        module(x + 1)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_module_without_a_counter(device):
    theirs, ours = (norms.BatchNorm1d(3, momentum=None, device=device) for norms in (nn, triton_norm))
    for module in (theirs, ours):
        module.num_batches_tracked = None
        module(torch.ones(4, 3, device=device))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_a_module_used_twice_before_backward(activation, device):
    """Its running statistics move between: the backward uses the batch's own, which are saved."""
    theirs, ours = (norms.BatchNorm1d(5, device=device) for norms in (nn, triton_norm))
    x, residual = torch.randn(2, 8, 5, device=device)
    leaves = [[t.clone().requires_grad_() for t in (x, residual)] for _ in range(2)]
    y = ours(*leaves[0][:1], residual=leaves[0][1], activation=activation)
    z = ours(y, residual=leaves[0][0], activation=activation)
    f = getattr(F, activation) if activation else torch.clone
    expected = f(theirs(leaves[1][0]) + leaves[1][1])
    expected = f(theirs(expected) + leaves[1][0])
    z.square().sum().backward()
    expected.square().sum().backward()
    pairs = zip((*leaves[0], *ours.parameters()), (*leaves[1], *theirs.parameters()), strict=True)
    for ours_leaf, theirs_leaf in pairs:
        torch.testing.assert_close(ours_leaf.grad, theirs_leaf.grad, rtol=1e-4, atol=1e-5)


@MODES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_modules_take_them(activation, training, device):
    ours = triton_norm.BatchNorm2d(4, device=device).train(training)
    theirs = nn.BatchNorm2d(4, device=device).train(training)
    x, residual = torch.randn(2, 3, 4, 5, 6, device=device)
    for _ in range(2):
        y = ours(x, residual=residual, activation=activation, negative_slope=0.2)
        z = theirs(x) + residual
        torch.testing.assert_close(y, activated(z, activation, 0.2))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_autocast_on_the_cpu(dtype, training):
    if not INTERPRETED:
        pytest.skip("the kernels don't run on the CPU")
    theirs, ours = (norms.BatchNorm1d(6).train(training) for norms in (nn, triton_norm))
    x = torch.randn(8, 6, 4).to(dtype)
    with torch.autocast("cpu", HALF):
        actual, expected = (stepped(module, x, torch.ones_like(x)) for module in (ours, theirs))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6)


def test_calls_that_differ_in_options_alone(device):
    """Calls on the same tensors differ in their gradients, activation, slope, eps, mode and backend."""
    call = drawn((4, 8, 6, 6), "flat", device, residual=torch.float32, activation="leaky_relu")
    running = running_statistics(8, device)
    for _ in range(2):
        for other in (
            {},
            {"slope": 0.3},
            {"activation": "silu"},
            {"activation": None},
            {"residual": None, "activation": "silu"},
            {"running": running, "activation": "silu"},
            {"bias": None, "activation": None},
        ):
            call.of(**other).against_oracle()
        with torch.no_grad():
            torch.testing.assert_close(call.ours(*call.inputs()), call.composed(*call.inputs()))
        with triton_norm.backend("torch"):
            call.against_oracle()
        for training in (False, True):
            arguments = [statistic.clone() for statistic in running]
            y = triton_norm.batch_norm(call.x, *arguments, training=training, eps=0.5)
            torch.testing.assert_close(y, F.batch_norm(call.x, *running, training=training, momentum=0.0, eps=0.5))
            assert torch.equal(arguments[0], running[0]) != training
        with pytest.raises(ValueError, match="activation must be"):
            triton_norm.batch_norm(call.x, *running, activation="leaky")
        with pytest.raises(TypeError, match="'activation' must be"):
            triton_norm.batch_norm(call.x, *running, activation=["relu"])


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1), (1, 3, 1, 1, 1)])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_one_value_per_channel_is_no_batch_in_torchs_words(shape, backend):
    x = torch.ones(shape)
    with pytest.raises(ValueError, match="Expected more than 1 value") as theirs:
        F.batch_norm(x, None, None, training=True)
    for fused in ({}, {"residual": x, "activation": "silu"}):
        with triton_norm.backend(backend), pytest.raises(ValueError, match="Expected more than 1 value") as ours:
            triton_norm.batch_norm(x, None, None, training=True, **fused)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@MODES
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_compiled_gives_the_bits_of_eager(activation, training, device):
    eager = triton_norm.BatchNorm2d(4).to(device).train(training)
    compiled = copy.deepcopy(eager)

    def step(module, run, x):
        x, residual = (t.clone().requires_grad_() for t in x)
        y = run(x, residual=residual, activation=activation)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, residual, *module.parameters()))]

    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for n in (2, 3):  # the second makes shapes dynamic
        x = torch.randn(2, n, 4, 3, 6, device=device)
        assert all(map(torch.equal, step(eager, eager, x), step(compiled, run, x)))
    assert all(map(torch.equal, eager.buffers(), compiled.buffers()))
