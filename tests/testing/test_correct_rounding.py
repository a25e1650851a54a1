"""The repaired interpreter as users turn it on: in a fresh process, nested, in threads, and where it can't be."""

import functools
import itertools
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor

import triton_norm
from support import oracle, patience, processes
from support.at_once import at_once
from support.channel_norms import Call
from support.oracle import Results
from support.row_norms import LAYER_NORM, RMS_NORM
from triton_norm import launch
from triton_norm.tuning.limits import INTERPRETED

if not INTERPRETED:
    pytest.skip("the kernels run on a GPU", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import interpreter as stock

from triton_norm import testing
from triton_norm.testing import interpreter

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.unguarded


def in_a_process(script: str, *arguments: str, **environment: str) -> str:
    """Returns the output of a script in a process of its own, which has no TRITON_INTERPRET but by `environment`."""
    done = processes.run("-W", "error", "-c", script, *arguments, PYTHONPATH=str(ROOT), **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


USERS = """
import sys

import torch
import triton_norm
import triton_norm.testing

torch.manual_seed(0)
rows = 3 * torch.randn(9, 200) + 2
channels = 3 * torch.randn(4, 6, 5, 7) + 2
functions = {
    "layer_norm": lambda x, weight, bias: triton_norm.layer_norm(x, (200,), weight, bias),
    "rms_norm": lambda x, weight, bias: triton_norm.rms_norm(x, (200,), weight, 1e-5),
    "batch_norm": lambda x, weight, bias: triton_norm.batch_norm(x, None, None, weight, bias, training=True),
}

def inputs(name):
    x, length = (channels, 6) if name == "batch_norm" else (rows, 200)
    weight, bias = torch.randn(2, length)
    return [tensor.bfloat16() for tensor in (x, weight, bias, torch.randn(x.shape))]

def results(function, x, weight, bias, dy):
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy, allow_unused=True)]

every_input = {name: inputs(name) for name in functions}

def all_results():
    with triton_norm.backend("triton"):
        return {name: results(function, *every_input[name]) for name, function in functions.items()}

every_result = {"own": all_results()}
with triton_norm.testing.correct_rounding():
    every_result["repaired"] = all_results()
every_result["own again"] = all_results()
triton_norm.testing.install()
with triton_norm.testing.guarded():
    triton_norm.testing.install()
every_result["installed"] = all_results()
torch.save((every_input, every_result), sys.argv[1])
"""


@pytest.fixture(scope="module")
def users(tmp_path_factory) -> tuple[dict, dict]:
    """Inputs by function, and results by interpreter and function."""
    path = tmp_path_factory.mktemp("users") / "results.pt"
    in_a_process(USERS, str(path), TRITON_INTERPRET="1")
    return torch.load(path)


def check(name: str, results: list[Tensor], inputs: list[Tensor]) -> None:
    x, weight, bias, dy = inputs
    y, dx, dweight, dbias = results
    result = Results(y, None, dx, None, dweight, dbias)
    if name == "batch_norm":
        Call(x, None, weight, bias, dy).check(result)
    else:
        norm = {"layer_norm": LAYER_NORM, "rms_norm": RMS_NORM}[name]
        norm.check(result, x, weight, bias if norm.has_bias else None, dy)


@pytest.fixture
def half_an_ulp(monkeypatch) -> None:
    """Halves the ulp in the oracle's bounds, which rounding to the nearest stays within, and truncation does not."""
    whole = oracle.ulp
    monkeypatch.setattr(oracle, "ulp", lambda exact, dtype: whole(exact, dtype) / 2)


@pytest.mark.parametrize("how", ["repaired", "installed"])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "batch_norm"])
def test_results_in_bfloat16_are_rounded_correctly(name, how, users, half_an_ulp):
    inputs, results = users
    assert all(tensor.dtype == torch.bfloat16 for tensor in results[how][name] if tensor is not None)
    check(name, results[how][name], inputs[name])


@pytest.mark.parametrize("how", ["own", "own again"])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "batch_norm"])
def test_tritons_own_interpreter_does_not_round_correctly(name, how, users, half_an_ulp):
    inputs, results = users
    with pytest.raises(AssertionError, match="times the bound"):
        check(name, results[how][name], inputs[name])


@triton.jit
def cast_kernel(x_ptr, y_ptr, FAILS: tl.constexpr):
    tl.store(y_ptr, tl.load(x_ptr).to(tl.bfloat16))
    tl.static_assert(not FAILS, "fails")


def rounds(fails: bool = False) -> bool:
    """Returns True if 1 + 3/4 of an ulp becomes 1 + an ulp; truncated, it is 1."""
    x, y = torch.tensor([1 + 0.75 * 2**-7]), torch.zeros(1, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, FAILS=fails)
    assert y.item() in (1, 1 + 2**-7)
    return y.item() > 1


@pytest.fixture(autouse=True)
def everything_is_restored():
    """All that the contexts replace. Without `fast_launches` Triton itself leaves functions of its own replaced."""
    builder = stock.interpreter_builder
    owners = stock, stock.InterpreterBuilder, stock.GridExecutor, stock.ReduceOps, builder, tl, tl.core
    types = tl.core.block_type, tl.core.tensor, interpreter.TritonSemantic
    assert not rounds()
    before = [dict(vars(owner)) for owner in (*owners, *types)]
    mode = torch.get_deterministic_debug_mode()
    yield
    assert not rounds()
    assert [dict(vars(owner)) for owner in (*owners, *types)] == before
    assert torch.get_deterministic_debug_mode() == mode


