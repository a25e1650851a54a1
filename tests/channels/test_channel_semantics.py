"""What else torch's BatchNorm promises: freezing, formats, second derivatives, what autograd notices."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import triton_norm
from support.channel_norms import KINDS, MODES, SPLIT, drawn, laid, running_statistics
from triton_norm import launch
from triton_norm.tuning.limits import INTERPRETED

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def _through_the_kernels():
    with triton_norm.backend("triton"):
        yield


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


def stepped(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx and the parameters' gradients of one step, and the buffers after it."""
    leaf = x.detach().requires_grad_()
    y = module(leaf)
    wanted = [leaf, *(p for p in module.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy), *(buffer.clone() for buffer in module.buffers())]


@MODES
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_steps_agree_with_torchs(affine, track, training, guard, device):
    """In evaluation without running statistics the batch's are used, and dx flows through them."""
    options = {"affine": affine, "track_running_stats": track, "device": device}
    theirs, ours = (norms.BatchNorm2d(5, **options).train(training) for norms in (nn, triton_norm))
    x, dy = torch.randn(2, 4, 5, 6, 6, device=device) + 1
    for found, expected in zip(stepped(ours, x, dy), stepped(theirs, x, dy), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert guard is None or len(guard.launches) == 2


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_module_used_twice_before_backward(activation, device):
    """Its running statistics move between: what is kept for the backward are the batch's own."""
    theirs, ours = (norms.BatchNorm1d(5, device=device) for norms in (nn, triton_norm))
    x, residual = torch.randn(2, 8, 5, device=device)
    leaves = [[t.clone().requires_grad_() for t in (x, residual)] for _ in range(2)]
    y = ours(*leaves[0][:1], residual=leaves[0][1], activation=activation)
    z = ours(y, residual=leaves[0][0], activation=activation)
    f = getattr(F, activation)
    expected = f(theirs(leaves[1][0]) + leaves[1][1])
    expected = f(theirs(expected) + leaves[1][0])
    z.square().sum().backward()
    expected.square().sum().backward()
    pairs = zip((*leaves[0], *ours.parameters()), (*leaves[1], *theirs.parameters()), strict=True)
    for ours_leaf, theirs_leaf in pairs:
        torch.testing.assert_close(ours_leaf.grad, theirs_leaf.grad, rtol=1e-4, atol=1e-5)


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
    for expected, found in zip(*grads, strict=True):
        assert (expected is None) == (found is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert guard is None or len(guard.launches) == 2


def test_all_frozen_needs_no_graph_and_still_moves(device):
    module = triton_norm.BatchNorm1d(3, device=device).requires_grad_(False)
    y = module(torch.randn(5, 3, device=device))
    assert not y.requires_grad
    assert module.num_batches_tracked.item() == 1
    with torch.inference_mode():
        assert module(torch.randn(5, 3, device=device)).is_inference()
    assert module.num_batches_tracked.item() == 2


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
def test_a_graph_that_is_kept_gives_the_same_bits_again(activation, device):
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
    found = []
    for function in (call.ours, call.composed):
        leaves = [tensor.detach().contiguous().requires_grad_() for tensor in (call.x, call.weight, call.bias)]
        y = function(leaves[0], None, *leaves[1:])
        (dx,) = torch.autograd.grad(y, leaves[0], call.dy, create_graph=True)
        found.append(torch.autograd.grad(y.pow(2).sum() + dx.pow(2).sum(), leaves))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_autocast_on_the_cpu(dtype, training):
    if not INTERPRETED:
        pytest.skip("the kernels don't run on the CPU")
    theirs, ours = (norms.BatchNorm1d(6).train(training) for norms in (nn, triton_norm))
    x = torch.randn(8, 6, 4).to(dtype)
    with torch.autocast("cpu", HALF):
        found, expected = (stepped(module, x, torch.ones_like(x)) for module in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6)


LYING = {
    "without gaps": lambda x: x.contiguous(),
    "channels last": lambda x: laid(x, "last"),
    "every second sample": lambda x: torch.stack((x, x), 1)[:, 0],
    "offset by one element": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "rows of an image padded": lambda x: F.pad(x, (0, 2))[..., :-2],
}


@pytest.mark.parametrize("of", ["x", "residual", "dy"])
def test_calls_alike_but_for_how_a_tensor_lies(of, device):
    """One after the other, and once more: what is remembered of one is not taken for another's."""
    call = drawn((4, 8, 6, 6), "flat", device, residual=torch.float32, activation="silu")
    for lie in (*LYING.values(), *LYING.values()):
        call.of(**{of: lie(getattr(call, of))}).against_oracle()


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU not every launch goes that way")
@pytest.mark.parametrize(("of", "widths"), [("x", [1, 1]), ("residual", [1, 1]), ("dy", [4, 1])])
def test_what_lies_unaligned_is_not_taken_for_aligned(of, widths, monkeypatch, device):
    """Elements an access, forward and backward: the interpreter would forgive wide accesses anywhere, a GPU not."""
    found, start = [], launch.start
    monkeypatch.setattr(launch, "start", lambda *what: found.append(what[3]["V"]) or start(*what))
    call = drawn((4, 8, 6, 6), "flat", device, residual=torch.float32, activation="silu")
    for tensor, expected in ((getattr(call, of), [4, 4]), (LYING["offset by one element"](getattr(call, of)), widths)):
        found.clear()
        call.of(**{of: tensor}).run()
        assert found == expected


def test_calls_alike_but_for_what_is_asked(device):
    """Of the same tensors: gradients of some, an activation, a slope, eps, evaluation, torch's path."""
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
            given = [statistic.clone() for statistic in running]
            y = triton_norm.batch_norm(call.x, *given, training=training, eps=0.5)
            torch.testing.assert_close(y, F.batch_norm(call.x, *running, training=training, momentum=0.0, eps=0.5))
            assert torch.equal(given[0], running[0]) != training
        with pytest.raises(ValueError, match="activation must be"):
            triton_norm.batch_norm(call.x, *running, activation="leaky")
        with pytest.raises(TypeError, match="'activation' must be"):
            triton_norm.batch_norm(call.x, *running, activation=["relu"])


SIZES = [
    ("flat", (3, 1, 2, 2)),
    ("last", (5, 1)),
    ("flat", (1, 1, 300, 500)),  # one long channel, in ten tiles
    ("last", (50_001, 3)),  # features by the thousands: an odd number of rows of three
    ("flat", (2, 3, 201, 201)),  # odd positions: one element an access
    ("last", (2, 3, 120, 100)),
    ("flat", (2, 64, 14, 14)),
    ("last", (2, 64, 14, 14)),
    ("folded", (9, 64, 7, 7)),
    ("last", (4, 64, 7, 7)),
    ("last", (7, 64, 1, 1)),
    ("last", (2, 100_000)),
    ("folded", (8, 10_001, 2)),
    ("flat", (2, 6, 3, 4, 5)),
    ("last", (2, 6, 3, 4, 5)),
]


@pytest.mark.parametrize(("kind", "shape"), SIZES)
def test_sizes(kind, shape, numbers, device):
    if shape[1] == 100_000:
        numbers(channels_last_lanes=8192)  # fewer programs
    drawn(shape, kind, device).against_oracle()


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


@MODES
@pytest.mark.parametrize(("shape", "memory_format"), FORMATS)
@pytest.mark.parametrize("dy_format", ["as x", "the other"])
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
    for found in (y, dx, dresidual):
        assert found.is_contiguous(memory_format=memory_format)
        assert found.is_contiguous() == x.is_contiguous()


def test_channels_last_sequences_stay_so(device):
    """[N, C, L] has no memory format of torch's; its strides are kept all the same."""
    x = torch.randn(4, 5, 6, device=device).mT.requires_grad_()
    y = triton_norm.batch_norm(x, None, None, training=True)
    (dx,) = torch.autograd.grad(y, x, torch.randn(4, 6, 5, device=device))
    assert y.stride() == dx.stride() == x.stride()
