"""Forwards in which additions and the norms of their sums are joined: which ones, and all else unchanged."""

import functools
import gc
import inspect
import linecache
import traceback
import weakref

import pytest
import torch
from torch import Tensor, nn

from triton_norm.converting import additions
from triton_norm.converting.additions import rewritten


class Parts:
    """Stands for a module: its parts note when they are called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float]] = []

    def __getattr__(self, name):
        def part(x):
            self.calls.append((name, float(x.sum())))
            return x * (2 + len(name))

        return part

    def _add_and_normalize(self, norm, augend, addend):
        self.calls.append(("+", 0.0))
        total = augend + addend
        return norm(total), total


def calls_of(forward, x: Tensor) -> tuple[Tensor, list, int]:
    """Returns the result, the parts that were called, and the number of joined additions."""
    module = Parts()
    y = forward(module, x)
    parts = [call for call in module.calls if call[0] != "+"]
    return y, parts, len(module.calls) - len(parts)


class Joined:
    """Each method has as many joined additions as its name ends with."""

    def before_a_block_1(self, x):
        residual = x
        x = self.mix(self.norm1(x))
        x = residual + x
        residual = x
        x = self.norm2(x)
        return residual + self.mlp(x)

    def the_sum_is_an_operand_1(self, x):
        x = x + self.mix(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x

    def behind_each_block_2(self, x):
        x = x + self.mix(x)
        x = self.ln_1(x)
        x = self.mlp(x) * 0.5 + x
        return self.LayerNorm(x)

    def within_an_expression_2(self, x):
        y = self.norm1(self.mix(x) + x)
        return x, self.norm2(y + x) * 2

    def a_chain_3(self, x):
        x = x + self.a(x)
        x = x + self.b(self.norm1(x))
        x = x + self.c(self.norm2(x))
        return self.d(self.norm3(x))

    def in_branches_and_loops_3(self, x):
        for _ in range(2):
            x = x + self.mix(x)
            x = self.norm1(x)
        if x.sum() > 0:
            y = x + 1.0
            x = self.norm2(y)
        else:
            y = x - 1.0
            z = y + x
            x = self.norm3(z)
        return x + y

    def a_name_is_taken_1(self, normalized_0):
        total = normalized_0 + self.mix(normalized_0)
        y = self.norm(total)
        return normalized_0 + y


class Separate:
    """No method has a joined addition."""

    def something_stands_between(self, x):
        total = x + self.mix(x)
        self.look(total)
        return self.norm(total)

    def the_sum_changes(self, x):
        total = x + self.mix(x)
        total *= 2
        return self.norm(total)

    def something_is_computed_first(self, x):
        total = x + self.mix(x)
        return self.mlp(x) + self.norm(total)

    def another_tensor(self, x):
        total = x + self.mix(x)
        y = self.norm(x)
        return total + y

    def another_tensor_behind_a_copy(self, x):
        total = x + self.mix(x)
        residual = total
        y = self.norm(x)
        return residual + y

    def a_name_of_another(self, x):
        total = x + self.mix(x)
        total = x
        return self.norm(total)

    def maybe(self, x):
        total = x + self.mix(x)
        y = self.norm(total) if x.sum() > 100 else total
        return y and total if y is None else y

    def no_norm(self, x):
        total = x + self.mix(x)
        return self.mlp(total)

    def adds_to_what_was(self, x):
        y = x.clone()
        x = x + self.mix(x)
        y += self.norm(x)
        return y

    def a_difference(self, x):
        total = x - self.mix(x)
        return self.norm(total)

    def later(self, x):
        total = x + self.mix(x)
        return (lambda: self.norm(total))() + (lambda y: self.norm(x + y))(x)


def methods(cls):
    return pytest.mark.parametrize("method", [each for name, each in vars(cls).items() if name[0] != "_"])


@methods(Joined)
def test_joined_additions_compute_and_call_the_same(method):
    result = rewritten(method)
    x = torch.arange(1.0, 4.0)
    expected, calls, none = calls_of(method, x)
    actual, made, n_joined = calls_of(result.forward, x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert (made, none) == (calls, 0)
    assert len(result.norms) == int(method.__name__[-1])
    assert n_joined >= 1
    assert inspect.signature(result.forward) == inspect.signature(method)


@methods(Separate)
def test_what_is_left(method):
    result = rewritten(method)
    assert result.norms == ()
    x = torch.arange(1.0, 4.0)
    assert calls_of(result.forward, x)[1:] == (calls_of(method, x)[1], 0)


def test_the_norms_result_is_freed_when_its_user_has_it():
    class Layer:
        def forward(self, x):
            x = x + 1
            y = self.mlp(self.norm(x))
            return self.look(y) + x

    norms = []

    class Module(Parts):
        def norm(self, x):
            norms.append(weakref.ref(y := x * 2))
            return y

        def look(self, y):
            gc.collect()
            assert norms[-1]() is None
            return y

    rewritten(Layer.forward).forward(Module(), torch.ones(2))
    assert len(norms) == 1


def repeated(function):
    @functools.wraps(function)
    def wrapper(self, *arguments, times=1, **named):
        assert wrapper.__name__ == "forward"
        return sum(function(self, *arguments, **named) for _ in range(times))

    return wrapper


def opaque(function):
    hidden = [function]

    @functools.wraps(function)
    def wrapper(*arguments):
        return hidden[0](*arguments)

    return wrapper


class Decorated:
    @repeated
    @torch.no_grad()
    def forward(self, x, *, factor=3.0):
        total = x + factor
        return self.norm(total)

    @opaque
    def hidden(self, x):
        total = x + 1
        return self.norm(total)

    @property
    def kind(self):
        return "a property"

    def renamed(this, x):
        total = x + 1
        return this.norm(total)

    def enclosing(self, x):
        return __class__, self.norm(x + 1)

    def exchanged(self, x):
        self = self.other
        return self.norm(x + 1)


def test_decorators_are_called_as_before():
    result = rewritten(Decorated.forward)
    for forward in (Decorated.forward, result.forward):
        y, calls, _ = calls_of(
            lambda module, x, forward=forward: forward(module, x, times=2, factor=1.0), torch.ones(2)
        )
        assert (y.tolist(), len(calls)) == ([24.0, 24.0], 2)
        assert not forward(Parts(), torch.ones(2, requires_grad=True)).requires_grad
    assert result.forward.__wrapped__.__wrapped__ is not Decorated.forward.__wrapped__.__wrapped__


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (Decorated.hidden, "a decorator hides its forward"),
        (Decorated.renamed, "its forward changes the meaning of self"),
        (Decorated.exchanged, "its forward changes the meaning of self"),
        (Decorated.enclosing, "its forward is no plain function"),
        (Decorated.kind, "its forward is no plain function"),
        (len, "its forward is no plain function"),
    ],
)
def test_reasons(method, reason):
    assert rewritten(method) == reason


def forward_of(text: str, name: str):
    """Returns Layer.forward, run from this text under the name of a file."""
    names = {"torch": torch}
    exec(compile(text, name, "exec"), names)
    return names["Layer"].forward


TEXT = """
import torch

