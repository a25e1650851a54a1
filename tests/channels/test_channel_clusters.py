"""Clusters with whole channels in registers: their results, interpreted, and where they are offered and chosen."""

import warnings
from types import SimpleNamespace

import pytest
import torch

import triton_norm
from support import host_mutants
from support.channel_norms import drawn, running_statistics
from support.gpus import H100, changed, with_numbers
from support.spaces import unknown_gpu
from triton_norm import launch, trials
from triton_norm.channels.launches import Launches
from triton_norm.tuning import channel_clusters, choices
from triton_norm.tuning.channel_clusters import APART, CLUSTERS, clusters
from triton_norm.tuning.channel_spaces import BACKWARD, ChannelWork, SharedChannels
from triton_norm.tuning.configs import space_of
from triton_norm.tuning.limits import INTERPRETED, ByKind

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("through_the_kernels")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="a GPU has its own clusters, or none")

FORWARD = "channels_forward_kernel"
KERNELS = [FORWARD, BACKWARD]
WITH_CLUSTERS = changed(H100, most_blocks=8)
TILES = {
    ("flat", (3, 2, 20, 20)): 2,  # 300 accesses of four, and tiles of 256: the second is not full
    ("flat", (2, 3, 32, 32)): 2,  # two full tiles
    ("last", (5, 40, 8, 8)): 2,  # two blocks of 32 channels, the last with eight
    ("last", (300, 8)): 2,  # features
    ("flat", (7, 2, 191)): None,  # an odd number of positions: accesses of one element, and no cluster
    ("folded", (17, 20, 7, 7)): 3,  # three blocks of eight channels, the last of four; the third tile has one row
    ("folded", (16, 8, 5, 5)): 4,  # four full tiles
    ("folded", (24, 5, 7, 7)): None,  # an odd number of columns: accesses of one element, and no cluster
}


@pytest.fixture
def small(numbers):
    """Clusters of 256 threads, which have eight elements each."""
    few = ByKind(flat=8, last=8, folded=16)
    numbers(most_blocks=8, cluster_least_bytes=0, cluster_elements=few, thread_resident_bytes=ByKind(32, 32, 64))


@pytest.fixture
def taken(monkeypatch):
    """Lists the tiles of the clusters that are prepared."""
    tiles = []
    step = Launches.step

    def noted(self, phase, swept, scalars, plan=None, **constants):
        tiles.extend([] if plan is None else [plan.tiles])
        return step(self, phase, swept, scalars, plan, **constants)

    monkeypatch.setattr(Launches, "step", noted)
    return tiles


@interpreted
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("fused", [{}, {"activation": "relu", "residual": torch.float32}, {"activation": "gelu"}])
@pytest.mark.parametrize(("kind", "shape"), TILES)
def test_matches_fp64(kind, shape, fused, taken, guard, device):
    """One launch forward and one backward. No counter, and no partial results."""
    drawn(shape, kind, device, **fused).against_oracle()
    if TILES[kind, shape] is None:
        assert taken == []
        return
    assert guard.kernels == KERNELS
    assert taken == [TILES[kind, shape], 1]
    for launched in guard.launches:
        assert {"sync_ptr", "partials_ptr", "means_ptr"}.isdisjoint(launched.arguments)


