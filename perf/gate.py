"""Decides whether the results of a call agree with fp64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from perf.calls import Candidate, Inputs, bind, candidate
from perf.ops import Functions, modulated_of_sum, of_sum, torch_functions
from perf.points import BOTH, MODES, Point

# Relative to the reference's norm. Rounding the result alone costs at most half an ulp an element, 2^-9 in bf16; the
# rest is for sums of up to a million terms in fp32.
TOLERANCE = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-17, "fp64": 2.0**-40}
WORST_ELEMENT = 16


def outputs(point: Point, entry: Candidate, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Makes one call from fresh running statistics."""
    inputs.reset()
    return named(point, entry.run(entry.prepare()), inputs)


def named(point: Point, result: Any, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Returns everything that a call must have computed, by name."""
    if point.mode == BOTH:
        forward, gradients = (replace(point, mode=mode) for mode in MODES)
        return named(forward, result[0], inputs) | named(gradients, result[1], inputs)
    if point.mode == "backward":
        return dict(zip(point.gradients, result, strict=True))
    if point.has_total:
        return dict(zip(("y", "total"), result, strict=True))
    if "running_mean" in point.floor.writes:
        return {"y": result, "running_mean": inputs.running_mean, "running_var": inputs.running_var}
    return {"y": result}


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds to the type's nearest values, in fp64; gradients pass as they are."""
    return x + (x.detach().to(dtype).double() - x.detach())


def exact_functions(total_dtype: torch.dtype) -> Functions:
    """Returns torch's own in fp64, where total is rounded to its type."""
    exact = dict(torch_functions())
    rounded = partial(_rounded, dtype=total_dtype)
    for name in ("layer_norm", "rms_norm"):
        exact[f"{name}_residual"] = of_sum(exact[name], rounded)
    exact["layer_norm_modulated_residual"] = modulated_of_sum(exact["layer_norm"], rounded)
    return exact


def expected(point: Point, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Returns the right results, in fp64."""
    inputs.reset()
    exact = inputs.double()
    forward = bind(point, exact_functions(inputs.x.dtype), exact)
    assert forward is not None
    return outputs(point, candidate("fp64", point, forward, exact), exact)


def errors(results: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Returns, for each output, ||result - exact|| / ||exact||, and the worst element's error over the largest exact
    value."""
    measured = {}
    for name, reference in ((name, tensor.detach()) for name, tensor in exact.items()):
        difference = results[name].detach().double() - reference
        norm = max(float(reference.norm()), 1e-300)
        largest = max(float(reference.abs().max()), 1e-300)
        measured[name] = (float(difference.norm()) / norm, float(difference.abs().max()) / largest)
    return measured


def verdict(measured: dict[str, tuple[float, float]], tolerance: float) -> str:
    """Returns the first output outside the tolerance in words, or an empty string. NaN is never inside."""
    for name, (overall, worst) in measured.items():
        if not (overall <= tolerance and worst <= WORST_ELEMENT * tolerance):
            return f"{name} is off by {overall:.2e} overall and {worst:.2e} at worst, {tolerance:.2e} is allowed"
    return ""
