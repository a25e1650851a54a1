"""Clusters of blocks: where they are offered, how a search treats one that fails, and their compiled code.

Triton 3.9 is the first to reduce over a cluster. With an older one the choice is tested, and nothing is compiled.
"""

import importlib.metadata
import json
from types import SimpleNamespace

import pytest
import torch

import triton_norm
from support import host_mutants, processes
from support.gpus import H100, changed
from triton_norm import launch
from triton_norm.rows import plan
from triton_norm.tuning import choices, limits, row_spaces
from triton_norm.tuning.configs import Config, config, space_of
from triton_norm.tuning.limits import Gpu, assumed
from triton_norm.tuning.row_spaces import RowWork, rows_backward, rows_backward_programs, rows_forward

triton = pytest.importorskip("triton")

WITH_CLUSTERS = changed(H100, most_blocks=8)
COLUMNS = [1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 2**20]
HAS_CLUSTERS = tuple(map(int, triton.__version__.split(".")[:2])) >= limits.CLUSTERS_SINCE


def spaces(gpu: Gpu):
    for n_cols in COLUMNS:
        for dtype, stored_bytes in (("bfloat16", 2), ("float32", 4)):
            work = RowWork(n_cols, (dtype,), stored_bytes, 4)
            yield work, rows_forward(work, gpu)
            yield work, rows_backward(work, gpu)


def clusters(configs: tuple[Config, ...]) -> list[int]:
    return [candidate.num_ctas for candidate in configs if candidate.num_ctas > 1]


OFFERED = [
    ("3.9.0", (9, 0), 8),
    ("3.9.0+git1", (10, 3), 8),
    ("3.10.0", (9, 0), 8),
    ("4.0.0", (10, 0), 8),
    ("3.8.0", (9, 0), 1),
    ("3.7.1", (10, 0), 1),
    ("3.9.0", (8, 9), 1),
    ("3.9.0", (12, 0), 1),  # Triton's own predicate leaves it out
    ("3.9.0", None, 1),
]


