"""Groups of which a program has several, whole in registers: layouts, sizes, a sample's independence, and launches."""

import math

import pytest
import torch

import triton_norm
from support.activations import TORCHS
from support.gpus import H100, with_numbers
from support.group_calls import checked, drawn, elements_loaded, fitted, laid
from triton_norm.tuning import group_spaces
from triton_norm.tuning.group_spaces import WholeWork
from triton_norm.tuning.limits import INTERPRETED

pytestmark = [
    pytest.mark.usefixtures("through_the_kernels"),
    pytest.mark.skipif(not INTERPRETED, reason="a GPU has its own tiles"),
]

FORWARD = "groups_forward_kernel"
TILE = 1024

CASES = {  # name: shape, groups, layout
    "a weight for each access": ((3, 12, 4, 4), 6, "first"),
    "a weight for each element": ((5, 16, 7, 7), 2, "first"),  # vectors straddle channels
    "elements one by one": ((3, 9, 5, 5), 3, "first"),
    "features": ((50, 64), 8, "first"),  # eight elements a group
    "features, one a group": ((7, 5), 5, "first"),
    "sequences": ((4, 24, 6), 4, "first"),
    "volumes": ((2, 12, 3, 3, 4), 3, "first"),
    "channels": ((5, 24, 4, 4), 24, "first"),  # InstanceNorm's
    "channels of odd length": ((5, 24, 7, 7), 24, "first"),  # begin and end within accesses
    "rows": ((3, 24, 5, 3), 3, "last"),  # 15 rows of eight channels
    "a few rows": ((3, 12, 2, 2), 2, "last"),  # narrower accesses
    "one position": ((5, 32, 1, 1), 8, "last"),
}


@pytest.fixture(autouse=True)
def several_programs(numbers):
    """Programs of up to 1024 elements: several groups each, and in most cases several programs, the last not full."""
    numbers(interpreted_tile_elements=TILE)


@pytest.mark.parametrize("case", CASES)
def test_matches_fp64(case, guard, device):
    shape, n_groups, layout = CASES[case]
    checked(drawn(shape, device, layout=layout), n_groups)
    assert guard.kernels[0] == FORWARD


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, *TORCHS])
@pytest.mark.parametrize(
    "case", ["a weight for each access", "a weight for each element", "channels of odd length", "rows"]
)
def test_activations_and_residuals(case, activation, residual, device):
    shape, n_groups, layout = CASES[case]
    inputs = drawn(shape, device, layout=layout, residual=residual)
    checked(fitted(inputs, n_groups, activation), n_groups, activation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["samples", "strided", "last"])
def test_strides_and_types(layout, dtype, device):
    for n_groups in (2, 16):
        checked(drawn((3, 16, 7, 7), device, dtype, layout, residual=True), n_groups)


@pytest.mark.parametrize("parameters", ["weight", "bias", "neither"])
@pytest.mark.parametrize("case", ["a weight for each element", "features", "rows"])
def test_without_weight_or_bias(case, parameters, device):
    shape, n_groups, layout = CASES[case]
    absent = {name: None for name in ("weight", "bias") if name != parameters}
    checked(drawn(shape, device, layout=layout)._replace(**absent), n_groups)


@pytest.mark.parametrize("case", CASES)
def test_a_sample_does_not_depend_on_the_others(case, device):
    """Its groups are at other places of other programs."""
    shape, n_groups, layout = CASES[case]
    x, _, weight, bias, *_ = drawn((9, *shape[1:]), device, layout=layout)
    whole = triton_norm.group_norm(x, n_groups, weight, bias)
    for samples in (slice(3, 4) if x.shape[1] > n_groups else slice(3, 5), slice(2, 9)):
        some = triton_norm.group_norm(laid(x[samples], layout), n_groups, weight, bias)
        assert torch.equal(whole[samples], some)


@pytest.mark.parametrize("case", CASES)
def test_x_is_read_once_and_no_program_has_a_single_small_group(case, guard, device):
    shape, n_groups, layout = CASES[case]
    x = drawn(shape, device, torch.bfloat16, layout).x
    y = triton_norm.group_norm(x, n_groups)
    (launched,) = guard.launches
    of_odd_length = case == "channels of odd length"
    loaded = shape[0] * elements_loaded(shape[1], math.prod(shape[2:])) if of_odd_length else x.numel()
    assert launched.bytes("load", "x_ptr") == loaded * x.itemsize
    assert launched.bytes("store", "y_ptr") == y.numel() * y.itemsize


def test_far_samples(device):
    """Strides between samples and between groups are of 64 bits."""
    x = torch.empty(0, dtype=torch.float16, device=device)
    x = x.set_(torch.UntypedStorage(2 * (2**31 + 128), device=device), 0, (2, 8, 4), (2**31 + 64, 4, 1))
    x.copy_(torch.randn(2, 8, 4))
    assert torch.equal(triton_norm.group_norm(x, 2), triton_norm.group_norm(x.contiguous(), 2))


@pytest.mark.parametrize("elements", [1, 8, 512, 4096, 8192])
def test_programs_have_thousands_of_elements(elements):
    """Asserts it for each config that a search tries. None depends on the number of samples."""
    with with_numbers(multiprocessors=132):
        vector = min(8, elements)
        work = WholeWork(elements // vector, vector, 1, ("bf16",), curved=True)
        assert group_spaces.fits(work, H100)
        for config in group_spaces.whole(work, H100).configs:
            assert 2048 <= config["M"] * elements <= 8192
            assert config.num_warps * 32 * 16 >= config["M"] * elements or vector == 1
    assert not group_spaces.fits(work._replace(accesses=4 * 4096), H100)
