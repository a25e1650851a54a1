"""Groups in one launch, where their programs keep them in registers and wait for each other, and in two."""

import functools

import pytest
import torch

import triton_norm
from support.channel_norms import share
from support.group_calls import checked, drawn, laid
from support.oracle import differentiated
from support.turns import backwards, one_of_each, shuffled
from triton_norm.channels import group_plan
from triton_norm.tuning.limits import INTERPRETED

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("through_the_kernels"),
    pytest.mark.skipif(not INTERPRETED, reason="a GPU starts its programs in its own order"),
]

if INTERPRETED:
    from support.turns import place_by_program_id
    from triton_norm.kernels import channels
    from triton_norm.testing.interleave import DeadlockError, interleaved

FORWARD = "channels_forward_kernel"
MOST = 4  # programs that share a group

CASES = {  # name: shape, groups, layout, tile, programs that share a group
    "a weight for each access": ((3, 4, 8, 20), 2, "first", 128, 3),
    "a weight for each element": ((2, 16, 7, 7), 2, "first", 128, 4),  # vectors straddle channels
    "elements one by one": ((2, 6, 5, 7), 2, "first", 32, 4),
    "channels shorter than an access": ((2, 160, 3), 4, "first", 64, 2),
    "rows of a few groups": ((2, 12, 9, 7), 4, "last", 512, 4),  # 12 of 32 columns
    "rows of several blocks": ((2, 150, 4, 3), 30, "last", 256, 3),  # 8 · 5 of 64 columns, the last block less
    "rows of one group": ((2, 64, 5, 5), 2, "last", 256, 4),
    "a channel each": ((2, 3, 16, 20), 3, "first", 128, 3),
    "a channel each, last": ((2, 24, 9, 7), 24, "last", 512, 2),
}


@pytest.fixture
def use(numbers):
    """Sets the tile of programs that share a group, of which there are at most four."""
    return functools.partial(share, numbers, multiprocessors=3 * MOST)


def peers(launched):
    """Returns True if programs exchanged partial results."""
    return {"sync_ptr", "partials_ptr"} <= launched.arguments.keys()


def forwards(guard):
    return [launched for launched in guard.launches if launched.kernel == FORWARD]


@pytest.mark.parametrize("case", CASES)
def test_matches_fp64(case, use, guard, device):
    shape, n_groups, layout, tile, n_peers = CASES[case]
    use(tile)
    with interleaved():
        checked(drawn(shape, device, layout=layout), n_groups)
    (launched,) = forwards(guard)
    assert peers(launched)
    assert launched.bytes("store", "partials_ptr") == 3 * 4 * shape[0] * n_groups * n_peers


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize("case", ["a weight for each access", "a weight for each element", "rows of a few groups"])
def test_activations_and_residuals(case, activation, residual, use, guard, device):
    shape, n_groups, layout, tile, _ = CASES[case]
    use(tile)
    inputs = drawn(shape, device, layout=layout, residual=residual)
    with interleaved():
        checked(inputs._replace(dy=torch.zeros_like(inputs.dy)), n_groups, activation)
    assert len(forwards(guard)) == 1


@pytest.mark.parametrize("layout", ["samples", "strided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_strides_and_types(dtype, layout, use, device):
    use(128)
    with interleaved():
        checked(drawn((3, 8, 7, 7), device, dtype, layout, residual=True), 2)


@pytest.mark.parametrize("parameters", ["weight", "bias", "neither"])
@pytest.mark.parametrize("case", ["a weight for each element", "rows of a few groups"])
def test_without_weight_or_bias(case, parameters, use, device):
    shape, n_groups, layout, tile, _ = CASES[case]
    use(tile)
    inputs = drawn(shape, device, layout=layout)
    absent = {name: None for name in ("weight", "bias") if name != parameters}
    with interleaved():
        checked(inputs._replace(**absent), n_groups)


@pytest.mark.parametrize("layout", ["first", "last"])
def test_groups_that_do_not_fit_take_two_launches(layout, use, guard, device):
    use(32)
    with interleaved():
        checked(drawn((2, 12, 8, 8), device, layout=layout), 3)
    assert len(forwards(guard)) == 2


@pytest.mark.parametrize("case", CASES)
def test_x_is_read_once(case, use, guard, device):
    shape, n_groups, layout, tile, _ = CASES[case]
    use(tile)
    x = drawn(shape, device, torch.bfloat16, layout).x
    with interleaved():
        y = triton_norm.group_norm(x, n_groups)
    (launched,) = guard.launches
    assert launched.bytes("load", "x_ptr") == x.numel() * x.itemsize
    assert launched.bytes("store", "y_ptr") == y.numel() * y.itemsize


ADVERSE = [
    {"delayed": 0},
    {"order": backwards, "resident": MOST},
    {"order": shuffled, "resident": MOST + 1, "delayed": 0},
    {"order": one_of_each, "resident": MOST, "delayed": 3},
]


@pytest.mark.parametrize("case", ["a weight for each element", "rows of a few groups"])
def test_the_bits_do_not_depend_on_the_programs_order(case, use, device):
    shape, n_groups, layout, tile, _ = CASES[case]
    use(tile)
    x, _, weight, bias, *_ = drawn(shape, device, layout=layout)
    with interleaved():
        expected = triton_norm.group_norm(x, n_groups, weight, bias)
    for how in ADVERSE:
        with interleaved(**how):
            assert torch.equal(triton_norm.group_norm(x, n_groups, weight, bias), expected), how


def test_places_by_program_id_hang_where_tickets_do_not(use, monkeypatch, device):
    use(128)
    x = drawn((2, 16, 7, 7), device).x
    adverse = functools.partial(interleaved, resident=MOST, order=one_of_each)
    with adverse():
        triton_norm.group_norm(x, 2)
    monkeypatch.setattr(channels, "take_place", place_by_program_id)
    with adverse(), pytest.raises(DeadlockError, match=FORWARD):
        triton_norm.group_norm(x, 2)


@pytest.mark.parametrize("case", CASES)
def test_a_sample_does_not_depend_on_the_others(case, use, device):
    shape, n_groups, layout, tile, _ = CASES[case]
    use(tile)
    inputs = drawn((5, *shape[1:]), device, layout=layout)

    def results(samples):
        x, dy = (laid(tensor[samples], layout) for tensor in (inputs.x, inputs.dy))
        leaves = x, None, inputs.weight, inputs.bias
        with interleaved():
            result = differentiated(lambda x, _, w, b: triton_norm.group_norm(x, n_groups, w, b), leaves, (dy,))
        return result.y, result.dx

    whole = results(slice(None))
    for samples in (slice(3, 4), slice(1, 4)):
        for all_of_them, some in zip(whole, results(samples), strict=True):
            assert torch.equal(all_of_them[samples], some)


def test_zeros_are_left_as_they_were(use, monkeypatch, device):
    use(128)
    saved = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(group_plan, "zeros", lambda n, device: saved[:n])
    for shape, n_groups, layout in (
        ((2, 16, 7, 7), 2, "first"),
        ((1, 8, 8, 8), 4, "first"),
        ((2, 12, 9, 7), 4, "last"),
    ):
        with interleaved(order=shuffled):
            triton_norm.group_norm(drawn(shape, device, layout=layout).x, n_groups)
        assert not saved.any()