def test_contexts_nest():
    with testing.correct_rounding():
        assert rounds()
        with testing.correct_rounding(), testing.guarded():
            assert rounds()
        assert rounds()


def test_a_context_that_does_not_begin_leaves_nothing():
    with pytest.raises(ValueError, match="resident"), testing.correct_rounding(), testing.interleaved(resident=0):
        pass


@triton.jit
def load_kernel(x_ptr, y_ptr, OFFSET: tl.constexpr):
    tl.store(y_ptr, tl.load(x_ptr + OFFSET))


def is_guarded() -> bool:
    x = torch.zeros(4)
    try:
        load_kernel[(1,)](x[:2], torch.zeros(1), OFFSET=2)
    except IndexError:
        return True
    return False


def observed() -> ExitStack:
    stack = ExitStack()
    stack.enter_context(interpreter.observe(interpreter.Observer(), poison_masked_loads=True))
    return stack


CONTEXTS = {
    "correct_rounding": testing.correct_rounding,
    "guarded": testing.guarded,
    "fast_launches": testing.fast_launches,
    "interleaved": testing.interleaved,
    "observe": observed,
    "int32_overflow": interpreter.int32_overflow_is_an_error,
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_an_exception_ends_the_context(name):
    context = CONTEXTS[name]
    with pytest.raises(KeyError), context(), context():
        raise KeyError
    with pytest.raises((AssertionError, stock.InterpreterError), match="fails"), context():
        rounds(fails=True)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("others", list(itertools.combinations(CONTEXTS, 2)), ids="-".join)
def test_contexts_may_be_left_in_any_order(others, order):
    """One of them guarded; with fewer in force, those that are left still do all they did."""
    makers = [testing.guarded, *(CONTEXTS[name] for name in others)]
    stacks = [ExitStack() for _ in makers]
    for stack, make in zip(stacks, makers, strict=True):
        stack.enter_context(make())
    left = list(makers)
    assert rounds()
    assert is_guarded()
    for place in order:
        stacks[place].close()
        left.remove(makers[place])
        assert rounds() == bool({testing.correct_rounding, testing.guarded}.intersection(left))
        assert is_guarded() == (testing.guarded in left)


def test_threads_enter_and_leave_as_they_like():
    x = torch.randn(5, 24, dtype=torch.bfloat16)
    with triton_norm.backend("triton"), testing.fast_launches():
        truncated = triton_norm.layer_norm(x, (24,))
        with testing.correct_rounding():
            rounded = triton_norm.layer_norm(x, (24,))
    assert not torch.equal(rounded, truncated)

    def often(times: int) -> None:
        for _ in range(times):
            with triton_norm.backend("triton"), testing.correct_rounding():
                assert torch.equal(triton_norm.layer_norm(x, (24,)), rounded)

    with testing.fast_launches():
        at_once([functools.partial(often, times) for times in (1, 2, 3, 4, 5, 6)])


BRIEFLY_S = 0.2  # enough to enter where nothing stops it; on a slower machine the test could only miss a fault


def test_nothing_changes_while_another_thread_interprets(monkeypatch):
    start, started, entered, left = launch.start, threading.Event(), threading.Event(), threading.Event()
    changed = []

    def slow(*arguments):
        started.set()
        changed.append(entered.wait(BRIEFLY_S))
        return start(*arguments)

    def call() -> Tensor:
        with triton_norm.backend("triton"):
            return triton_norm.layer_norm(torch.ones(2, 8), (8,))

    def change() -> None:
        assert started.wait(patience.LIMIT_S)
        with testing.correct_rounding():
            entered.set()
        left.set()

    monkeypatch.setattr(launch, "start", slow)
    with testing.fast_launches():
        at_once([call, change])
    assert changed == [False]
    assert entered.is_set()
    assert left.is_set()


REFUSED = """
import os, sys
from contextlib import ExitStack

exec(sys.argv[1])
import triton_norm.testing as testing

for enter in (testing.install, *(
    lambda make=make: ExitStack().enter_context(make())
    for make in (testing.correct_rounding, testing.guarded, testing.interleaved, testing.fast_launches)
)):
    try:
        enter()
    except RuntimeError as error:
        assert "TRITON_INTERPRET=1 must be in the environment before" in str(error), error
    else:
        raise AssertionError(enter)
"""


@pytest.mark.parametrize(
    "before",
    [
        "",
        "import triton; os.environ['TRITON_INTERPRET'] = '1'",
        "import triton_norm; os.environ['TRITON_INTERPRET'] = '1'",
        "os.environ['TRITON_INTERPRET'] = '1'; import triton; del os.environ['TRITON_INTERPRET']",
    ],
    ids=["not set", "set after triton", "set after triton_norm", "set for triton alone"],
)
def test_where_the_interpreter_is_off_there_is_an_error(before):
    in_a_process(REFUSED, before)


NOT_IMPORTED = """
import sys, warnings

sys.modules["numpy"] = None
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's, which misses NumPy
    import torch
before = set(sys.modules)
import triton_norm
with triton_norm.backend("torch"):
    triton_norm.LayerNorm(4)(torch.ones(2, 4))
new = set(sys.modules) - before
assert "triton_norm.functional" in new
foreign = [name for name in new if name.startswith(("numpy", "triton.", "triton_norm.testing"))]
assert not foreign, foreign
try:
    import triton_norm.testing
except ModuleNotFoundError as error:
    assert "triton_norm.testing needs NumPy" in str(error), error
else:
    raise AssertionError
"""


def test_numpy_and_the_interpreter_are_imported_by_testing_alone():
    in_a_process(NOT_IMPORTED, TRITON_INTERPRET="1")
