"""Grids of cases in which each pair of values occurs, and few of their products."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest


def pairwise(
    factors: Mapping[str, Sequence[Any]], possible: Callable[..., bool] = lambda *values: True
) -> pytest.MarkDecorator:
    """Parametrizes a test such that each possible pair of values of two factors is in at least one case.

    A fault that depends on one value, or on two together, is found as by all products of values.

    Args:
        factors: The values of each factor by its name; the values of a factor "a, b" are pairs.
        possible: Returns whether there is a case of one value of each factor, in their order.
    """
    chosen = cases(factors, possible)
    rows = [_arguments(factors, case) for case in chosen]
    return pytest.mark.parametrize(", ".join(factors), rows, ids=_id)


def cases(
    factors: Mapping[str, Sequence[Any]], possible: Callable[..., bool] = lambda *values: True
) -> list[list[Any]]:
    """Returns the values of each case, in the factors' order."""
    numbers = itertools.product(*(range(len(values)) for values in factors.values()))
    there = [case for case in numbers if possible(*_values(factors, case))]
    pairs = {case: frozenset(itertools.combinations(enumerate(case), 2)) for case in there}
    missing, chosen = frozenset[Any]().union(*pairs.values()), []
    while missing:
        chosen.append(max(there, key=lambda case: len(pairs[case] & missing)))
        missing -= pairs[chosen[-1]]
    return [_values(factors, case) for case in sorted(chosen)]


def _values(factors: Mapping[str, Sequence[Any]], case: tuple[int, ...]) -> list[Any]:
    return [values[number] for values, number in zip(factors.values(), case, strict=True)]


def _arguments(factors: Mapping[str, Sequence[Any]], values: Sequence[Any]) -> list[Any]:
    """Returns the test's arguments: one for each name."""
    parts = (value if ", " in name else [value] for name, value in zip(factors, values, strict=True))
    return list(itertools.chain.from_iterable(parts))


def _id(value: Any) -> str | None:
    if isinstance(value, (str, int, float, type(None))):
        return None  # pytest's own
    return value.__name__ if hasattr(value, "__name__") else str(value)
