"""A model over several devices: kernels start on their tensors' device, whichever is current, and in its stream."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from test_compiled import run_over_a_stub
from torch import nn

import triton_norm
from support.at_once import at_once
from support.gpus import H100, changed
from triton_norm import launch
from triton_norm.tuning.choices import begun_anew
from triton_norm.tuning.configs import Space, config
from triton_norm.tuning.limits import assumed

pytest.importorskip("triton")

STREAMS = {0: 100, 1: 101}
"""Each device's current stream."""
CONFIGS = config(4, BLOCK=16), config(8, BLOCK=16)


class Devices:
    """Two of them, one of which is current, and each start's device, stream and kind."""

    def __init__(self) -> None:
        self.current, self.switches, self.starts = 0, 0, []

    @contextlib.contextmanager
    def device(self, index: int):
        before, self.current = self.current, index
        self.switches += 1
        try:
            yield
        finally:
            self.current = before

    def note(self, kind: str, stream: int) -> None:
        self.starts.append((self.current, stream, kind))

    def start(self, *arguments):
        """Stands for Triton's launcher, which asks for the device and its stream itself."""
        self.note("first", STREAMS[self.current])
        return SimpleNamespace(run=self.run, function=None, packed_metadata=None)

    def run(self, *arguments) -> None:
        self.note("again", arguments[3])


@pytest.fixture
def devices(monkeypatch):
    devices = Devices()
    monkeypatch.setattr(torch.cuda, "device", devices.device)
    for owner, name in ((torch.cuda, "current_device"), (launch, "current_device")):
        monkeypatch.setattr(owner, name, lambda: devices.current)
    monkeypatch.setattr(launch, "current_stream", STREAMS.get)
    monkeypatch.setattr(launch, "start", devices.start)
    monkeypatch.setattr(launch, "search", lambda kernel, space, *arguments: space.configs[0])
    with assumed(changed(H100, name="two of them")), begun_anew(folder=None):
        yield devices


def launcher_on(index: int) -> launch.Launcher:
    kernel = SimpleNamespace(arg_names=["x_ptr", "n", "scalar", "BLOCK"], pre_run_hooks=[])
    space = Space("kernel", "", CONFIGS)
    return launch.Launcher(kernel, space, torch.device("cuda", index), lambda config, n: n, (1.0,))


def launched(launcher: launch.Launcher, x: torch.Tensor) -> None:
    launch.Launch(launcher, 3)(x)


ASIDE = pytest.mark.parametrize(("own", "current"), [(1, 0), (0, 1)])


@ASIDE
def test_a_first_call_makes_its_device_current(own, current, devices):
    devices.current = current
    launched(launcher_on(own), torch.zeros(4))
    assert devices.starts == [(own, STREAMS[own], "first")]
    assert (devices.current, devices.switches) == (current, 1)


@ASIDE
def test_a_compiled_kernel_is_started_directly_on_its_own_device_only(own, current, devices):
    launcher, x = launcher_on(own), torch.zeros(4)
    devices.current = own
    launched(launcher, x)
    launched(launcher, x)
    devices.current = current
    launched(launcher, x)
    launched(launcher, x)
    assert devices.current == current
    devices.current = own
    launched(launcher, x)
    assert devices.starts == [(own, STREAMS[own], kind) for kind in ("first", *["again"] * 4)]
    assert devices.switches == 2


@ASIDE
def test_a_kernel_compiled_from_elsewhere_is_started_directly_at_home(own, current, devices):
    launcher, x = launcher_on(own), torch.zeros(4)
    devices.current = current
    launched(launcher, x)
    devices.current = own
    launched(launcher, x)
    assert devices.starts == [(own, STREAMS[own], kind) for kind in ("first", "again")]


def test_a_launch_that_raises_restores_the_device(devices, monkeypatch):
    launcher, x = launcher_on(1), torch.zeros(4)

    def out_of_memory(*arguments):
        assert devices.current == 1
        raise MemoryError

    with monkeypatch.context() as failing:
        failing.setattr(launch, "start", out_of_memory)
        for _ in range(2):
            with pytest.raises(MemoryError):
                launched(launcher, x)
            assert devices.current == 0
    at_once([lambda: launched(launcher, x)])  # the lock is free
    assert devices.starts == [(1, STREAMS[1], "first")]


def test_a_search_times_on_the_tensors_device(devices, monkeypatch):
    seen = []

    def search(kernel, space, *arguments):
        seen.append(devices.current)
        if len(seen) == 1:
            raise MemoryError
        return CONFIGS[1]

    monkeypatch.setattr(launch, "search", search)
    launcher, x = launcher_on(1), torch.zeros(4)
    with pytest.raises(MemoryError):
        launched(launcher, x)
    assert devices.current == 0
    launched(launcher, x)
    assert launcher.config == CONFIGS[1]
    assert (devices.current, seen) == (0, [1, 1])
    launched(launcher_on(0), x)
    assert seen == [1, 1]  # one GPU is as fast as another of its name


