"""Calls from many threads on one module, and first calls, which compile and search, from many at once."""

import functools
import threading
import time

import pytest
import torch
from test_compiled import run_over_a_stub
from torch import Tensor, nn

import triton_norm
from support.at_once import at_once
from triton_norm import launch, plans
from triton_norm.tuning.limits import INTERPRETED

THREADS, TIMES = 8, 2


class Llama(nn.Module):
    """transformers' Llama of one layer, converted, from embeddings to the last hidden state."""

    def __init__(self) -> None:
        transformers = pytest.importorskip("transformers")
        super().__init__()
        config = transformers.LlamaConfig(
            vocab_size=8,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            use_cache=False,
            attn_implementation="eager",
        )
        self.model = transformers.LlamaModel(config)
        self.model.embed_tokens.requires_grad_(False)
        triton_norm.convert(self.model)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x).last_hidden_state


MODULES = {
    "LayerNorm": (functools.partial(triton_norm.LayerNorm, 24), (5, 24)),
    "RMSNorm": (functools.partial(triton_norm.RMSNorm, 24), (5, 24)),
    "BatchNorm2d": (functools.partial(triton_norm.BatchNorm2d, 3), (2, 3, 4, 4)),
    "Llama": (Llama, (2, 3, 16)),
}
NORMS = ["LayerNorm", "RMSNorm", "BatchNorm2d"]


def module_and_inputs(name: str, device: str) -> tuple[nn.Module, list[Tensor]]:
    """A module in evaluation, and an input for each thread, of another number of samples than its neighbours'."""
    make, shape = MODULES[name]
    module = make().to(device).eval()
    inputs = [torch.randn(shape[0] + place % 2, *shape[1:], device=device) for place in range(THREADS)]
    return module, inputs


def results(module: nn.Module, x: Tensor, backend: str = "auto") -> list[Tensor]:
    """y and all gradients, which are returned and not accumulated: the parameters are every thread's."""
    with triton_norm.backend(backend):
        leaves = [x.detach().requires_grad_(), *(p for p in module.parameters() if p.requires_grad)]
        y = module(leaves[0])
        return [y.detach(), *torch.autograd.grad(y, leaves, y.detach().cos())]


def assert_same(actual: list[Tensor], expected: list[Tensor], bits: bool = True) -> None:
    tolerance = {"rtol": 0, "atol": 0} if bits else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", MODULES)
def test_each_thread_gets_its_own_results(name, backend, guard, device):
    if (name, backend) == ("Llama", "triton"):
        backend = "auto"  # what it multiplies is torch's
    module, inputs = module_and_inputs(name, device)
    expected = [results(module, x, backend) for x in inputs]
    launches = None if guard is None else len(guard.launches)

    def again(x: Tensor) -> list[list[Tensor]]:
        return [results(module, x, backend) for _ in range(TIMES)]

    actual = at_once([functools.partial(again, x) for x in inputs])
    bits = device == "cpu" or name != "Llama"  # each thread has a cuBLAS of its own
    for of_thread, exact in zip(actual, expected, strict=True):
        for once in of_thread:
            assert_same(once, exact, bits)
    if guard is not None:
        assert (len(guard.launches) - launches) == TIMES * launches
        assert bool(launches) == (backend != "torch")


@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels need no turns")
def test_one_thread_at_a_time_is_interpreted(monkeypatch):
    start, inside, most = launch.start, [], []

    def slow(*arguments):
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.002)
        try:
            return start(*arguments)
        finally:
            inside.pop()

    monkeypatch.setattr(launch, "start", slow)
    module, inputs = module_and_inputs("LayerNorm", "cpu")
    at_once([functools.partial(results, module, x) for x in inputs])
    assert set(most) == {1}


@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels are started without the lock")
def test_a_call_that_raises_leaves_the_others_their_turn(monkeypatch):
    module, inputs = module_and_inputs("LayerNorm", "cpu")
    expected = results(module, inputs[0])
    start, failing = launch.start, set()

    def sometimes(*arguments):
        if threading.get_ident() in failing:
            raise MemoryError
        return start(*arguments)

    def fails() -> None:
        failing.add(threading.get_ident())
        with pytest.raises(MemoryError):
            module(inputs[0])

    monkeypatch.setattr(launch, "start", sometimes)
    actual = at_once([fails, *[functools.partial(results, module, inputs[0])] * 3])
    for once in actual[1:]:
        assert_same(once, expected)


class Forgetful(dict):
    """Forgets everything whenever something has been remembered, as another thread might."""

    def setdefault(self, key, value):
        saved = super().setdefault(key, value)
        self.clear()
        return saved


@pytest.mark.parametrize("name", NORMS)
def test_plans_forgotten_amid_a_call_are_made_again(name, monkeypatch, device):
    module, (x, *_) = module_and_inputs(name, device)
    expected = results(module, x)
    monkeypatch.setattr(plans, "_plans", Forgetful())
    for _ in range(2):
        assert_same(results(module, x), expected)


