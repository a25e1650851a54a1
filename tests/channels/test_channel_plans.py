"""Plans of how BatchNorm's programs share channels, on GPUs of any size, for work of any size."""

import itertools

import pytest

from support import gpus
from triton_norm.tuning.channel_spaces import Plan, SharedChannels, plan_channels, plan_channels_apart
from triton_norm.tuning.limits import Gpu

LANES = {"flat": (1, 4, 8), "last": (1, 8, 32), "folded": (512, 2048)}
H100 = gpus.changed(gpus.H100, one_launch_bytes=2**62)  # however much there is to read


def work_of(kind: str, n_groups: int, lanes: int, n_blocks: int, resident_bytes: int, crowded: bool = False):
    """Returns the work of programs with registers for half as large a tile, if `crowded`."""
    vector = 1 if crowded and kind != "flat" else 4
    return SharedChannels(kind, lanes, vector, n_groups, 1, n_blocks, resident_bytes, adds=crowded and kind == "flat")


def check_plan(plan: Plan, work: SharedChannels, gpu: Gpu) -> None:
    n_splits = -(-work.n_groups // plan.groups_per_split)
    assert n_splits <= max(1, gpu.multiprocessors // gpu.limits.sms_per_peer)
    assert plan.tile & (plan.tile - 1) == 0
    assert plan.tile % work.lanes == 0
    elements = plan.groups_per_split * work.lanes
    again = max(0, elements - plan.tile) * work.resident_bytes
    at_once = min(work.n_blocks * n_splits, gpu.limits.holding_programs_per_sm * gpu.multiprocessors)
    assert again * at_once * gpu.limits.cache_bytes_per_reread_byte <= gpu.l2_bytes
    assert not again or elements % plan.tile == 0  # no half-empty tile but a channel's last


@pytest.mark.parametrize("multiprocessors", [1, 5, 6, 46, 132, 304])
@pytest.mark.parametrize("kind", LANES)
def test_plans(kind, multiprocessors):
    """A channel's programs have all of it, are few enough to wait, and read again no more than the cache keeps."""
    n_plans = 0
    for n_groups, lanes, n_blocks, resident, crowded in itertools.product(
        (1, 7, 8, 9, 1000, 12544, 200_705, 2**31), LANES[kind], (1, 3, 64, 2048), (2, 4, 8, 16), (False, True)
    ):
        work = work_of(kind, n_groups, lanes, n_blocks, resident, crowded)
        apart = plan_channels_apart(work, gpus.changed(H100, multiprocessors=multiprocessors))
        assert apart.tile == 0
        assert apart.groups_per_split > 0
        assert apart.groups_per_split % 8 == 0  # bits of no two programs share a byte
        plan = None
        for cache in (2**22, 50 * 2**20):
            gpu = gpus.changed(H100, multiprocessors=multiprocessors, l2_bytes=cache)
            smaller, plan = plan, plan_channels(work, gpu)
            assert smaller is None or smaller == plan
            if plan is not None:
                n_plans += 1
                assert plan.groups_per_split % 8 == 0
                check_plan(plan, work, gpu)
    assert n_plans > 20


@pytest.mark.parametrize("kind", LANES)
def test_one_launch_is_for_what_is_small(kind):
    lanes = LANES[kind][-1]
    gpu = gpus.changed(H100, one_launch_bytes=1000 * lanes * 64 * 2)
    assert plan_channels(work_of(kind, 1000, lanes, 64, 2), gpu)
    assert plan_channels(work_of(kind, 1001, lanes, 64, 2), gpu) is None


def test_no_one_launch_where_it_would_read_memory_twice_or_leave_the_gpu_idle():
    def flat(n_groups: int, n_blocks: int, gpu: Gpu) -> Plan | None:
        return plan_channels(work_of("flat", n_groups, 8, n_blocks, 2), gpu)

    assert flat(12544 * 4, 64, H100)  # [32, 64, 112, 112] in bf16
    assert not flat(2**27, 1, H100)  # one channel of 2 GiB
    assert not flat(2**27, 1, gpus.changed(H100, l2_bytes=2**40))  # by 32 programs at most
    assert not flat(2**17, 64, gpus.changed(H100, l2_bytes=2**10))
