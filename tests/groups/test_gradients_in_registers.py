"""The backward that reads x and dy once: programs that have several groups, and programs that share one and wait."""

import functools
import math

import pytest
import torch

import triton_norm
from support.activations import TORCHS
from support.channel_norms import share
from support.group_calls import checked, drawn, elements_loaded, fitted, laid
from support.oracle import differentiated
from support.turns import backwards, one_of_each, shuffled
from triton_norm.channels import group_backward
from triton_norm.tuning import group_spaces
from triton_norm.tuning.limits import INTERPRETED

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("through_the_kernels"),
    pytest.mark.skipif(not INTERPRETED, reason="a GPU has its own tiles, and starts its programs in its own order"),
]

if INTERPRETED:
    from support.turns import place_by_program_id
    from triton_norm.kernels import groups_backward
    from triton_norm.testing.interleave import DeadlockError, interleaved

COMBINE = "groups_backward_kernel"
MOST = 4  # programs that share a group

CASES = {  # name: shape, groups, tile, programs that share a group; of rows, a block of groups
    "whole channels": ((3, 12, 4, 8), 2, 128, 2),  # four channels a program, the last has two
    "a channel a program": ((2, 8, 6, 10), 2, 64, 4),  # 60 of 64 positions
    "odd positions": ((2, 12, 7, 7), 2, 128, 3),
    "parts of a channel": ((2, 4, 6, 10), 2, 32, 4),  # 32 and 28 positions
    "sequences": ((2, 40, 3), 2, 32, 3),
    "several groups": ((5, 12, 4, 4), 4, 256, 1),  # three of four channels; four groups a program
    "several groups, odd": ((5, 12, 5, 5), 4, 1024, 1),
    "features": ((50, 24), 8, 128, 1),
    "channels": ((5, 7, 4, 4), 7, 64, 1),  # InstanceNorm's
    "one group": ((3, 4, 8, 8), 1, 256, 1),
    "channels of odd length": ((5, 8, 3, 3), 8, 256, 1),  # their first and last accesses have other groups' elements
    "odd parts of a channel": ((2, 4, 9, 13), 2, 64, 4),  # of 117 positions, which begin within an access
    "odd channels": ((2, 3, 5, 5), 1, 128, 1),  # samples of 75 elements: one-element accesses
    "rows of a few groups": ((2, 12, 9, 7), 4, 512, 4),  # 12 of 32 columns, at most 16 rows a program
    "rows of several blocks": ((2, 150, 4, 3), 30, 256, 3),  # 8 · 5 of 64 columns, the last block less
    "rows of one group": ((2, 64, 5, 5), 2, 256, 4),
    "whole rows": ((5, 24, 4, 4), 3, 512, 1),  # three groups in 32 columns
}
LAST = [name for name in CASES if "rows" in name]  # are read channels-last
SHARED = [name for name, (*_, members) in CASES.items() if members > 1]
KERNELS = "groups_fused_backward_kernel", "channels_backward_kernel"  # the latter for rows


def layout_of(case):
    return "last" if case in LAST else "first"


@pytest.fixture
def use(numbers):
    """Sets the tile of programs, of which at most four share a group."""
    return functools.partial(share, numbers, multiprocessors=3 * MOST)


def gradient_of(guard, case):
    """Returns the one launch that reads x and dy; there is but one more, which adds up the samples."""
    (launched,) = (one for one in guard.launches if "dy_ptr" in one.arguments)
    assert launched.kernel == KERNELS[case in LAST]
    return launched


def norm(n_groups, activation=None):
    return lambda x, r, w, b: triton_norm.group_norm(x, n_groups, w, b, residual=r, activation=activation)


@pytest.mark.parametrize("case", CASES)
def test_matches_fp64(case, use, guard, device):
    shape, n_groups, tile, members = CASES[case]
    use(tile)
    with interleaved():
        checked(drawn(shape, device, layout=layout_of(case)), n_groups)
    launched = gradient_of(guard, case)
    assert guard.kernels[-1] == COMBINE
    if members > 1:
        assert launched.bytes("store", "partials_ptr") == 2 * 4 * shape[0] * n_groups * members
    else:
        assert "partials_ptr" not in launched.arguments


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", TORCHS)
@pytest.mark.parametrize("case", ["odd positions", "parts of a channel", "several groups", "rows of a few groups"])
def test_activations_and_residuals(case, activation, residual, use, device):
    shape, n_groups, tile, _ = CASES[case]
    use(tile)
    inputs = drawn(shape, device, layout=layout_of(case), residual=residual)
    with interleaved():
        checked(fitted(inputs, n_groups, activation), n_groups, activation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["samples", "strided"])
