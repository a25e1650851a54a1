"""triton_norm.batch_norm through the kernels, against torch in fp64."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import triton_norm
from support.channel_norms import Call
from support.oracle import Results, assert_same_but_for_order, run

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@pytest.fixture(autouse=True)
def _through_the_kernels():
    with triton_norm.backend("triton"):
        yield


@pytest.fixture
def small_tiles(numbers):
    """Interpreted with so small tiles and so many programs that channels are split, and splits are swept in steps."""
    numbers(interpreted_tile_elements=256, multiprocessors=2, min_split_elements=64, channels_last_lanes=16)


def laid(x: Tensor, layout: str) -> Tensor:
    if layout == "channels-first":
        return x
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def drawn(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, layout: str = "channels-first"
) -> tuple[Tensor, ...]:
    """x, weight, bias and dy."""
    x = laid((3 * torch.randn(shape, dtype=torch.float64) + 2).to(device, dtype), layout)
    weight, bias = (torch.randn(shape[1], dtype=torch.float64).to(device, dtype) for _ in range(2))
    return x, weight, bias, laid(torch.randn(shape, dtype=torch.float64).to(device, dtype), layout)


def statistics(n_channels: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(n_channels).to(device, dtype), (torch.rand(n_channels) + 0.5).to(device, dtype)


def batch_norm(running: tuple[Tensor, Tensor] | None, eps: float = 1e-5):
    """In training where `running` is None, otherwise in evaluation with those statistics."""
    mean, var = running or (None, None)
    return lambda x, weight, bias: triton_norm.batch_norm(x, mean, var, weight, bias, running is None, 0.1, eps)


def against_oracle(x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor, training: bool) -> Results:
    running = None if training else statistics(x.shape[1], x.device.type)
    return Call(x, None, weight, bias, dy, running).against_oracle()


SHAPES = [
    (2, 3, 4, 4),  # the classic demonstration's
    (9, 5),  # features: no positions
    (64, 24),  # features: wide accesses
    (3, 6, 50),  # sequences: two elements an access
    (4, 5, 7, 7),  # odd positions: one element an access
    (2, 1, 9, 11),  # one channel
    (40, 3, 1, 1),  # one position
    (1, 4, 6, 6),  # one sample
    (2, 16, 2, 4, 6),  # volumes
    (2, 18, 3, 5),  # an even number of channels
    (3, 8, 2, 2, 2, 3),  # more axes than any module takes
]
LAYOUTS = ["channels-first", "channels-last"]


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_fp64(shape, layout, dtype, training, device):
    x, *others = drawn(shape, dtype, device, layout)
    actual = against_oracle(x, *others, training)
    assert actual.y.stride() == x.stride()
    assert actual.dx.stride() == x.stride()


@MODES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(7, 3, 13, 5), (3, 20, 4, 4), (150, 9), (3, 2, 500)])
@pytest.mark.usefixtures("small_tiles")
def test_splits_and_steps(shape, layout, training, device):
    against_oracle(*drawn(shape, torch.float32, device, layout), training)


@MODES
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_weight", [False, True])
def test_either_parameter_may_be_missing(with_weight, with_bias, training, device):
    x, weight, bias, dy = drawn((3, 4, 5, 2), torch.float32, device)
    against_oracle(x, weight if with_weight else None, bias if with_bias else None, dy, training)


@MODES
@pytest.mark.parametrize("parameters", DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_another_type(dtype, parameters, training, device):
    x, _, _, dy = drawn((4, 6, 9), dtype, device)
    _, weight, bias, _ = drawn((4, 6, 9), parameters, device)
    actual = against_oracle(x, weight, bias, dy, training)
    assert (actual.y.dtype, actual.dweight.dtype, actual.dbias.dtype) == (dtype, parameters, parameters)


@MODES
@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_only_the_gradients_asked_for(asked, training, device):
    *inputs, dy = drawn((5, 4, 3, 3), torch.float32, device)
    running = None if training else statistics(4, device)
    everything = run(batch_norm(running), *inputs, dy)
    leaves = [tensor.requires_grad_(i in asked) for i, tensor in enumerate(inputs)]
    found = torch.autograd.grad(batch_norm(running)(*leaves), [leaves[i] for i in asked], dy)
    expected = (everything.dx, everything.dweight, everything.dbias)
    for i, grad in zip(asked, found, strict=True):
        assert_same_but_for_order(grad, expected[i])


STRIDED = {
    "every second sample": lambda x: torch.stack((x, x), 1)[:, 0],
    "some of the channels": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "rows of an image padded": lambda x: F.pad(x, (0, 2))[..., :-2],
    "offset by one element": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "one sample expanded": lambda x: x[:1].expand(x.shape),
    "one channel expanded": lambda x: x[:, :1].expand(x.shape),
    "one position expanded": lambda x: x[:, :, :1, :1].expand(x.shape),
    "height and width exchanged": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "samples innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}


@MODES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strided", STRIDED)
@pytest.mark.parametrize("of", ["input", "gradient"])
def test_strides(strided, of, layout, training, device):
    x, weight, bias, dy = drawn((4, 8, 4, 6), torch.float32, device, layout)
    if of == "input":
        x = STRIDED[strided](x)
    else:
        dy = STRIDED[strided](dy)
    against_oracle(x, weight, bias, dy, training)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_in_the_other_layout(layout, device):
    x, weight, bias, _ = drawn((3, 8, 4, 4), torch.float32, device, layout)
    dy = drawn((3, 8, 4, 4), torch.float32, device, next(name for name in LAYOUTS if name != layout))[3]
    against_oracle(x, weight, bias, dy, True)


EXPANDED = {"one element": (1, 1, 1, 1), "one an image": (4, 1, 1, 1), "one a map": (4, 8, 1, 1)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("expanded", EXPANDED)
def test_strided_and_expanded_tensors_are_not_copied(expanded, layout, guard, device, monkeypatch):
    x = laid(torch.randn(4, 8, 4, 6, device=device), layout)
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


def test_what_has_to_be_copied_is_said(device):
    x = torch.randn(2, 4, 6, 8, device=device)
    explain = triton_norm.explain
    assert explain(triton_norm.batch_norm, x[..., ::2], None, None, training=True).copies
    assert not explain(triton_norm.batch_norm, x, None, None, training=True).copies


HARD = {
    "mean is 1e4 times std": lambda shape: 1e4 + torch.randn(shape),
    "constant": lambda shape: torch.full(shape, 1e4 / 3),
    "a constant per channel": lambda shape: (torch.randn(shape[1]) * 1e3)[:, None, None].expand(shape).contiguous(),
    "one outlier": lambda shape: torch.randn(shape).index_put((torch.tensor(0),), torch.tensor(1e6)),
    "squares near the largest": lambda shape: torch.randn(shape).sign() * 1e18,
    "large, of one sign": lambda shape: 3e38 * (1 - 1e-3 * torch.rand(shape)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("data", HARD)
@pytest.mark.usefixtures("small_tiles")
def test_no_less_exact_than_torch_on_hard_data(data, layout, device):
    x = laid(HARD[data]((4, 6, 9, 10)).to(device), layout)
    weight, bias = torch.randn(2, 6, device=device)
    exact = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), training=True)
    theirs, ours = (f(x, None, None, weight, bias, True).double() for f in (F.batch_norm, triton_norm.batch_norm))
    assert ours.isfinite().all()
    known = theirs.isfinite()
    their_error, our_error = ((y - exact)[known].abs().max() if known.any() else 0.0 for y in (theirs, ours))
    assert our_error <= 2 * their_error + 4 * torch.finfo(torch.float32).eps * exact.abs().max().clamp_min(1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [1e4, 1e6])
@pytest.mark.usefixtures("small_tiles")
def test_a_large_mean_leaves_no_error_of_its_own_size(ratio, layout, device):
    x = laid((ratio + torch.randn(4, 3, 9, 10)).to(device), layout)
    exact = F.batch_norm(x.double(), None, None, training=True)
    error = (triton_norm.batch_norm(x, None, None, training=True) - exact).abs().max()
    assert error <= 4 * torch.finfo(torch.float32).eps * exact.abs().max()


@MODES
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_and_inf_where_torch_has_them(poison, training, device):
    x, weight, bias, dy = drawn((3, 4, 5, 5), torch.float32, device)
    x[1, 2, 3, 3] = poison
    running = None if training else statistics(4, device)
    mean, var = running or (None, None)
    ours = run(batch_norm(running), x, weight, bias, dy)
    theirs = run(lambda x, w, b: F.batch_norm(x, mean, var, w, b, training), x, weight, bias, dy)
    for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


@MODES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("small_tiles")
def test_same_bits_every_run(layout, training, device):
    inputs = drawn((6, 5, 9, 8), torch.float32, device, layout)
    running = None if training else statistics(5, device)
    first, second = (run(batch_norm(running), *inputs).tensors() for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_running_statistics(dtype, momentum, layout, device):
    """Three steps, against torch's module in fp64; the statistics are kept in fp32, in fp64 beside fp64 input."""
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    ours = triton_norm.BatchNorm2d(5, momentum=momentum).to(device, kept)
    exact = nn.BatchNorm2d(5, momentum=momentum).to(device, torch.float64)
    for step in range(3):
        x = drawn((3, 5, 4, 3), dtype, device, layout)[0] + step
        ours(x)
        exact(x.double())
    tolerance = 16 * torch.finfo(kept).eps
    torch.testing.assert_close(ours.running_mean.double(), exact.running_mean, rtol=tolerance, atol=3 * tolerance)
    torch.testing.assert_close(ours.running_var.double(), exact.running_var, rtol=tolerance, atol=3 * tolerance)
    assert ours.num_batches_tracked.item() == 3