@pytest.mark.parametrize(("version", "capability", "blocks"), OFFERED)
def test_where_clusters_are_offered(version, capability, blocks, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(limits, "INTERPRETED", False)
    assert limits.most_blocks_of.__wrapped__(capability) == blocks
    monkeypatch.setattr(limits, "INTERPRETED", True)
    assert limits.most_blocks_of.__wrapped__(capability) == 1


def test_no_cluster_where_there_are_none():
    assert [space for _, space in spaces(H100) if clusters(space.configs)] == []


def test_rows_that_one_block_can_not_hold_begin_with_a_cluster():
    """Asserts that a first choice has at most 8 blocks, a last candidate 16, and a short row no cluster."""
    seen = set()
    for work, space in spaces(WITH_CLUSTERS):
        result = clusters(space.configs)
        seen.update(result)
        assert all(blocks in (2, 4, 8, 16) for blocks in result), space
        assert space.configs[0].num_ctas <= 8
        assert bool(result) == (4096 <= work.n_cols <= (262144 if space.kernel == "rows_forward_kernel" else 131072))
        if 16 in result:
            assert set(result) == {16}
            assert space.configs[-1].num_ctas == 16
    assert seen == {2, 4, 8, 16}
    first = {
        space.kernel: space.configs[0].num_ctas
        for work, space in spaces(WITH_CLUSTERS)
        if (work.n_cols, work.stored_bytes) == (65536, 2)
    }
    assert first == {"rows_forward_kernel": 4, "rows_backward_kernel": 8}


def test_clusters_of_short_rows_load_the_next_one():
    """Asserts that a search tries them after clusters of one row each."""
    for work, space in spaces(WITH_CLUSTERS):
        if space.kernel == "rows_forward_kernel":
            stages = [candidate["STAGES"] for candidate in space.configs if candidate.num_ctas > 1]
            assert stages == ([] if work.n_cols < 4096 else [0, 3] if work.n_cols <= 16384 else stages[:1])


def test_a_cluster_has_a_whole_row():
    for _, space in spaces(WITH_CLUSTERS):
        for candidate in space.configs:
            if candidate.num_ctas > 1:
                assert (candidate["PEERS"], candidate["BLOCK_M"]) == (1, 1)
                assert candidate.keywords.get("PIECES", 1) == 1
                assert 1 <= candidate.num_warps <= 32
                assert candidate.keywords["num_ctas"] == candidate.num_ctas


CHOICE_MUTANTS = [
    (limits, "most_blocks_of", "capability[0] not in CLUSTER_GENERATIONS", "capability[0] < 8"),  # below 9.0
    (limits, "most_blocks_of", ">= CLUSTERS_SINCE", ">= (3, 8)"),
    (limits, "most_blocks_of", "return PORTABLE_BLOCKS", "return 2 * PORTABLE_BLOCKS"),
    (limits, "most_blocks_of", " or INTERPRETED", ""),
    (row_spaces, "_with_clusters", "2 * gpu.most_blocks", "4 * gpu.most_blocks"),  # past 16 blocks
    (row_spaces, "_with_clusters", "portable + others + larger", "larger + portable + others"),
    (row_spaces, "_with_clusters", "gpu.most_blocks == 1", "gpu.most_blocks == 0"),
]


@pytest.mark.parametrize("mutant", CHOICE_MUTANTS, ids=lambda mutant: f"{mutant[1]}: {mutant[2]} -> {mutant[3]}")
def test_wrong_choices_are_caught(mutant, monkeypatch):
    module, *_ = mutant

    def check():
        if module is limits:
            for version, capability, blocks in OFFERED:
                test_where_clusters_are_offered(version, capability, blocks, monkeypatch)
        else:
            test_no_cluster_where_there_are_none()
            test_rows_that_one_block_can_not_hold_begin_with_a_cluster()

    with monkeypatch.context() as patch:
        monkeypatch = patch
        check()
        with host_mutants.mutated(*mutant), pytest.raises(AssertionError):
            check()


def test_clusters_of_a_backward_are_as_many_as_run_at_once():
    """A multiprocessor holds 8192 elements of rows: one block of 8192 each."""
    cluster = config(16, num_ctas=4, BLOCK_M=1, BLOCK_N=32768, PEERS=1).keywords
    assert rows_backward_programs(cluster, 10**6, 32768, H100) == 132 // 4
    assert rows_backward_programs(cluster, 5, 32768, H100) == 5


def failing_search(monkeypatch, error: Exception, blocks: tuple[int, ...]):
    """Searches among configs of these numbers of blocks, of which the clusters raise. Returns the choice."""
    candidates = [config(4, num_ctas=n, BLOCK_M=1, BLOCK_N=8) for n in blocks]

    class Tuner:
        def __init__(self, configs):
            self.configs, self.cache = configs, {}

        def check_disk_cache(self, *arguments):
            return False

        def _bench(self, *arguments, config, **meta):
            if config.num_ctas > 1:
                raise error
            return [1.0, 1.0, 1.0]

        def __getitem__(self, grid):
            def run(*arguments, **constants):
                timings = {config: self._bench(config=config) for config in self.configs}
                self.best_config = min(timings, key=timings.get)

            return run

    monkeypatch.setattr(triton, "autotune", lambda configs, **options: lambda kernel: Tuner(configs))
    kernel = SimpleNamespace(arg_names=[])
    return launch.search(kernel, space_of("kernel", "key", candidates), lambda meta: 1, (), {})


def test_a_cluster_that_fails_is_left_out_with_one_warning(monkeypatch):
    monkeypatch.setattr(launch, "_warned", set())
    with pytest.warns(UserWarning, match=r"a config of 2 blocks could not be launched.*refused") as told:
        chosen = failing_search(monkeypatch, RuntimeError("refused"), (2, 4, 1))
    assert (chosen.num_ctas, len(told)) == (1, 1)


def test_no_memory_is_an_error(monkeypatch):
    with pytest.raises(torch.OutOfMemoryError):
        failing_search(monkeypatch, torch.OutOfMemoryError("no memory"), (2, 1))


def test_a_chosen_cluster_takes_no_workspace(device, monkeypatch):
    """The first call has it for the candidates whose programs wait, and the calls behind the search have none."""
    made = []
    monkeypatch.setattr(plan, "exchange_workspace", lambda *arguments: made.append(arguments) or (None, None))
    monkeypatch.setattr(launch, "search", lambda kernel, space, *arguments: space.configs[0])
    monkeypatch.setattr(launch, "start", lambda *arguments: None)
    gpu = Gpu("of this test", 132, 50 << 20, most_blocks=8)
    x = torch.randn(2, 65536, device=device).bfloat16()
    with choices.begun_anew(None), assumed(gpu), triton_norm.backend("triton"):
        for _ in range(3):
            triton_norm.layer_norm(x, (65536,))
    assert len(made) == 1


COMPILE = """
import json, sys
from dataclasses import replace

import torch
import triton_norm
from perf import ptx
from perf.resources import TARGETS, compiling_for, inspect

target, *named = sys.argv[1:]
target = TARGETS[target]

def tensors(dtype, *shapes, last=False):
    for shape in shapes:
        x = torch.empty(shape, dtype=dtype)
        yield (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()

def tell(call, name, clusters=True, gradients=False):
    with compiling_for(target, clusters) as launches:
        result = call()
        y = result[0] if isinstance(result, tuple) else result
        forward = len(launches)
        y.backward(torch.empty_like(y))
        counts = forward, len(launches) - forward
        del launches[: forward * gradients]
        kept = [
            replace(one, config=config)
            for one in launches
            for config in one.space.configs
            if (config.num_ctas > 1) == clusters
        ]
        kernels = [one.compile() for one in kept]
        for one, kernel, code in zip(kept, kernels, inspect(kernels, target), strict=True):
            told = {name: code[name] for name in ("spill_stores", "accesses", "atomics", "blocks", "clusters")}
            told |= {"stages": one.config.keywords.get("STAGES"), "copies": kernel.asm["ptx"].count("cp.async.c")}
            told |= {"kernel": one.kernel.__name__, "name": name, "launches": counts}
            told |= {"tiles": one.constants.get("TILES")}
            told |= {"loaded_back": ptx.loaded_back(kernel.asm["ptx"], kernel.src.signature)}
            told |= {"order": ptx.order(kernel.asm["ptx"], kernel.src.signature, "num_batches_tracked")}
            told |= {"gathers": kernel.asm["ttgir"].count("tt.gather")}
            print(json.dumps({**told, "barriers": kernel.asm["ptx"].count("barrier.cluster")}))
"""

OF_ROWS = """
for norm in (triton_norm.layer_norm, triton_norm.rms_norm):
    for dtype in (torch.bfloat16, torch.float32):
        for n in map(int, named):
            x, residual, weight, bias = tensors(dtype, (4, n), (4, n), (n,), (n,))
            affine = (weight, bias) if norm is triton_norm.layer_norm else (weight,)
            added = {"residual": residual} if n % 3 else {}
            tell(lambda: norm(x, (n,), *affine, **added), f"{norm.__name__} {dtype} {n}")
"""

OF_CHANNELS = """
def batch_norm(dtype, *shape, last=False, activation=None, residual=False, clusters=True, momentum=0.1):
    x, added = tensors(dtype, shape, shape, last=last)
    mean, var, count = torch.zeros(shape[1]), torch.ones(shape[1]), torch.tensor(0)
    weight, bias = tensors(torch.float32, shape[1:2], shape[1:2])
    fused = {"activation": activation, "residual": added if residual else None}
    name = f"{dtype} {shape} {last} {activation} {residual} {momentum}"
    statistics = mean, var, weight, bias, True, momentum
    tell(lambda: triton_norm.batch_norm(x, *statistics, num_batches_tracked=count, **fused), name, clusters)

half = torch.bfloat16
batch_norm(half, 256, 256, 14, 14)  # 50,176 elements a channel
batch_norm(half, 256, 256, 28, 28)  # 200,704
batch_norm(half, 512, 128, 28, 28)  # 401,408
batch_norm(half, 128, 64, 32, 32, activation="relu", residual=True)  # 131,072
batch_norm(torch.float32, 64, 256, 28, 28)
batch_norm(half, 64, 256, 28, 28, activation="gelu", residual=True)
batch_norm(half, 8, 256, 14, 14, last=True, activation="relu", residual=True)
batch_norm(half, 32, 64, 7, 7, activation="relu", residual=True)  # folded: two blocks
batch_norm(half, 320, 64, 7, 7, activation="gelu", residual=True, momentum=None)  # the most on 8 blocks
batch_norm(half, 640, 240, 3, 3)  # 24 channels a block of columns
batch_norm(torch.float32, 128, 64, 7, 7, activation="silu")
x, weight, bias = tensors(half, (8, 320, 64, 64), (320,), (320,))
for n in (32, 64):  # elements of an access have one weight, or each its own
    tell(lambda: triton_norm.group_norm(x, n, weight, bias, activation="silu"), f"{n} groups")
(x,), (weight, bias) = tensors(half, (8, 320, 32, 32), last=True), tensors(half, (320,), (320,))
tell(lambda: triton_norm.group_norm(x, 32, weight, bias, activation="silu"), "folded groups")
x, weight, bias = tensors(half, (8, 32, 256, 256), (32,), (32,))
tell(lambda: triton_norm.instance_norm(x, weight=weight, bias=bias), "instances")
batch_norm(half, 32, 64, 7, 7, clusters=False)
"""

# An example of each limit, with as many elements a thread as it allows. "shape" is that of group_norm's x.
OF_GROUPS = """
def group_norm(dtype, shape, n_groups, activation=None, residual=False):
    x, added, weight, bias = tensors(dtype, shape, shape, shape[1:2], shape[1:2])
    fused = {"activation": activation, "residual": added if residual else None}
    name = f"{dtype} {shape} {activation} {residual}"
    tell(lambda: triton_norm.group_norm(x, n_groups, weight, bias, **fused), name, gradients=True)

half, single = torch.bfloat16, torch.float32
for dtype in (half, single):
    group_norm(dtype, (2, 320, 64, 64), 32)  # ten channels of 4,096
    group_norm(dtype, (2, 320, 64, 64), 32, "silu")
group_norm(half, (2, 2048, 4, 4), 1)  # channels of two accesses
group_norm(half, (2, 256, 14, 14), 1)  # accesses of 8 bytes
group_norm(half, (1, 128, 128, 128), 8)  # 262,144 elements
group_norm(half, (2, 512, 7, 7), 1, "gelu_tanh")  # windows
group_norm(single, (2, 64, 35, 35), 2)
group_norm(single, (2, 320, 64, 64), 32, "relu", True)
group_norm(single, (2, 320, 32, 32), 32, "gelu_tanh", True)
"""


def compiled(code, *arguments):
    printed = processes.output("-c", COMPILE + code, *arguments)
    return [json.loads(line) for line in printed.splitlines()]


def check(record):
    """Asserts that a cluster does not spill, wait by atomics, or load its own stores behind a barrier: a barrier of
    one block does not order another's stores before it. Nor does it gather, which reads one block's values alone.

    An average over all batches is counted by an atomic. All blocks have read the count behind a cluster's barrier."""
    assert (record["spill_stores"], record["loaded_back"], record["gathers"]) == (0, [], 0), record
    if record["atomics"]:
        assert record["name"].endswith("None"), record
        assert (record["atomics"], record["order"][:3]) == (["u32"], ["load", "barrier", "atomic"]), record
    assert record["barriers"] > 0, record
    assert 1 < record["blocks"] * record["clusters"] <= 148 * 32, record


@pytest.mark.long
@pytest.mark.unguarded
@pytest.mark.skipif(not HAS_CLUSTERS, reason="Triton 3.9 is the first with clusters")
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_compiled_rows(target):
    """Compiles a bias, and a residual unless the columns are a multiple of 3. Stages load by asynchronous copies."""
    records = compiled(OF_ROWS, target, "4096", "6000", "16384", "65536", "98304")
    assert {record["kernel"] for record in records} == {"rows_forward_kernel", "rows_backward_kernel"}
    for record in records:
        check(record)
        assert set(record["accesses"]["x"]["load"]) == {"128"}, record
        assert (record["copies"] > 0) == (record["stages"] > 1), record


@pytest.mark.long
@pytest.mark.unguarded
@pytest.mark.skipif(not HAS_CLUSTERS, reason="Triton 3.9 is the first with clusters")
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_compiled_channels(target):
    """Each is one launch, whose forward loads x in one place. Accesses are of 16 bytes but for 14 × 14 positions."""
    *records, forward, backward = compiled(OF_CHANNELS, target)
    for record in records:
        check(record)
        x = record["accesses"]["x"]["load"]
        assert set(x) == {"64" if "14, 14" in record["name"] and "False" in record["name"] else "128"}, record
        if record["kernel"] == "channels_forward_kernel":
            assert x == record["accesses"]["y"]["store"], record
            assert sum(x.values()) == record["tiles"], record
            assert record["launches"][0] == 1
    of = {(record["kernel"], record["name"], record["blocks"]) for record in records}
    names = {"channels_forward_kernel", "channels_backward_kernel", "groups_fused_backward_kernel"}
    assert {kernel for kernel, *_ in of} == names
    first = [record["blocks"] for record in records if record["kernel"] == "channels_forward_kernel"]
    assert {2, 4, 8, 16} <= set(first)
    # One block's folded statistics and means do go through memory.
    assert "statistics" in forward["loaded_back"]
    assert "means" in backward["loaded_back"]


@pytest.mark.long
@pytest.mark.unguarded
@pytest.mark.skipif(not HAS_CLUSTERS, reason="Triton 3.9 is the first with clusters")
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_compiled_gradients_of_groups(target):
    """Two launches: x and dy are read by the first, in as many places as dx is stored, and the second adds up sums."""
    records = compiled(OF_GROUPS, target)
    assert {record["kernel"] for record in records} == {"groups_fused_backward_kernel"}
    assert {record["blocks"] for record in records} == {2, 4, 8, 16}
    assert len({record["name"] for record in records}) == 11
    for record in records:
        check(record)
        assert record["launches"][1] == 2, record
        x, dy, dx = (record["accesses"][name] for name in ("x", "dy", "dx"))
        assert x["load"] == dy["load"], record
        assert set(x["load"]) == {"64" if "14, 14" in record["name"] else "128"}, record
        assert "35" in record["name"] or "7, 7" in record["name"] or x["load"] == dx["store"], record


OVER_A_STUB = """
import ctypes, sys, tempfile
from dataclasses import replace
from pathlib import Path

import torch
import triton_norm
from triton_norm.testing import stub_driver
from triton_norm.tuning.limits import assumed

if stub_driver.missing():
    sys.exit(0)
with tempfile.TemporaryDirectory() as folder, stub_driver.installed(Path(folder)) as launches:
    with assumed(replace(stub_driver.STUB_GPU, most_blocks=8)):
        x = torch.randn(2, 65536).bfloat16()
        for _ in range(4):
            triton_norm.layer_norm(x, (65536,))
    print(launches(), ctypes.CDLL("libcuda.so.1").cluster_launch_count())
"""


@pytest.mark.unguarded
@pytest.mark.skipif(not HAS_CLUSTERS, reason="Triton 3.9 is the first with clusters")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the stub would be a second driver")
def test_every_launch_of_a_cluster_has_its_attribute():
    """Also the direct ones, behind Triton's own first launch."""
    printed = processes.output("-c", OVER_A_STUB)
    if not printed.strip():
        pytest.skip("the stub can't be built here")
    assert printed.split() == ["4", "4"]
