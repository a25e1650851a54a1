"""GroupNorm's backward by clusters that have a whole group: its results, interpreted, and where it is offered."""

import math

import pytest
import torch

import triton_norm
from support import host_mutants
from support.gpus import H100, changed
from support.group_calls import checked, drawn, elements_loaded, fitted
from support.oracle import differentiated
from support.pairwise import pairwise
from support.spaces import unknown_gpu
from triton_norm.channels import group_backward
from triton_norm.tuning import channel_clusters, group_spaces
from triton_norm.tuning.channel_clusters import APART, CLUSTERS
from triton_norm.tuning.limits import INTERPRETED

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("through_the_kernels")
if INTERPRETED:
    from triton_norm.testing.interleave import interleaved

interpreted = pytest.mark.skipif(not INTERPRETED, reason="a GPU has its own clusters, or none")

KERNEL, COMBINE, CHANNELS = "groups_fused_backward_kernel", "groups_backward_kernel", "channels_backward_kernel"
WITH_CLUSTERS = changed(H100, most_blocks=8)
TILE = 256  # elements of a program that is no cluster
CASES = {  # name: shape, groups
    "three channels of four": ((2, 6, 16, 20), 2),  # 80 of 128 accesses
    "two channels": ((3, 4, 24, 24), 2),
    "many channels": ((2, 96, 5, 4), 1),
    "too large for a team": ((2, 4, 20, 32), 1),  # by channel without clusters
    "odd positions": ((2, 8, 9, 13), 2),  # windows: 117 positions are in 30 accesses at most
    "a sample": ((1, 8, 256), 2),
}


@pytest.fixture
def small(numbers):
    """Clusters of at least 256 threads, which have four elements each; a third of 24 multiprocessors may wait, and the
    programs of a forward do."""
    numbers(most_blocks=8, cluster_group_elements=4, interpreted_tile_elements=TILE, multiprocessors=24)
    with interleaved():
        yield


def norm(n_groups, activation=None):
    return lambda x, r, w, b: triton_norm.group_norm(x, n_groups, w, b, residual=r, activation=activation)


def cluster_of(guard):
    """Returns the one launch of a backward that reads x and dy: of a cluster, which exchanges nothing in memory."""
    (launched,) = (one for one in guard.launches if "dy_ptr" in one.arguments)
    assert launched.kernel == KERNEL
    assert {"sync_ptr", "partials_ptr"}.isdisjoint(launched.arguments)
    return launched


@interpreted
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("case", CASES)
def test_matches_fp64(case, guard, device):
    shape, n_groups = CASES[case]
    checked(drawn(shape, device), n_groups)
    cluster_of(guard)
    assert guard.kernels[-1] == COMBINE


@interpreted
@pytest.mark.usefixtures("small")
@pairwise(
    {
        "case": ["three channels of four", "many channels", "odd positions"],
        "activation": ["relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish", None],
        "residual": [False, True],
        "layout": ["first", "samples"],
        "dtype": [torch.float32, torch.bfloat16],
    }
)
def test_activations_types_and_strides(case, activation, residual, layout, dtype, guard, device):
    shape, n_groups = CASES[case]
    inputs = drawn(shape, device, dtype, layout, residual)
    checked(fitted(inputs, n_groups, activation), n_groups, activation)
    cluster_of(guard)


@interpreted
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("needs", [(0,), (0, 1), (0, 2), (0, 3)], ids=str)
@pytest.mark.parametrize("affine", [False, True])
def test_some_gradients(needs, affine, guard, device):
    shape, n_groups = CASES["three channels of four"]
    inputs = drawn(shape, device, residual=True, affine=affine)
    call = norm(n_groups, "silu")
    needs = [place for place in needs if affine or place < 2]
    whole = differentiated(call, inputs.leaves(), (inputs.dy,))
    some = differentiated(call, inputs.leaves(), (inputs.dy,), needs)
    assert {one.kernel for one in guard.launches if "dy_ptr" in one.arguments} == {KERNEL}
    for place in needs:
        assert torch.equal(some.gradients[place], whole.gradients[place])