@pytest.mark.gpu
@pytest.mark.filterwarnings(
    "ignore:The AccumulateGrad node's stream does not match"
)  # the parameters are every stream's
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_stream_for_each_thread(name, backend):
    module, inputs = module_and_inputs(name, "cuda")
    expected = [results(module, x, backend) for x in inputs]
    torch.cuda.synchronize()

    def again(x: Tensor) -> list[list[Tensor]]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            actual = [results(module, x, backend) for _ in range(50)]
        stream.synchronize()
        return actual

    actual = at_once([functools.partial(again, x) for x in inputs])
    for of_thread, exact in zip(actual, expected, strict=True):
        for once in of_thread:
            assert_same(once, exact)


@pytest.mark.gpu
def test_training_in_a_stream_for_each_thread():
    """Programs that share a channel count themselves in zeros that are each stream's own."""
    inputs = [torch.randn(64, 16, 28, 28, device="cuda") for _ in range(3)]

    def steps(x: Tensor) -> list[Tensor]:
        module, stream = triton_norm.BatchNorm2d(16, device="cuda"), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            for _ in range(50):
                result = results(module, x)
        stream.synchronize()
        return [*result, *module.buffers()]

    expected = [steps(x) for x in inputs]
    for result, exact in zip(at_once([functools.partial(steps, x) for x in inputs]), expected, strict=True):
        assert_same(result, exact)


NOTED = """
import threading, time
from collections import Counter

from triton import knobs
from triton.backends.nvidia import driver as nvidia

from support.at_once import at_once
from triton_norm.kernels import channels, channels_backward
from triton_norm.tuning.memory import forget

THREADS = 8
JITTED = {
    jit.__name__: jit
    for jit in (*ROW_KERNELS, channels.channels_forward_kernel, channels_backward.channels_backward_kernel)
}
compilations, searches, noted = Counter(), Counter(), []
real = nvidia.CudaLauncher.__call__

def note_compilation(*, key, fn, **rest):
    compilations[fn.name, str(key)] += 1

def slow_search(kernel, space, *arguments):
    searches[kernel.__name__, space.key] += 1
    time.sleep(0.02)
    return space.configs[-1]

def note(launcher, *arguments):
    noted.append((threading.get_ident(), launcher, arguments[9:]))
    real(launcher, *arguments)

def name_of(launcher):
    (name,) = [
        name
        for name, jit in JITTED.items()
        for cache in jit.device_caches.values()
        for kernel in cache[0].values()
        if kernel.run is launcher
    ]
    return name

def check(thread, launcher, arguments, x):
    name = name_of(launcher)
    names = JITTED[name].arg_names
    assert len(arguments) == len(names), (name, len(arguments))
    given = dict(zip(names, arguments))
    if "x_ptr" in given:
        address = given["x_ptr"]
        assert (address if isinstance(address, int) else address.data_ptr()) == x.data_ptr(), name
    if "n_rows" in given:
        assert given["n_rows"] == len(x), name
    return name

def calls(modules, x, times):
    for _ in range(times):
        for module in modules:
            y = module(x)
            torch.autograd.grad(y, [x, *module.parameters()], x.detach())

def in_threads(n_channels, times, meanwhile=None):
    # In evaluation, since training moves statistics; inputs of one shape share their launchers.
    modules = [kind(n_channels).eval() for kind in (triton_norm.LayerNorm, triton_norm.BatchNorm1d)]
    inputs = [torch.randn(3 + place % 2, n_channels, requires_grad=True) for place in range(THREADS)]
    noted.clear()
    done = []

    def call(x):
        try:
            calls(modules, x, times)
        finally:
            done.append(x)
        return threading.get_ident(), x

    others = [] if meanwhile is None else [lambda: meanwhile(done)]
    results = at_once([*(lambda x=x: call(x) for x in inputs), *others])
    inputs = dict(results[:THREADS])
    each = Counter((thread, check(thread, *launch, inputs[thread])) for thread, *launch in noted)
    assert each == {(thread, name): times for thread in inputs for name in JITTED}, each
    for counted in (compilations, searches):
        assert counted, "nothing was"
        assert set(counted.values()) == {1}, [key for key, count in counted.items() if count > 1]

knobs.runtime.jit_post_compile_hook = note_compilation
mock.patch.object(launch, "search", slow_search).start()
mock.patch.object(nvidia.CudaLauncher, "__call__", note).start()
"""

MANY_FIRST_CALLS = """
def forget_often(done):
    while len(done) < THREADS:
        forget()
        time.sleep(1e-4)

in_threads(256, 40)
before = sum(compilations.values()), sum(searches.values())
in_threads(1000, 10, forget_often)
assert sum(compilations.values()) > before[0]
assert sum(searches.values()) > before[1]
"""


def test_first_calls_from_many_threads_compile_and_search_once(tmp_path):
    """Also while all that the calls remember is forgotten again and again."""
    pytest.importorskip("triton")
    run_over_a_stub(f"sys.path.append('tests')\n{NOTED}\n{MANY_FIRST_CALLS}", TRITON_CACHE_DIR=str(tmp_path))