def work_of(kernel, kind, elements, n_blocks=256, **others):
    """Blocks of this many elements a channel, in 16-bit types."""
    lanes = {"flat": 8, "last": 32, "folded": 512}[kind]
    n_groups = -(-elements // (8 if kind == "flat" else 1))
    return SharedChannels(kind, lanes, 8, n_groups, 1, n_blocks, 4 if kernel == BACKWARD else 2, **others)


def launch_of(work, kernel, is_group=False, gpu=WITH_CLUSTERS):
    """Returns the blocks of each config, and whether clusters are the best guess; None if there are no clusters."""
    result = channel_clusters.plan_clusters(work, kernel, is_group, gpu)
    if result is None:
        return None
    plan = result.plan
    assert plan.groups_per_split == work.n_groups
    assert plan.tile * plan.tiles >= work.n_groups * work.lanes > plan.tile * (plan.tiles - 1)
    one = ChannelWork(
        kernel, "clusters", work.kind, work.lanes, work.vector, 1, ("bfloat16",), plan.tile, work.resident_bytes
    )
    space = clusters(one._replace(run=work.run, curved=work.curved, tiles=plan.tiles, streams=work.streams), gpu)
    for config in space.configs:
        assert config["T"] * work.lanes == plan.tile
        assert config["BLOCKS"] == config.num_ctas
        assert work.kind != "folded" or config["T"] % config["BLOCKS"] == 0
        assert 4 <= config.num_warps <= 16
        assert config.maxnreg * 32 * config.num_warps <= 64 * 1024
    return [config.num_ctas for config in space.configs], channel_clusters.forms(space, 2, result.portable).configs[
        0
    ] == CLUSTERS


SIZES = [
    (FORWARD, "flat", 8_000, None),  # less than 16 KiB
    (FORWARD, "flat", 12_544, ([2], True)),  # in four warps each
    (FORWARD, "flat", 50_176, ([2, 4], True)),  # 14 × 14 × 256
    (FORWARD, "flat", 200_704, ([8], True)),  # 28 × 28 × 256
    (FORWARD, "flat", 229_376, ([8], True)),  # 56 elements a thread
    (FORWARD, "flat", 229_384, ([16], False)),
    (FORWARD, "flat", 401_408, ([16], False)),  # 28 × 28 × 512
    (FORWARD, "flat", 802_816, None),
    (FORWARD, "last", 3_136, ([8], True)),  # 14 × 14 × 16
    (FORWARD, "last", 6_272, ([16], False)),
    (FORWARD, "folded", 31, ([2], True)),  # 31 samples of 7 × 7
    (FORWARD, "folded", 320, ([8], True)),  # 80 elements a thread
    (FORWARD, "folded", 321, ([16], False)),
    (FORWARD, "folded", 641, None),
    (BACKWARD, "flat", 131_072, ([8], True)),
    (BACKWARD, "flat", 131_080, ([16], False)),
    (BACKWARD, "flat", 401_408, None),
    (BACKWARD, "last", 2_048, ([8], True)),
    (BACKWARD, "folded", 128, ([8], True)),  # 32 elements a thread
    (BACKWARD, "folded", 129, ([16], False)),
]


@pytest.mark.parametrize(("kernel", "kind", "elements", "expected"), SIZES)
def test_blocks_of_a_channel(kernel, kind, elements, expected):
    work = work_of(kernel, kind, elements)
    assert launch_of(work, kernel) == expected
    assert launch_of(work, kernel, gpu=H100) is None


@pytest.mark.parametrize(
    "mutant",
    [
        ("warps_of", "gpu.most_blocks == 1", "gpu.most_blocks == 0"),  # where there are no clusters
        ("warps_of", "else 2 * gpu.most_blocks", "else 4 * gpu.most_blocks"),  # past 16 blocks
        ("plan_clusters", "blocks <= gpu.most_blocks", "True"),  # 16 first
        ("_most_warps", "_MOST_FOLDED_WARPS if", "MOST_WARPS if"),
        ("_of_thread", "MOST_WARPS // _most_warps(work)", "1"),
        ("forms", "if portable", "if not portable"),
    ],
    ids=lambda mutant: f"{mutant[0]}: {mutant[1]} -> {mutant[2]}",
)
def test_wrong_choices_are_caught(mutant):
    def check():
        for size in SIZES:
            test_blocks_of_a_channel(*size)

    with host_mutants.mutated(channel_clusters, *mutant), pytest.raises((AssertionError, ZeroDivisionError)):
        check()


def test_a_block_of_a_cluster_has_whole_rows_of_a_folded_tile():
    """Takes 1024 lanes: eight warps have a row, in accesses of four elements, and four have less."""
    wide = work_of(FORWARD, "folded", 32)._replace(lanes=1024, vector=4)
    assert launch_of(wide, FORWARD) == ([2], True)
    assert launch_of(wide._replace(lanes=2048, vector=8), FORWARD) is None
    mutant = "_warps", "n * gpu.warp * per_thread >= work.lanes", "True"
    with host_mutants.mutated(channel_clusters, *mutant), pytest.raises(AssertionError):
        launch_of(wide, FORWARD)


@pytest.mark.parametrize(("columns", "offered"), [(2, False), (4, False), (8, True)])
def test_triton_compiles_no_clusters_of_few_columns(columns, offered):
    work = SharedChannels("last", columns, columns, 2**16 // columns, 1, 1, 2)
    assert (channel_clusters.plan_clusters(work, FORWARD, True, WITH_CLUSTERS) is not None) == offered


def test_few_channels_fill_half_of_a_gpu_or_are_small():
    """A GroupNorm's launch does not depend on the number of samples, and so not on this."""
    assert launch_of(work_of(FORWARD, "flat", 200_704, n_blocks=9), FORWARD) is not None  # 72 of 132 multiprocessors
    fewer = work_of(FORWARD, "flat", 200_704, n_blocks=8)  # 64 of them, and 3.2 MB
    assert launch_of(fewer, FORWARD) is not None
    assert launch_of(fewer._replace(resident_bytes=4), FORWARD) is None
    assert launch_of(fewer._replace(resident_bytes=4), FORWARD, is_group=True) is not None


@interpreted
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["batch_norm", "group_norm", "instance_norm"])
def test_half_types_and_groups(name, numbers, taken, guard, device):
    """A GroupNorm's weights change along a group, and its backward is by channel."""
    numbers(interpreted_tile_elements=256, whole_group_elements=256)
    x, dy = torch.randn(2, 2, 4, 34, 32, device=device).bfloat16()  # just more than 128 threads have
    weight, bias = torch.randn(2, 4, device=device)
    call = {
        "batch_norm": lambda norms, x, w, b: norms.batch_norm(x, None, None, w, b, True),
        "group_norm": lambda norms, x, w, b: norms.group_norm(x, 2, w, b),
        "instance_norm": lambda norms, x, w, b: norms.instance_norm(x, weight=w, bias=b),
    }[name]
    result, exact = ([], [])
    for norms, dtype, results in ((triton_norm, None, result), (torch.nn.functional, torch.float64, exact)):
        leaves = [tensor.to(dtype or tensor.dtype).requires_grad_() for tensor in (x, weight, bias)]
        y = call(norms, *leaves)
        results += [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]
    # y and dx are rounded to bfloat16 once; of 2176 terms in fp32 the sums' errors are smaller.
    for one, other in zip(result, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2**-8, atol=2e-3 if one.dim() == 1 else 2**-9)
    assert taken
    assert FORWARD in guard.kernels


@interpreted
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(("shape", "tiles"), [((3, 5, 20, 20), 2), ((17, 16, 7, 7), 3)])  # two blocks of 8 channels
def test_running_statistics_move_once(shape, tiles, momentum, device, taken, guard):
    """The first program counts, if nothing else asks for the count, or else the last to arrive."""
    x, (mean, var), count = torch.randn(shape), running_statistics(shape[1], device), torch.tensor(7)
    norm = torch.nn.BatchNorm2d(shape[1], momentum=momentum, dtype=torch.float64)
    norm.num_batches_tracked.fill_(7)
    for buffer, value in ((norm.running_mean, mean), (norm.running_var, var)):
        buffer.copy_(value)
    exact = norm(x.double())
    y = triton_norm.batch_norm(x, mean, var, training=True, momentum=momentum, num_batches_tracked=count)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean.double(), norm.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), norm.running_var, rtol=1e-6, atol=1e-6)
    assert (count.item(), taken) == (8, [tiles])
    assert ("sync_ptr" in guard.launches[0].arguments) == (momentum is None)


