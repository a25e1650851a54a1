"""Lower bounds on time, against examples that are worked out by hand. None of them was measured."""

from dataclasses import replace

import pytest

from perf import bounds
from perf.resources import TARGETS

pytestmark = pytest.mark.unguarded

ROWS, COLUMNS = 1024, 1024
BULK = ROWS * COLUMNS * 2  # bytes of x
WEIGHTS = 2 * COLUMNS * 2
A100, H100, H200, B200, MI300X = bounds.GPUS
ABOUT = {"op": "layer_norm", "mode": "forward", "dtype": "bf16", "shape": [ROWS, COLUMNS], "layout": "contiguous"}
FINE = {"status": "ok", "message": ""}


def counted(loaded=BULK, stored=BULK, moved=None, kernels=("k",), **more):
    footprint = {
        "bulk": {"loaded": loaded, "stored": stored},
        "bits": {"loaded": 0, "stored": 0},
        "parameters": {"loaded": WEIGHTS, "stored": 0},
        "statistics": {"loaded": 0, "stored": 0},
        "partials": {"loaded": 1 << 30, "stored": 1 << 30},  # never needs to leave the cache
    }
    record = {"footprint": footprint, "bytes": {"bulk": {"loaded": moved or loaded, "stored": stored}}}
    record |= {"again": {"bulk": 0, "bits": 0}, "launches": [{"kernel": kernel} for kernel in kernels]}
    return ABOUT | FINE | record | more


def compiled(target="sm_90", **more):
    """Four loads of 16 bytes a thread in 4 warps of 32: 8 KiB a program."""
    record = {"target": target, "kernel": "k", "programs": ROWS, "warps": 4, "resident_warps": 64, "registers": 64}
    record |= {"loads": {"128": 4}, "shared_bytes": 512, "asynchronous_copies": 0}
    return ABOUT | FINE | record | more


def test_what_is_stored_may_stay_in_cache_and_what_is_loaded_comes_from_memory():
    found = bounds.bound(counted(), [compiled()], H100)
    assert found["bytes"] == BULK + WEIGHTS  # 2,101,248
    assert found["limited_by"] == "memory bandwidth"
    assert found["bound_us"] == pytest.approx(2_101_248 / 3350e9 * 1e6)
    assert found["bandwidth_gbps"] == pytest.approx(3350)


def test_of_what_is_stored_the_cache_keeps_no_more_than_its_size():
    large = counted(stored=H100.cache + 1000)
    assert bounds.must_store(large, H100.cache) == 1000
    assert bounds.must_store(large, MI300X.cache) == 0


def test_what_the_call_wrote_before_is_no_load_from_memory():
    total_loaded_again = counted(loaded=2 * BULK)
    assert bounds.must_load(total_loaded_again, 0, ["k"]) == BULK + WEIGHTS


def test_a_second_launch_finds_of_its_input_what_the_cache_holds():
    twice = counted(moved=2 * BULK, kernels=("k", "k"))
    assert bounds.must_load(twice, BULK // 4, ["k", "k"]) == 2 * BULK - BULK // 4 + WEIGHTS
    assert bounds.must_load(twice, 4 * BULK, ["k", "k"]) == BULK + WEIGHTS
    assert bounds.must_load(twice, 0, ["k"]) == BULK + WEIGHTS, "on this GPU one launch does it"


def test_what_one_program_loads_again_is_not_counted():
    twice = counted(moved=2 * BULK, again={"bulk": BULK, "bits": 0})
    assert bounds.must_load(twice, 0, ["k"]) == BULK + WEIGHTS


def test_bytes_in_flight():
    program = 4 * 16 * 4 * 32
    assert bounds.in_flight(compiled(programs=10)) == 10 * program
    resident = 16 * TARGETS["sm_90"].multiprocessors
    assert bounds.in_flight(compiled(programs=1 << 20)) == resident * program
    assert bounds.in_flight(compiled(programs=1, registers=8)) == 4 * 32 * 8 * 4, "destinations are registers"
    assert bounds.in_flight(compiled(programs=1, asynchronous_copies=2)) == program + 512
    assert bounds.in_flight(compiled("gfx942", programs=1, loads={128: 1})) == 4 * 64 * 16, "64 threads a warp"


def test_one_program_is_limited_by_its_loads_in_flight():
    found = bounds.bound(counted(), [compiled(programs=1)], H100)
    assert found["limited_by"] == "occupancy"
    assert found["bytes_in_flight"] == 8192
    assert found["bound_us"] == pytest.approx(2_101_248 / 8192 * 0.2)  # 200 ns each time: 51.3
    assert found["bandwidth_gbps"] == pytest.approx(40.96)  # 8192 bytes in 200 ns


def test_of_several_launches_the_one_with_most_in_flight_counts():
    kernels = [compiled(programs=1), compiled(programs=2)]
    assert bounds.bound(counted(), kernels, H100)["bytes_in_flight"] == 16384


def test_few_bytes_take_the_latency_of_one_load():
    few = counted(loaded=4096, stored=4096) | {"shape": [2, 1024]}
    found = bounds.bound(few, [compiled(programs=2)], B200)
    assert (found["limited_by"], found["bound_us"]) == ("latency", 0.2)


def test_a_bound_never_grows_with_the_gpu():
    kernels = 2 * [compiled(programs=4)]
    faster = replace(H100, peak_gbps=2 * H100.peak_gbps)
    larger = replace(H100, cache=2 * H100.cache)
    for record in (counted(), counted(stored=1 << 30), counted(moved=2 * BULK, kernels=("k", "k"))):
        here = bounds.bound(record, kernels, H100)["bound_us"]
        assert all(bounds.bound(record, kernels, gpu)["bound_us"] <= here for gpu in (faster, larger, H200))


def test_records_join_what_was_counted_and_compiled():
    other = ABOUT | {"shape": [2, 2]}
    failed = {"status": "error", "message": "made up"}
    traffic = [counted(), {**other, **failed}]
    kernels = [compiled("sm_80"), compiled("sm_90"), compiled("sm_100", **failed), compiled("gfx942", resident_warps=0)]
    found = list(bounds.records(traffic, kernels))
    assert [record["gpu"] for record in found] == 2 * [gpu.name for gpu in bounds.GPUS]
    assert [record["status"] for record in found[:3]] == ["ok"] * 3
    messages = [record["message"] for record in found[3:]]
    assert messages[:2] == ["not compiled: error, made up", "cannot be launched"]
    assert messages[2:] == 5 * ["bytes not counted: error, made up"]
    assert [record["message"] for record in bounds.records([counted()], [])] == ["not compiled"] * 5
    slower = [record["bound_us"] for record in found[:3]]
    assert slower == sorted(slower, reverse=True)


def test_every_gpu_is_one_that_kernels_are_compiled_for():
    assert {gpu.target for gpu in bounds.GPUS} == set(TARGETS)
    assert all(gpu.cache >= TARGETS[gpu.target].cache for gpu in bounds.GPUS)
