"""Programs that share a channel, in one launch and in two: they wait for each other with x in registers."""

import functools

import pytest
import torch

import triton_norm
from support.channel_norms import KINDS, drawn, running_statistics, same_bits, share
from support.turns import backwards, one_of_each, shuffled
from triton_norm.channels import plan
from triton_norm.tuning.limits import INTERPRETED

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("through_the_kernels"),
    pytest.mark.skipif(not INTERPRETED, reason="a GPU starts its programs in its own order"),
]

if INTERPRETED:
    from support.turns import place_by_program_id
    from triton_norm.kernels import channels, channels_backward
    from triton_norm.testing.interleave import DeadlockError, interleaved

FORWARD, BACKWARD = "channels_forward_kernel", "channels_backward_kernel"
HALF = torch.bfloat16


RESIDENT = {  # kind: shape, tile
    "flat": ((3, 2, 8, 20), 256),  # the last of four programs has fewer elements
    "last": ((4, 24, 3, 5), 256),  # blocks of 16 channels, the last half empty
    "folded": ((29, 12, 7, 7), 4096),  # blocks of eight channels, the last half empty
}
"""Two blocks of four programs with a tile each: everything is held."""


CASES = [
    *((kind, *case) for kind, case in RESIDENT.items()),
    ("flat", (5, 2, 16, 33), 256),  # three tiles a program, the last not full
    ("flat", (2, 3, 23, 9), 64),  # odd positions: one element an access, two tiles
    ("flat", (3, 4, 3), 256),  # nine elements a channel: the last program has but one of them
    ("last", (3, 40, 7, 7), 256),  # three blocks, three tiles a program
    ("last", (8, 3, 10, 9), 128),  # three channels: a lane in four idle
    ("last", (77, 1), 16),  # features, one channel: a lane a row
    ("folded", (29, 12, 7, 7), 1024),  # four tiles a program, one row too many in the last program's last
    ("folded", (30, 28, 3, 3), 1024),  # blocks of 24 channels, the last of four
    ("folded", (30, 30, 5), 512),  # an odd number of positions, of samples but for the last in eights
]


@pytest.fixture
def use(numbers):
    """Sets the tile of four programs that share a channel, and other numbers."""
    return functools.partial(share, numbers, multiprocessors=12)


@pytest.fixture
def saved(monkeypatch):
    """The zeros that a stream keeps: so many as a launch asks for, and the same ones each time."""
    saved = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(plan, "zeros", lambda n, device: saved[:n])
    return saved


def shared(launched) -> bool:
    return {"sync_ptr", "partials_ptr"} <= launched.arguments.keys()


@pytest.mark.parametrize("one_launch", [True, False])
@pytest.mark.parametrize(("kind", "shape", "tile"), CASES)
def test_matches_fp64(kind, shape, tile, one_launch, use, guard, device):
    use(tile, one_launch)
    with interleaved():
        drawn(shape, kind, device).against_oracle()
    assert guard.kernels == ([FORWARD, BACKWARD] if one_launch else [FORWARD, FORWARD, BACKWARD, BACKWARD])
    assert not one_launch or all(map(shared, guard.launches))


def stepped(call, running, device):
    """All that a training step changes."""
    running = [tensor.clone() for tensor in running]
    counter = torch.tensor(7, device=device)
    leaves = [tensor.detach().requires_grad_() for tensor in (call.x, call.weight, call.bias)]
    y = triton_norm.batch_norm(
        leaves[0], *running, *leaves[1:], training=True, momentum=None, num_batches_tracked=counter
    )
    return [y.detach(), *torch.autograd.grad(y, leaves, call.dy), *running, counter]