def test_each_device_has_its_own_zeros(devices, monkeypatch):
    """Both default streams have the same number."""
    zeros = torch.zeros
    monkeypatch.setattr(launch, "_zeros", {})
    monkeypatch.setattr(launch, "current_stream", lambda index: 0)
    monkeypatch.setattr(torch, "zeros", lambda n, dtype, device: zeros(n, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    first, second = (launch.zeros(5, torch.device("cuda", index)) for index in (0, 1))
    assert first.data_ptr() != second.data_ptr()
    assert launch.zeros(9, torch.device("cuda", 0)).data_ptr() == first.data_ptr()


ON_THE_SECOND = """
import contextlib
import functools
from triton.backends.nvidia import driver as nvidia
from triton_norm.kernels import channels, channels_backward
from triton_norm.channels import launches
from triton_norm.rows import backward, plan

current, switched, started = [0], [], []
real = nvidia.CudaLauncher.__call__

@contextlib.contextmanager
def device(index):
    switched.append(index)
    before, current[0] = current[0], index
    yield
    current[0] = before

def on_the_second(kernel, space, device, *rest, **constants):
    return launch.Launcher(kernel, space, torch.device("cuda", 1), *rest, **constants)

def note(launcher, *arguments):
    started.append((current[0], arguments[3]))
    real(launcher, *arguments)

driver = triton.runtime.driver.active
driver.get_current_device = lambda: current[0]
driver.get_current_stream = lambda device: 100 + device
for owner, name, stand_in in (
    (torch.cuda, "device", device),
    (torch.cuda, "current_device", lambda: current[0]),
    (launch, "current_device", lambda: current[0]),
    (launch, "current_stream", lambda device: 100 + device),
    (plan, "Launcher", on_the_second),
    (backward, "Launcher", on_the_second),
    (launches, "Launcher", on_the_second),
    (nvidia.CudaLauncher, "__call__", note),
):
    mock.patch.object(owner, name, stand_in).start()

x = torch.randn(16, 64, requires_grad=True)
mean, var = torch.zeros(64), torch.ones(64)
norms = (
    lambda: triton_norm.layer_norm(x, (64,), x[0], x[1]),
    lambda: triton_norm.batch_norm(x, mean, var, x[0], x[1], True),
)

def launches_and_switches(norm, at):
    current[0] = at
    started.clear(), switched.clear()
    torch.autograd.grad(norm(), x, x.detach())
    assert current[0] == at
    assert started and set(started) == {(1, 101)}, started
    return len(started), len(switched)

for norm in norms:
    for _ in range(2):
        launches, switches = launches_and_switches(norm, at=0)
        assert switches == launches
    assert launches_and_switches(norm, at=1) == (launches, 0)
for jit in (*ROW_KERNELS, channels.channels_forward_kernel, channels_backward.channels_backward_kernel):
    assert set(jit.device_caches) == {1}, jit.__name__
"""


def test_whole_calls_on_a_device_that_is_not_current():
    """Forward and backward, through Triton's own launches."""
    run_over_a_stub(ON_THE_SECOND)


def two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")


@pytest.mark.gpu
@pytest.mark.parametrize("current", [0, 1])
def test_modules_on_two_gpus(current):
    """Either device gives the same bits, whichever is current."""
    two_gpus()
    result = []
    for index in (0, 1):
        torch.manual_seed(0)
        model = nn.Sequential(triton_norm.BatchNorm1d(96), triton_norm.LayerNorm(96), triton_norm.RMSNorm(96))
        x = torch.randn(512, 96).to(index).requires_grad_()
        model.to(index)
        with torch.cuda.device(current):
            for _ in range(3):
                y = model(x)
                gradients = torch.autograd.grad(y, [x, *model.parameters()], y.detach().cos())
            assert torch.cuda.current_device() == current
        result.append([tensor.cpu() for tensor in (y.detach(), *gradients, *model.buffers())])
    torch.testing.assert_close(*result, rtol=0, atol=0)


@pytest.mark.gpu
def test_a_model_with_a_half_on_each_gpu():
    two_gpus()

    class Halves(nn.Module):
        def __init__(self, norms) -> None:
            super().__init__()
            self.first = nn.Sequential(norms.LayerNorm(96), norms.BatchNorm1d(96)).to(0)
            self.second = nn.Sequential(norms.RMSNorm(96), norms.BatchNorm1d(96)).to(1)

        def forward(self, x):
            return self.second(self.first(x.to(0)).to(1))

    ours, theirs = Halves(triton_norm), Halves(nn)
    for step in range(3):
        x = torch.randn(256, 96) + step
        actual, expected = ours(x), theirs(x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        for model, y in ((ours, actual), (theirs, expected)):
            model.zero_grad()
            y.cos().sum().backward()
        for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-5)
