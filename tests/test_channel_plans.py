"""How BatchNorm's programs share channels: on GPUs of any size, for work of any size."""

import functools
import itertools

import pytest

from triton_norm import tuning

LANES = {"flat": (1, 4, 8), "last": (1, 8, 32), "folded": (512, 2048)}
H100 = {"multiprocessors": 132, "cache": 50 * 2**20}


@pytest.fixture(autouse=True)
def however_large(monkeypatch):
    monkeypatch.setattr(tuning, "ONE_LAUNCH_BYTES", 2**62)
    tuning.forget()
    yield
    monkeypatch.undo()
    tuning.forget()


def planned(**arguments) -> tuning.Plan | None:
    return tuning.plan_channels(**{"crowded": False, "beside": 0, "interpreted": False} | arguments)


def check_plan(plan, n_groups, lanes, n_blocks, held, multiprocessors, cache):
    n_splits = -(-n_groups // plan.groups_per_split)
    assert n_splits <= max(1, multiprocessors // tuning.PEERS_SHARE)
    assert plan.tile & (plan.tile - 1) == 0
    assert plan.tile % lanes == 0
    again = max(0, plan.groups_per_split * lanes - plan.tile) * held
    at_once = min(n_blocks * n_splits, tuning.HOLDING_PROGRAMS_PER_SM * multiprocessors)
    assert again * at_once * tuning.CACHED_SHARE <= cache
    assert not again or plan.groups_per_split * lanes % plan.tile == 0  # no half-empty tile but a channel's last


@pytest.mark.parametrize("multiprocessors", [1, 5, 6, 46, 132, 304])
@pytest.mark.parametrize("kind", LANES)
def test_plans(kind, multiprocessors, monkeypatch):
    """A channel's programs have all of it, are few enough to wait, and read again no more than the cache keeps."""
    n_plans = 0
    for n_groups, lanes, n_blocks, held, crowded in itertools.product(
        (1, 7, 8, 9, 1000, 12544, 200_705, 2**31), LANES[kind], (1, 3, 64, 2048), (2, 4, 8, 16), (False, True)
    ):
        where = {"n_groups": n_groups, "lanes": lanes, "n_blocks": n_blocks, "multiprocessors": multiprocessors}
        apart = tuning.plan_channels_apart(per_group=1, **where)
        assert apart.tile == 0
        assert apart.groups_per_split > 0
        assert apart.groups_per_split % 8 == 0  # bits of no two programs share a byte
        plan = None
        for cache in (2**22, 50 * 2**20):
            smaller, plan = plan, planned(kind=kind, held=held, crowded=crowded, cache=cache, **where)
            assert smaller is None or smaller == plan
            if plan is not None:
                n_plans += 1
                assert plan.groups_per_split % 8 == 0
                check_plan(plan, held=held, cache=cache, **where)
    assert n_plans > 20


@pytest.mark.parametrize("kind", LANES)
def test_one_launch_is_for_what_is_small(kind, monkeypatch):
    small = functools.partial(planned, kind=kind, n_groups=1000, lanes=LANES[kind][-1], n_blocks=64, held=2, **H100)
    monkeypatch.setattr(tuning, "ONE_LAUNCH_BYTES", 1000 * LANES[kind][-1] * 64 * 2)
    tuning.forget()
    assert small()
    assert small(n_groups=1001) is None


def test_no_one_launch_where_it_would_read_memory_twice_or_leave_the_gpu_idle():
    flat = functools.partial(planned, kind="flat", lanes=8, held=2)
    assert flat(n_groups=12544 * 4, n_blocks=64, **H100)  # [32, 64, 112, 112] in bf16
    assert not flat(n_groups=2**27, n_blocks=1, **H100)  # one channel of 2 GiB
    assert not flat(n_groups=2**27, n_blocks=1, **H100 | {"cache": 2**40})  # by 32 programs at most
    assert not flat(n_groups=2**17, n_blocks=64, **H100 | {"cache": 2**10})