class Layer:
    def forward(self, x):
        total = x + torch.ones(2)
        return self.norm(total)
"""


def remember(name: str, text: str) -> None:
    linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name


def test_the_source_has_to_be_that_of_the_code_that_runs():
    name = "<a file that changes>"
    forward = forward_of(TEXT, name)
    assert rewritten(forward) == "the source of its forward is not at hand"
    remember(name, TEXT)
    assert rewritten(forward).norms == ("norm",)
    for changed in (
        TEXT.replace("ones", "zeros"),
        TEXT.replace("import", "\nimport"),
        "(",
        TEXT.replace("x)", "x, y)"),
    ):
        remember(name, changed)
        assert rewritten(forward) == "the source of its forward is not at hand"
    del linecache.cache[name]


def test_an_error_is_shown_at_its_line():
    class Module(Parts):
        def _add_and_normalize(self, norm, augend, addend):
            raise ValueError("here")

    with pytest.raises(ValueError, match="here") as error:
        rewritten(Joined.before_a_block_1).forward(Module(), torch.ones(2))
    _, frame, _ = traceback.extract_tb(error.value.__traceback__)
    assert (frame.filename, frame.line) == (__file__, "x = residual + x")


def test_the_method_that_is_called_has_a_name_of_its_own():
    assert not hasattr(nn.Module, additions.METHOD)
