"""GroupNorm through the kernels, against torch in fp64: layouts, sizes, hard data, and a sample's independence."""

import pytest
import torch

import triton_norm
from support.group_calls import CHANNELS_LAST, checked, drawn, fitted, laid
from support.oracle import DTYPES, differentiated

pytestmark = pytest.mark.usefixtures("through_the_kernels")

SIZES = [
    ((2, 6, 4, 5), 3),
    ((1, 8, 40, 40), 2),  # several programs a group
    ((3, 6, 7, 7), 2),  # an odd number of positions
    ((4, 12), 3),
    ((2, 4, 7), 4),
    ((2, 32, 3, 3), 4),
    ((2, 20, 8, 8), 1),
    ((1, 6, 2, 3, 4), 6),
    ((2, 64, 8, 8), 32),
    ((2, 3, 33, 40), 3),
    ((1, 1, 5, 5), 1),
    ((1, 640, 2, 2), 2),  # groups of many channels
    ((5, 3, 1, 1), 1),
]


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize(("shape", "n_groups"), SIZES)
def test_matches_fp64(shape, n_groups, layout, device):
    if layout == "last" and len(shape) < 4:
        pytest.skip("no such memory format")
    result = checked(drawn(shape, device, layout=layout), n_groups)
    memory_format = CHANNELS_LAST[len(shape)] if layout == "last" else torch.contiguous_format
    for tensor in (result.y, result.dx):
        assert tensor.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("layout", ["first", "last", "samples", "strided"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "silu", "relu", "leaky_relu", "relu6", "hardswish"])
@pytest.mark.parametrize("n_groups", [2, 8])
def test_activations_residuals_and_strides(n_groups, activation, residual, layout, device):
    inputs = drawn((2, 8, 6, 5), device, layout=layout, residual=residual)
    checked(fitted(inputs, n_groups, activation), n_groups, activation)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu(activation, layout, device):
    """It takes the path of silu: only the function is another one."""
    checked(drawn((2, 8, 6, 5), device, layout=layout, residual=True), 2, activation)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("n_groups", [2, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_types(dtype, n_groups, layout, device):
    inputs = drawn((2, 6, 4, 5), device, dtype, layout)
    result = checked(inputs, n_groups)
    assert {tensor.dtype for tensor in result.tensors()} == {dtype}
    wide = torch.float32 if dtype != torch.float32 else torch.float64
    result = checked(inputs._replace(weight=inputs.weight.to(wide), bias=None), n_groups)
    assert (result.y.dtype, result.dweight.dtype) == (dtype, wide)


@pytest.mark.parametrize("needs", [(0,), (2,), (3,), (0, 3), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("n_groups", [2, 6])
def test_some_gradients(n_groups, activation, needs, device):
    inputs = drawn((3, 6, 4, 4), device, residual=True)

    def norm(x, r, w, b):
        return triton_norm.group_norm(x, n_groups, w, b, residual=r, activation=activation)

    whole, some = (differentiated(norm, inputs.leaves(), (inputs.dy,), requested) for requested in (range(4), needs))
    assert torch.equal(whole.y, some.y)
    for place, (one, other) in enumerate(zip(some.gradients, whole.gradients, strict=True)):
        assert (one is not None) == (place in needs)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


HARD = {
    "a large mean": lambda x: x * 1e-2 + 1e3,
    "large values": lambda x: x * 1e16,
    "small values": lambda x: x * 1e-16,
    "one outlier": lambda x: x + 1e4 * (torch.arange(x.numel(), device=x.device).view(x.shape) == 7),
}


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("n_groups", [2, 4])
@pytest.mark.parametrize("hard", HARD)
def test_hard_data(hard, n_groups, layout, device):
    inputs = drawn((2, 4, 12, 12), device, layout=layout)
    checked(inputs._replace(x=laid(HARD[hard](inputs.x), layout)), n_groups)


def test_a_constant_group_is_exactly_zero(device):
    x = torch.full((2, 6, 5, 7), 1234.567, device=device)
    assert (triton_norm.group_norm(x, 3) == 0).all()
    assert (triton_norm.group_norm(x.contiguous(memory_format=torch.channels_last), 3) == 0).all()


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize(("channels", "n_groups"), [(8, 2), (8, 8)])
def test_a_sample_does_not_depend_on_the_others(channels, n_groups, layout, device):
    """A sample's bits of y and dx are its own, whatever is beside it and however many there are."""
    inputs = drawn((7, channels, 20, 20), device, layout=layout)

    def results(samples):
        x, dy = (laid(tensor[samples], layout) for tensor in (inputs.x, inputs.dy))

        def norm(x, _, w, b):
            return triton_norm.group_norm(x, n_groups, w, b, activation="silu")

        result = differentiated(norm, (x, None, inputs.weight, inputs.bias), (dy,))
        return result.y, result.dx

    for whole, alone in zip(results(slice(None)), results(slice(3, 4)), strict=True):
        assert torch.equal(whole[3:4], alone)
    for whole, some in zip(results(slice(None)), results(slice(2, 5)), strict=True):
        assert torch.equal(whole[2:5], some)


@pytest.mark.parametrize("n_groups", [2, 8])
def test_the_same_call_gives_the_same_bits(n_groups, device):
    inputs = drawn((4, 8, 30, 30), device)
    runs = [
        differentiated(lambda x, _, w, b: triton_norm.group_norm(x, n_groups, w, b), inputs.leaves(), (inputs.dy,))
        for _ in range(2)
    ]
    for one, other in zip(*(run.tensors() for run in runs), strict=True):
        assert torch.equal(one, other)