def searched(monkeypatch, folder, times_ms, fails=False):
    """Runs two calls where a search among forms measures these times. Returns the runs timed and the results."""
    timed = []

    def do_bench(run, **_):
        run()
        timed.append(run)
        return times_ms[(len(timed) - 1) % 2]

    import triton.testing

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    x, (mean, var), count = torch.randn(3, 2, 20, 20), running_statistics(2, "cpu"), torch.tensor(0)
    before = mean.clone()
    with unknown_gpu(folder), with_numbers(interpreted=False, warp=32):
        for _ in range(2):
            y = triton_norm.batch_norm(x, mean, var, training=True, momentum=0.5, num_batches_tracked=count)
    expected = 0.25 * before + 0.75 * x.mean((0, 2, 3))
    torch.testing.assert_close(mean, expected)
    assert count.item() == 2
    return timed, y


@interpreted
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("times_ms", "faster"), [((1.0, 2.0), CLUSTERS), ((2.0, 1.0), APART)])
def test_the_faster_form_is_chosen_and_moves_statistics_once(times_ms, faster, monkeypatch, tmp_path, taken):
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(InterpretedFunction, "cache_key", "of an interpreted kernel", raising=False)
    noted = []
    choose = choices.choose
    monkeypatch.setattr(choices, "choose", lambda *chosen: noted.append(chosen[-1]) or choose(*chosen))
    monkeypatch.setattr("triton_norm.launch.search", lambda kernel, space, *_: space.configs[0])
    timed, _ = searched(monkeypatch, tmp_path, times_ms)
    assert (len(timed), [choice for choice in noted if choice in (APART, CLUSTERS)]) == (2, [faster])
    noted.clear()
    again, _ = searched(monkeypatch, tmp_path, (9.0, 9.0))  # in another process: by the file on disk
    assert (again, noted[-1]) == ([], faster)


def timed_with(run, monkeypatch, folder):
    """Returns the fastest of two forms, of which that of clusters is run by this function."""
    import triton.testing

    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    monkeypatch.setattr(launch, "_warned", set())
    monkeypatch.setattr(triton.testing, "do_bench", lambda run, **_: 1.0)
    kernel = SimpleNamespace(cache_key="of no kernel", __name__="kernel")
    space = channel_clusters.forms(space_of("kernel", "key", ()), 2, True)
    return trials.fastest(space, kernel, "of this test", {CLUSTERS: run, APART: lambda: None})


def refusing():
    raise RuntimeError("refused")


def test_clusters_that_fail_are_left_out_with_one_warning(monkeypatch, tmp_path):
    with pytest.warns(UserWarning, match="whole channels could not be launched as a cluster.*refused") as told:
        assert timed_with(refusing, monkeypatch, tmp_path) == APART
    assert len(told) == 1
    assert timed_with(refusing, monkeypatch, tmp_path) == APART  # from disk, without a trial


@pytest.mark.parametrize("content", ["", "[]", '{"fastest": {"CLUSTERS": 2}}', '{"fastest": 3}'])
def test_a_damaged_file_of_times_is_measured_anew(content, monkeypatch, tmp_path):
    assert timed_with(lambda: None, monkeypatch, tmp_path) == CLUSTERS
    (file,) = tmp_path.rglob("*.form.json")
    file.write_text(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert timed_with(refusing, monkeypatch, tmp_path) == APART


def test_no_memory_is_an_error(monkeypatch, tmp_path):
    def run():
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        timed_with(run, monkeypatch, tmp_path)
