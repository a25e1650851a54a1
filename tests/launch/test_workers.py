"""Processes that begin after this one has made calls: forked, also amid a call, spawned, and those of a DataLoader."""

import contextlib
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import triton_norm
from support import processes
from support.patience import LIMIT_S
from triton_norm import launch
from triton_norm.tuning.limits import INTERPRETED

pytestmark = [
    pytest.mark.unguarded,  # as a process that is spawned
    # Python 3.12 warns of every fork of a process with several threads, which torch's may be too.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes:UserWarning"),  # on one core
]
interpreted = pytest.mark.skipif(not INTERPRETED, reason="a process that has used a GPU can't be forked")
NORMS = (triton_norm.LayerNorm, (5, 24)), (triton_norm.RMSNorm, (3, 24)), (triton_norm.BatchNorm1d, (6, 24))


def forward_and_backward() -> list[np.ndarray]:
    """Returns the results of a module of each kind, on inputs that are the same in every process."""
    result = []
    for norm, shape in NORMS:
        module = norm(24)
        x = torch.sin(torch.arange(float(np.prod(shape)))).view(shape).requires_grad_()
        with triton_norm.backend("triton"):
            y = module(x)
        gradients = torch.autograd.grad(y, [x, *module.parameters()], y.detach().cos())
        result += [tensor.numpy() for tensor in (y.detach(), *gradients, *module.buffers())]
    return result


def send(sender: Connection) -> None:
    sender.send(forward_and_backward())


def in_a_child(method: str) -> list[np.ndarray]:
    """Returns the results of a process that begins now."""
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    with processes.ending_children(), receiver, sender:
        context.Process(target=send, args=(sender,)).start()
        sender.close()  # of which the process has its own: with that the pipe ends
        assert receiver.poll(LIMIT_S)
        return receiver.recv()


def assert_same(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)


Act = Callable[[threading.Event, threading.Event], None]
"""Sets the first event once it has begun, and ends once the second is set."""


@contextlib.contextmanager
def meanwhile(act: Act) -> Iterator[None]:
    """Another thread acts."""
    begun, end = threading.Event(), threading.Event()
    thread = threading.Thread(target=act, args=(begun, end), daemon=True)
    thread.start()
    assert begun.wait(LIMIT_S)
    try:
        yield
    finally:
        end.set()
        thread.join(LIMIT_S)
    assert not thread.is_alive()


def hold_the_lock(begun: threading.Event, end: threading.Event) -> None:
    with launch._starting:
        begun.set()
        end.wait(LIMIT_S)


def make_calls(begun: threading.Event, end: threading.Event) -> None:
    while not end.is_set():
        forward_and_backward()
        begun.set()


@interpreted
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_child_of_a_process_that_has_made_calls(method):
    expected = forward_and_backward()
    assert_same(in_a_child(method), expected)
    assert_same(forward_and_backward(), expected)


@interpreted
def test_a_fork_while_another_thread_holds_the_lock():
    """A lock is held that no thread of the child could ever give back."""
    expected = forward_and_backward()
    with meanwhile(hold_the_lock):
        assert_same(in_a_child("fork"), expected)
    assert_same(forward_and_backward(), expected)


@interpreted
def test_forks_amid_another_threads_calls():
    expected = forward_and_backward()
    with meanwhile(make_calls):
        for _ in range(3):
            assert_same(in_a_child("fork"), expected)


class Normalized(Dataset):
    def __init__(self) -> None:
        self.norm = triton_norm.LayerNorm(24).requires_grad_(False)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, place: int) -> torch.Tensor:
        return self.norm(torch.sin(torch.arange(24.0) * (place + 1)))


@pytest.mark.parametrize("resident", [False, True], ids=["free lock", "held lock"])
def test_a_dataset_that_normalizes_in_workers(resident):
    dataset = Normalized()
    expected = torch.stack([dataset[place] for place in range(len(dataset))])
    loader = DataLoader(dataset, batch_size=2, num_workers=2, timeout=LIMIT_S, multiprocessing_context="fork")
    with processes.ending_children(), meanwhile(hold_the_lock) if resident else contextlib.nullcontext():
        batches = iter(loader)
        try:
            actual = torch.cat(list(batches))
        finally:
            batches._shutdown_workers()  # or torch raises, in whatever runs, when they are ended
    assert torch.equal(actual, expected)