@interpreted
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("case", ["three channels of four", "odd positions"])
def test_an_expanded_dy_is_read_as_it_is(case, guard, device):
    shape, n_groups = CASES[case]
    inputs = drawn(shape, device)
    dy = torch.randn(*shape[:2], 1, 1, device=device).expand(shape)
    checked(inputs._replace(dy=dy), n_groups, "silu")
    assert cluster_of(guard).arguments["dy_ptr"].extent.start == dy.data_ptr()


@interpreted
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("case", CASES)
def test_x_and_dy_are_read_once(case, guard, device):
    shape, n_groups = CASES[case]
    inputs = drawn(shape, device, torch.bfloat16)
    differentiated(norm(n_groups), inputs.leaves(), (inputs.dy,))
    launched, itemsize = cluster_of(guard), inputs.x.itemsize
    loaded = shape[0] * elements_loaded(shape[1], math.prod(shape[2:])) * itemsize
    assert launched.bytes("load", "x_ptr") == launched.bytes("load", "dy_ptr") == loaded
    assert launched.bytes("store", "dx_ptr") == inputs.x.numel() * itemsize


@interpreted
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("case", ["three channels of four", "odd positions"])
def test_a_sample_does_not_depend_on_the_others(case, guard, device):
    shape, n_groups = CASES[case]
    inputs = drawn((5, *shape[1:]), device)

    def dx(samples):
        leaves = inputs.x[samples], None, inputs.weight, inputs.bias
        return differentiated(norm(n_groups), leaves, (inputs.dy[samples],)).dx

    whole = dx(slice(None))
    for samples in (slice(3, 4), slice(1, 5)):
        assert torch.equal(whole[samples], dx(samples))
    assert {one.kernel for one in guard.launches if "dy_ptr" in one.arguments} == {KERNEL}


@interpreted
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("shape", "n_groups", "layout", "reason"),
    [
        ((2, 8, 8, 8), 4, "first", "a program has several groups"),
        ((2, 4, 3, 52), 2, "first", "two channels of 156 elements: 256 threads would have two elements each"),
        ((2, 3, 16, 16), 3, "first", "one channel, which is read as a BatchNorm's"),
        ((2, 3, 15, 17), 1, "first", "samples of 765 elements, and accesses of one"),
        ((1, 8, 16, 16), 2, "last", "rows of groups, whose sums go through memory"),
    ],
)
def test_no_cluster(shape, n_groups, layout, reason, monkeypatch, device):
    made = []
    launch_of = group_backward.cluster_launch
    monkeypatch.setattr(group_backward, "cluster_launch", lambda *call: made.append(launch_of(*call)) or made[-1])
    checked(drawn(shape, device, layout=layout), n_groups)
    assert not any(made), reason


@interpreted
def test_past_eight_blocks_a_cluster_is_the_last_guess(numbers, guard, device):
    """Threads of one element each: 16 blocks of 512. A team of members is the first."""
    numbers(most_blocks=8, cluster_group_elements=1, interpreted_tile_elements=2048, multiprocessors=24)
    inputs = drawn((1, 4, 64, 60), device)
    with interleaved():
        differentiated(norm(2), inputs.leaves(), (inputs.dy,))
    (launched,) = (one for one in guard.launches if "dy_ptr" in one.arguments)
    assert "partials_ptr" in launched.arguments


FORMS = {"three channels of four": [KERNEL, COMBINE], "too large for a team": [CHANNELS, COMBINE, CHANNELS]}
"""The launches without clusters: of a team whose members wait, and by channel."""


@interpreted
@pytest.mark.parametrize(("times_ms", "faster"), [((1.0, 2.0), CLUSTERS), ((2.0, 1.0), APART)])
@pytest.mark.parametrize("case", FORMS)
def test_the_faster_form_is_chosen(case, times_ms, faster, numbers, monkeypatch, tmp_path, guard):
    """Both are run, and the gradients are those of the one that is chosen, for other numbers of samples too."""
    import triton.testing
    from triton.runtime.interpreter import InterpretedFunction

    shape, n_groups = CASES[case]
    numbers(most_blocks=8, cluster_group_elements=4, whole_group_elements=TILE, multiprocessors=24, warp=32)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(InterpretedFunction, "cache_key", "of an interpreted kernel", raising=False)
    monkeypatch.setattr("triton_norm.launch.search", lambda kernel, space, *_: space.configs[0])
    times = iter(times_ms)
    monkeypatch.setattr(triton.testing, "do_bench", lambda run, **_: run() or next(times))
    expected = [KERNEL, COMBINE] if faster == CLUSTERS else FORMS[case]
    with unknown_gpu(tmp_path), interleaved():
        for n_samples in (2, 3):  # the second asks for no times
            checked(drawn((n_samples, *shape[1:]), "cpu"), n_groups)
            assert guard.kernels[-len(expected) :] == expected
            last = [one for one in guard.launches if "dy_ptr" in one.arguments][-1]
            assert ("partials_ptr" in last.arguments) == (faster == APART and case == "three channels of four")