@pytest.mark.parametrize("shape", [(3, 12, 6, 6), (2, 16, 7, 5)], ids=str)
def test_strides_and_types(shape, layout, dtype, use, device):
    use(128)
    with interleaved():
        checked(drawn(shape, device, dtype, layout, residual=True), 2)


@pytest.mark.parametrize("needs", [(0,), (0, 1), (0, 2), (0, 3), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("case", ["odd positions", "several groups", "rows of a few groups"])
def test_some_gradients(case, needs, use, guard, device):
    shape, n_groups, tile, _ = CASES[case]
    use(tile)
    inputs = drawn(shape, device, layout=layout_of(case), residual=True)
    with interleaved():
        whole = differentiated(norm(n_groups, "silu"), inputs.leaves(), (inputs.dy,))
        launches = len(guard.launches)
        some = differentiated(norm(n_groups, "silu"), inputs.leaves(), (inputs.dy,), needs)
    for place, (one, other) in enumerate(zip(some.gradients, whole.gradients, strict=True)):
        assert (one is not None) == (place in needs)
        assert one is None or torch.equal(one, other)
    assert len(guard.launches) - launches == (3 if {2, 3} & {*needs} else 2)


@pytest.mark.parametrize("parameters", ["weight", "bias", "neither"])
@pytest.mark.parametrize("case", ["odd positions", "several groups", "rows of a few groups"])
def test_without_weight_or_bias(case, parameters, use, device):
    shape, n_groups, tile, _ = CASES[case]
    use(tile)
    absent = {name: None for name in ("weight", "bias") if name != parameters}
    with interleaved():
        checked(drawn(shape, device, layout=layout_of(case))._replace(**absent), n_groups)


@pytest.mark.parametrize("case", CASES)
def test_x_and_dy_are_read_once(case, use, guard, device):
    shape, n_groups, tile, _ = CASES[case]
    use(tile)
    inputs = drawn(shape, device, torch.bfloat16, layout_of(case))
    with interleaved():
        differentiated(norm(n_groups), inputs.leaves(), (inputs.dy,))
    launched, itemsize = gradient_of(guard, case), inputs.x.itemsize
    loaded = shape[0] * elements_loaded(shape[1], math.prod(shape[2:])) if case not in LAST else inputs.x.numel()
    assert launched.bytes("load", "x_ptr") == launched.bytes("load", "dy_ptr") == loaded * itemsize
    assert launched.bytes("store", "dx_ptr") == inputs.x.numel() * itemsize


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_channel_does_not_see_its_neighbours(value, use, device):
    """They share accesses, where the number of positions is odd."""
    shape, n_groups, tile, _ = CASES["channels of odd length"]
    use(tile)
    inputs = drawn(shape, device, residual=True)
    others = [place for place in range(shape[1]) if place != 3]

    def results(**changed):
        leaves = inputs._replace(**changed)
        return differentiated(norm(n_groups, "silu"), leaves.leaves(), (leaves.dy,))

    expected = results()
    for name in ("x", "residual", "dy"):
        spoilt = getattr(inputs, name).clone()
        spoilt[:, 3] = value
        result = results(**{name: spoilt})
        for one, other in ((result.dx, expected.dx), (result.dresidual, expected.dresidual)):
            assert torch.equal(one[:, others], other[:, others]), name
        assert torch.equal(result.dweight[others], expected.dweight[others]), name


@pytest.mark.parametrize("layout", ["first", "last"])
def test_groups_that_do_not_fit_take_two_launches_and_one_that_combines(layout, use, guard, device):
    use(32)
    with interleaved():
        checked(drawn((2, 12, 8, 6), device, layout=layout), 3)
    assert guard.kernels[-3:] == ["channels_backward_kernel", COMBINE, "channels_backward_kernel"]


EXPANDED = {  # the shape of dy before it is expanded
    "a sum": lambda shape: [1] * len(shape),
    "a sum of each sample": lambda shape: [shape[0], *[1] * (len(shape) - 1)],
    "a mean over positions": lambda shape: [*shape[:2], *[1] * (len(shape) - 2)],
}


@pytest.mark.parametrize("expanded", EXPANDED)
@pytest.mark.parametrize(
    ("case", "tile"),
    [(case, CASES[case][2]) for case in ("odd positions", "parts of a channel", "features", "rows of a few groups")]
    + [("several groups", 16), ("rows of one group", 64)],  # in two launches
)
def test_an_expanded_dy_is_read_as_it_is(case, tile, expanded, use, guard, device):
    shape, n_groups, *_ = CASES[case]
    use(tile)
    inputs = drawn(shape, device, layout=layout_of(case), residual=True)
    dy = torch.randn(EXPANDED[expanded](shape), device=device).expand(shape)
    with interleaved():
        checked(inputs._replace(dy=dy), n_groups, "silu")
    for launched in guard.launches:
        if "dy_ptr" in launched.arguments:
            assert launched.arguments["dy_ptr"].extent.start == dy.data_ptr()


ADVERSE = [
    {"delayed": 0},
    {"order": backwards, "resident": MOST},
    {"order": shuffled, "resident": MOST + 1, "delayed": 0},
    {"order": one_of_each, "resident": MOST, "delayed": 3},
]


@pytest.mark.parametrize("case", SHARED)
def test_the_bits_do_not_depend_on_the_programs_order(case, use, device):
    shape, n_groups, tile, _ = CASES[case]
    use(tile)
    inputs = drawn(shape, device, layout=layout_of(case))
    with interleaved():
        expected = differentiated(norm(n_groups), inputs.leaves(), (inputs.dy,)).tensors()
    for how in ADVERSE:
        with interleaved(**how):
            result = differentiated(norm(n_groups), inputs.leaves(), (inputs.dy,)).tensors()
        assert all(map(torch.equal, result, expected)), how


def test_places_by_program_id_hang_where_tickets_do_not(use, monkeypatch, device):
    shape, n_groups, tile, _ = CASES["a channel a program"]
    use(tile)
    inputs = drawn((3, *shape[1:]), device)
    adverse = functools.partial(interleaved, resident=MOST, order=one_of_each)
    with adverse():
        differentiated(norm(n_groups), inputs.leaves(), (inputs.dy,))
    monkeypatch.setattr(groups_backward, "take_place", place_by_program_id)
    with adverse(), pytest.raises(DeadlockError, match=KERNELS[0]):
        differentiated(norm(n_groups), inputs.leaves(), (inputs.dy,))


@pytest.mark.parametrize("case", ["odd positions", "parts of a channel", "several groups", "rows of several blocks"])
def test_a_sample_does_not_depend_on_the_others(case, use, device):
    shape, n_groups, tile, _ = CASES[case]
    use(tile)
    layout = layout_of(case)
    inputs = drawn((9, *shape[1:]), device, layout=layout)

    def dx(samples):
        leaves = laid(inputs.x[samples], layout), None, inputs.weight, inputs.bias
        with interleaved():
            return differentiated(norm(n_groups), leaves, (laid(inputs.dy[samples], layout),)).dx

    whole = dx(slice(None))
    for samples in (slice(3, 4), slice(2, 9)):
        assert torch.equal(whole[samples], dx(samples))


def test_zeros_are_left_as_they_were(use, monkeypatch, device):
    use(64)
    saved = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(group_backward, "zeros", lambda n, device: saved[:n])
    for shape, n_groups, layout in (
        ((2, 8, 6, 10), 2, "first"),
        ((1, 12, 4, 8), 4, "first"),
        ((3, 6, 8, 8), 2, "first"),
        ((2, 12, 9, 7), 4, "last"),
    ):
        inputs = drawn(shape, device, layout=layout)
        with interleaved(order=shuffled):
            differentiated(norm(n_groups), inputs.leaves(), (inputs.dy,))
        assert not saved.any()


def test_far_samples(use, device):
    """Strides between samples are of 64 bits."""
    use(64)

    def far():
        x = torch.empty(0, dtype=torch.float16, device=device)
        x = x.set_(torch.UntypedStorage(2 * (2**31 + 128), device=device), 0, (2, 8, 4), (2**31 + 64, 4, 1))
        return x.copy_(torch.randn(2, 8, 4))

    x, dy = far(), far()
    result, expected = (
        differentiated(norm(2), (one, None, None, None), (other,)).dx
        for one, other in ((x, dy), (x.contiguous(), dy.contiguous()))
    )
    assert torch.equal(result, expected)


@pytest.mark.parametrize("members", [1, 4])
@pytest.mark.parametrize("vector", [1, 8])
def test_programs_have_thousands_of_elements(vector, members):
    from support.gpus import H100

    tile = 8192 if vector > 1 else 4096
    shape = (members, tile) if members > 1 else (16, 49)
    work = group_spaces.gradient_work(shape, vector, ("bf16", "bf16"), 4, False, H100)
    assert (work.members, work.elements) == ((members, tile) if members > 1 else (1, 1024))
    for config in group_spaces.gradient(work, H100).configs:
        assert 2048 <= config["M"] * work.elements <= 8192
    assert group_spaces.gradient_work((64, tile), vector, ("bf16", "bf16"), 4, False, H100) is None
    assert group_spaces.gradient_work((1, 2 * tile), vector, ("bf16", "bf16"), 4, False, H100) is None
    shared = group_spaces.gradient_work((4, 2 * tile + vector), vector, ("bf16", "bf16"), 4, False, H100)
    assert (shared.members, shared.chunks, shared.channels, shared.elements) == (12, 3, 1, tile)