@pytest.mark.parametrize("kept", DTYPES)
def test_running_statistics_of_another_type(kept, device):
    mean, var = statistics(4, device, kept)
    exact_mean, exact_var = mean.double(), var.double()
    x = torch.randn(5, 4, 6, device=device)
    triton_norm.batch_norm(x, mean, var, training=True)
    F.batch_norm(x.double(), exact_mean, exact_var, training=True)
    tolerance = 2 * max(torch.finfo(kept).eps, 8 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(var.double(), exact_var, rtol=tolerance, atol=tolerance)


@MODES
def test_parameters_and_running_statistics_of_any_stride(training, device):
    x, _, _, dy = drawn((4, 6, 9), torch.float32, device)
    weight, bias, mean, var = (torch.rand(6, 4, device=device) + 0.5).T
    exact_mean, exact_var = mean.double(), var.double()
    ours = run(lambda x, w, b: triton_norm.batch_norm(x, mean, var, w, b, training), x, weight, bias, dy)
    theirs = run(
        lambda x, w, b: F.batch_norm(x, exact_mean, exact_var, w, b, training),
        *(t.double() for t in (x, weight, bias, dy)),
    )
    for a, b in zip([*ours.tensors(), mean, var], [*theirs.tensors(), exact_mean, exact_var], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@MODES
def test_module_agrees_with_torchs(training, affine, track, device):
    options = {"affine": affine, "track_running_stats": track, "device": device}
    theirs, ours = nn.BatchNorm1d(6, **options), triton_norm.BatchNorm1d(6, **options)
    ours.load_state_dict(theirs.state_dict())
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for module in (theirs, ours):
        module.train(training)
    for shape in ((4, 6), (4, 6, 5), (2, 6)):
        x = torch.randn(shape, device=device)
        torch.testing.assert_close(ours(x), theirs(x))
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)
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


def test_a_module_used_twice_before_backward(device):
    theirs, ours = (norms.BatchNorm1d(5, device=device) for norms in (nn, triton_norm))
    x = torch.randn(2, 8, 5, device=device)
    grads = []
    for module in (theirs, ours):
        leaves = [part.clone().requires_grad_() for part in x]
        (module(leaves[0]).square() * module(leaves[1]).exp()).sum().backward()
        grads.append([leaf.grad for leaf in leaves] + [p.grad for p in module.parameters()])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


def test_training_without_gradients_still_moves_the_running_statistics(device):
    module = triton_norm.BatchNorm1d(3, device=device)
    with torch.no_grad():
        y = module(torch.randn(5, 3, device=device))
    assert y.grad_fn is None
    assert module.num_batches_tracked.item() == 1
    assert module.running_mean.abs().sum() > 0


@pytest.mark.unguarded  # fp64 through thousands of launches; the kernels are guarded above
@MODES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_both_orders(layout, training, device):
    x, weight, bias, _ = drawn((2, 2, 2), torch.float64, device, layout)
    running = None if training else statistics(2, device, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    assert torch.autograd.gradcheck(batch_norm(running), leaves)
    assert torch.autograd.gradgradcheck(batch_norm(running), leaves, fast_mode=True)


def test_channels_past_two_to_the_31_elements(device):
    """Two samples far apart in a storage that is reserved and not touched between them."""
    stride = 2**31 + 64
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 3 * stride:
        pytest.skip("less than 6 GB of GPU memory free")
    storage = torch.UntypedStorage(2 * (stride + 64), device=device)
    x = torch.empty(0, dtype=torch.float16, device=device).set_(storage, 0, (2, 4, 16), (stride, 16, 1))
    x.copy_(torch.randn(2, 4, 16))
    against_oracle(x, None, None, torch.randn(2, 4, 16, device=device).half(), True)