HALF, SUM, SINGLE = ("bfloat16",) * 2, ("bfloat16",) * 3, ("float32",) * 2
SIZES = [  # channels and positions of a group, vector, types, curved; blocks of the configs
    ((10, 4096), 8, HALF, False, [4, 8]),  # 16 × 4096 elements
    ((10, 4096), 8, HALF, True, [8]),
    ((10, 4096), 8, SUM, False, [8]),
    ((10, 4096), 8, SUM, True, [16]),
    ((10, 4089), 8, HALF, False, [8]),  # windows of 512 accesses
    ((10, 4089), 8, SUM, False, [8]),
    ((10, 4089), 8, HALF, True, [16]),
    ((10, 4091), 8, HALF, True, None),  # windows of 513
    ((16, 8192), 8, HALF, False, [8]),
    ((16, 8192), 4, SINGLE, False, [8]),
    ((16, 8200), 8, HALF, False, [16]),
    ((17, 8200), 8, HALF, False, None),
    ((1024, 16), 8, HALF, False, [2, 4]),
    ((2, 4096), 8, HALF, False, [2]),  # in four warps each
    ((2, 2048), 8, HALF, False, None),  # half as many threads
    ((1, 65536), 8, HALF, False, None),  # a channel, which is read as a BatchNorm's
    ((10, 4098), 2, SINGLE, False, [8]),
    ((10, 4098), 2, HALF, False, None),  # accesses of four bytes
    ((10, 4096), 2, ("float64",) * 2, False, None),
]


@pytest.mark.parametrize(("shape", "vector", "types", "curved", "expected"), SIZES)
def test_blocks_of_a_group(shape, vector, types, curved, expected):
    itemsize = {HALF: 4, SUM: 4, SINGLE: 8}.get(types, 16)

    def blocks(gpu):
        work = group_spaces.gradient_cluster(shape, vector, types, itemsize, curved, gpu)
        if work is None:
            return None
        configs = group_spaces.gradient(work, gpu).configs
        assert work.blocks == configs[0].num_ctas
        for config in configs:
            assert config["M"] == 1
            assert config.maxnreg * 32 * config.num_warps <= 64 * 1024
        return [config.num_ctas for config in configs]

    assert blocks(WITH_CLUSTERS) == expected
    assert blocks(H100) is None


@pytest.mark.parametrize(
    "mutant",
    [
        (channel_clusters, "warps_of", "else 2 * gpu.most_blocks", "else 4 * gpu.most_blocks"),  # past 16
        (channel_clusters, "warps_of", "2 <= count", "1 <= count"),
        (group_spaces, "gradient_cluster", "per_group == 1 or ", ""),
        (group_spaces, "gradient_cluster", "narrow or ", ""),
        (group_spaces, "gradient_cluster", ' or "float64" in types', ""),
        (group_spaces, "_of_cluster_thread", "2 if work.curved or others", "2 if others"),
        (group_spaces, "_of_cluster_thread", "work.windows or ", ""),
        (group_spaces, "_of_cluster_thread", " or len(work.types) > 2", ""),
        (group_spaces, "_of_cluster_thread", "4 if work.curved and others else ", ""),
    ],
    ids=lambda mutant: f"{mutant[1]}: {mutant[2]} -> {mutant[3]}",
)
def test_wrong_choices_are_caught(mutant):
    def check():
        for size in SIZES:
            test_blocks_of_a_group(*size)

    with host_mutants.mutated(*mutant), pytest.raises((AssertionError, ZeroDivisionError, IndexError)):
        check()