ADVERSE = [
    {"delayed": 0},
    {"order": backwards, "resident": 4},
    {"order": shuffled, "resident": 5, "delayed": 0},
    {"order": one_of_each, "resident": 4, "delayed": 3},
]
"""No fewer programs at once than share a channel: with fewer, any order hangs."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_do_not_depend_on_the_programs_order(kind, use, device):
    shape, tile = RESIDENT[kind]
    use(tile // 2)
    call = drawn(shape, kind, device)
    running = running_statistics(shape[1], device)
    with interleaved():
        expected = stepped(call, running, device)
    for how in ADVERSE:
        with interleaved(**how):
            assert all(map(torch.equal, stepped(call, running, device), expected)), how


@pytest.mark.parametrize("half", ["forward", "backward"])
def test_places_by_program_id_hang_where_tickets_do_not(half, use, monkeypatch, device):
    """The programs held at once are as many as share a channel, and of different teams."""
    use(256)
    call = drawn((3, 5, 8, 20), "flat", device)  # five teams, and four programs at once
    adverse = functools.partial(interleaved, resident=4, order=one_of_each)
    with adverse():
        call.against_oracle()
    monkeypatch.setattr(channels if half == "forward" else channels_backward, "take_place", place_by_program_id)
    with adverse(), pytest.raises(DeadlockError, match=f"channels_{half}_kernel"):
        call.run()


@pytest.mark.parametrize("one_launch", [True, False])
def test_the_next_launch_finds_the_zeros_as_the_last_one_did(one_launch, use, saved, device):
    """Launches of more blocks and of fewer, with a counter of batches and without, one of them not shared."""
    use(256, one_launch)
    counter = torch.tensor(0, device=device)
    for shape, kind in (((3, 5, 4, 8), "flat"), ((1, 3, 2, 4), "flat"), ((4, 40, 3, 3), "last"), ((3, 2, 60), "flat")):
        call = drawn(shape, kind, device)
        running = running_statistics(shape[1], device)
        with interleaved(order=shuffled):
            triton_norm.batch_norm(call.x, *running, training=True, num_batches_tracked=counter)
            assert not saved.any()
            x = call.x.requires_grad_()
            y = triton_norm.batch_norm(x, None, None, training=True)
            assert not saved.any()
            y.backward(call.dy)
            assert not saved.any()
            triton_norm.batch_norm(x, *running, weight := call.weight.requires_grad_()).backward(call.dy)
            assert not saved.any()
            assert weight.grad.isfinite().all()
    assert counter.item() == 4


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_one_launch_each_way_and_waits_for_nothing(kind, use, guard, device):
    """Not interleaved: a program that waited would hang."""
    shape, tile = RESIDENT[kind]
    use(tile)
    drawn(shape, kind, device, training=False).against_oracle()
    assert guard.kernels == [FORWARD, BACKWARD]
    assert not shared(guard.launches[0])
    assert shared(guard.launches[1])


WHOLE = {  # every program's elements are 1024, or 4096
    "flat": ((4, 3, 16, 64), 1024),
    "last": ((4, 48, 4, 16), 1024),
    "folded": ((32, 16, 7, 7), 4096),
}


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_resident_elements_are_read_once_and_others_twice(kind, pieces, use, guard, device):
    shape, tile = WHOLE[kind]
    use(tile // pieces)
    call = drawn(shape, kind, device, HALF)
    size = call.x.numel() * call.x.itemsize
    read = size * (2 * pieces - 1) // pieces
    with interleaved():
        result = call.run()
    forward, backward = guard.launches
    assert forward.bytes("load", "x_ptr") == read
    assert forward.bytes("store", "y_ptr") == size
    assert backward.bytes("load", "x_ptr") == backward.bytes("load", "dy_ptr") == read
    assert backward.bytes("store", "dx_ptr") == size
    assert guard.stored(call.x) == guard.stored(call.dy) == 0
    call.check(result)


@pytest.mark.parametrize("kind", ["flat", "folded"])  # channels-last, two launches sum in places
def test_two_launches_give_the_same_bits_from_the_same_tiles(kind, use, guard, device):
    shape, tile = RESIDENT[kind]
    call = drawn(shape, kind, device)
    use(tile)
    with interleaved():
        one = call.run()
    use(tile, one_launch=False, multiprocessors=8)  # eight programs for two blocks
    assert same_bits(one, call.run())
    partials = {launched.arguments["partials_ptr"].text for launched in guard.launches if shared(launched)}
    assert len(partials) == 2  # as many splits in both forms: forward's and backward's


@pytest.mark.parametrize("cache", [0, 256])
def test_two_launches_where_the_cache_is_too_small(cache, use, guard, device):
    use(256, l2_bytes=cache)
    with interleaved():
        drawn((5, 2, 16, 33), "flat", device).against_oracle()
    assert guard.kernels == [FORWARD, FORWARD, BACKWARD, BACKWARD]
