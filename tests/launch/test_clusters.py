"""Clusters of blocks: where they are offered, what a search does with one that fails, and their compiled code.

Triton 3.9 is the first to reduce over a cluster. With an older one the choice is tested, and nothing is compiled.
"""

import importlib.metadata
import json
from types import SimpleNamespace

import pytest
import torch

import triton_norm
from support import processes
from support.gpus import H100, changed
from triton_norm import launch
from triton_norm.rows import plan
from triton_norm.tuning import choices, limits
from triton_norm.tuning.configs import Config, config, space_of
from triton_norm.tuning.limits import Gpu, assumed, most_blocks_of
from triton_norm.tuning.row_spaces import RowWork, rows_backward, rows_backward_programs, rows_forward

triton = pytest.importorskip("triton")

WITH_CLUSTERS = changed(H100, most_blocks=8)
COLUMNS = [1024, 8192, 16384, 32768, 65536, 131072, 262144, 2**20]
HAS_CLUSTERS = tuple(map(int, triton.__version__.split(".")[:2])) >= limits.CLUSTERS_SINCE


def spaces(gpu: Gpu):
    for n_cols in COLUMNS:
        for dtype, stored_bytes in (("bfloat16", 2), ("float32", 4)):
            work = RowWork(n_cols, (dtype,), stored_bytes, 4)
            yield n_cols * stored_bytes, rows_forward(work, gpu)
            yield n_cols * stored_bytes, rows_backward(work, gpu)


def clusters(configs: tuple[Config, ...]) -> list[int]:
    return [candidate.num_ctas for candidate in configs if candidate.num_ctas > 1]


@pytest.mark.parametrize(
    ("version", "capability", "blocks"),
    [
        ("3.9.0", (9, 0), 8),
        ("3.9.0+git1", (10, 3), 8),
        ("3.10.0", (9, 0), 8),
        ("4.0.0", (10, 0), 8),
        ("3.8.0", (9, 0), 1),
        ("3.7.1", (10, 0), 1),
        ("3.9.0", (8, 9), 1),
        ("3.9.0", (12, 0), 1),  # Triton's own predicate leaves it out
        ("3.9.0", None, 1),
    ],
)
def test_where_clusters_are_offered(version, capability, blocks, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(limits, "INTERPRETED", False)
    assert most_blocks_of.__wrapped__(capability) == blocks
    monkeypatch.setattr(limits, "INTERPRETED", True)
    assert most_blocks_of.__wrapped__(capability) == 1


def test_no_cluster_where_there_are_none():
    assert [space for _, space in spaces(H100) if clusters(space.configs)] == []


def test_rows_that_one_block_can_not_hold_begin_with_a_cluster():
    """Asserts that a first choice has at most 8 blocks, a last candidate 16, and a short row no cluster."""
    seen = set()
    for row_bytes, space in spaces(WITH_CLUSTERS):
        found = clusters(space.configs)
        seen.update(found)
        assert all(blocks in (2, 4, 8, 16) for blocks in found), space
        assert space.configs[0].num_ctas <= 8
        if row_bytes < 16 * 1024:
            assert found == []
        if 16 in found:
            assert set(found) == {16}
            assert space.configs[-1].num_ctas == 16
    assert seen == {2, 4, 8, 16}
    first = {
        (space.kernel, row_bytes): space.configs[0].num_ctas
        for row_bytes, space in spaces(WITH_CLUSTERS)
        if row_bytes == 2 * 65536
    }
    assert first == {("rows_forward_kernel", 2 * 65536): 4, ("rows_backward_kernel", 2 * 65536): 8}


def test_a_cluster_has_a_whole_row():
    for _, space in spaces(WITH_CLUSTERS):
        for candidate in space.configs:
            if candidate.num_ctas > 1:
                assert (candidate["PEERS"], candidate["BLOCK_M"]) == (1, 1)
                assert candidate.keywords.get("PIECES", 1) == 1
                assert 1 <= candidate.num_warps <= 32
                assert candidate.keywords["num_ctas"] == candidate.num_ctas


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
    monkeypatch.setattr(launch, "_told_of_clusters", [])
    with pytest.warns(UserWarning, match=r"a config of 2 blocks could not be launched.*refused") as told:
        chosen = failing_search(monkeypatch, RuntimeError("refused"), (2, 4, 1))
    assert (chosen.num_ctas, len(told)) == (1, 1)


def test_no_memory_is_an_error(monkeypatch):
    with pytest.raises(torch.OutOfMemoryError):
        failing_search(monkeypatch, torch.OutOfMemoryError("no memory"), (2, 1))


def test_a_chosen_cluster_takes_no_workspace(device, monkeypatch):
    """The first call has it for the candidates whose programs wait, and the calls behind the search have none."""
    made = []
    monkeypatch.setattr(plan, "meeting", lambda *arguments: made.append(arguments) or (None, None))
    monkeypatch.setattr(launch, "search", lambda kernel, space, *arguments: space.configs[0])
    monkeypatch.setattr(launch, "start", lambda *arguments: None)
    gpu = Gpu("of this test", 132, 50 << 20, most_blocks=8)
    x = torch.randn(2, 65536, device=device).bfloat16()
    with choices.begun_anew(None), assumed(gpu), triton_norm.backend("triton"):
        for _ in range(3):
            triton_norm.layer_norm(x, (65536,))
    assert len(made) == 1


COMPILE = """
from dataclasses import replace

import torch
from perf import ptx
from perf.resources import TARGETS, compiling_for, inspect
from triton_norm import layer_norm, rms_norm

target, *columns = sys.argv[1:]
for function in (layer_norm, rms_norm):
    for dtype in (torch.bfloat16, torch.float32):
        for n in map(int, columns):
            x, weight = (torch.empty(shape, dtype=dtype).requires_grad_() for shape in ((4, n), (n,)))
            with compiling_for(TARGETS[target]) as launches:
                y = function(x, (n,), weight)
                y.backward(torch.empty_like(y))
                forward, backward, *_ = launches
                kept = [
                    replace(one, config=config)
                    for one in (forward, backward)
                    for config in one.space.configs
                    if config.num_ctas > 1
                ]
                kernels = [one.compile() for one in kept]
                for one, kernel, code in zip(kept, kernels, inspect(kernels, TARGETS[target]), strict=True):
                    told = {name: code[name] for name in ("spill_stores", "accesses", "atomics")}
                    named = {"kernel": one.kernel.__name__, "columns": n, "blocks": one.config.num_ctas}
                    barriers = kernel.asm["ptx"].count("barrier.cluster")
                    print(json.dumps({**named, "dtype": str(dtype), "barriers": barriers, **told}))
"""


@pytest.mark.unguarded
@pytest.mark.skipif(not HAS_CLUSTERS, reason="Triton 3.9 is the first with clusters")
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_compiled_clusters(target):
    """No cluster spills, waits by atomics, or loads through an argument that it has stored to: a barrier of one block
    does not order another's stores before it."""
    printed = processes.output("-c", f"import json, sys\n{COMPILE}", target, "16384", "65536", "131072")
    records = [json.loads(line) for line in printed.splitlines()]
    assert {record["kernel"] for record in records} == {"rows_forward_kernel", "rows_backward_kernel"}
    for record in records:
        where = [record[name] for name in ("kernel", "dtype", "columns", "blocks")]
        assert (record["spill_stores"], record["atomics"]) == (0, []), where
        assert record["barriers"] > 0, where
        for name, access in record["accesses"].items():
            assert not ("load" in access and "store" in access), (name, where)
        assert set(record["accesses"]["x"]["load"]) == {"128"}, where


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
