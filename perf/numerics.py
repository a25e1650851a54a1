"""Measures how far triton_norm and torch are from fp64 on data that normalizations find hard.

An error is counted in ulp: distances between neighbours of the output's type at the largest element of the exact row.
The kernels run on the GPU where there is one, otherwise under Triton's interpreter, for which the process must have
TRITON_INTERPRET=1 set before Triton is imported; torch runs on the same device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from unittest import mock

import torch

import triton_norm
from perf import ops
from perf.calls import DTYPES, Inputs, bind
from perf.environment import has_gpu
from perf.findings import OUTPUTS, OVERFLOWING, ulps_of, ulps_text
from perf.ops import BULK, FAMILY, MODULATIONS, PARAMETERS, TENSORS, Functions, torch_functions, triton_norm_functions
from perf.points import Point, Workload
from perf.records import Numerics, Ulps, failed, made
from triton_norm import launch, trials

Draw = Callable[[int, torch.dtype, torch.Generator], torch.Tensor]

OPS = tuple(name for name, op in ops.OPS.items() if op.training and {*op.inputs} & {*BULK} <= {"x", "gate", "dy"})
"""Ops without a residual, which have all of the arithmetic; those with one round their sum first."""
TYPES = ("fp32", "bf16", "fp16")
COLUMNS = (64, 1000, 4096)
# Activations, gates and modulations are computed element by element before or behind sums that other ops have, too.
FEWER_COLUMNS = dict.fromkeys(
    ("group_norm_silu", "rms_norm_gated", "rms_norm_gate_first", "layer_norm_modulated", "rms_norm_modulated"), (1000,)
)
ROWS = 6
# Rows are groups, instances or tokens of this many samples.
SAMPLES = 2
# A channel's elements are spread over this many samples, and a group's over this many channels.
SPREAD, GROUP_CHANNELS = 4, 2
CONSTANTS = (0.1, 1e4 / 3, -7.7, 0.0, 1e-30, 1e4)


def _normal(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(ROWS, n, dtype=torch.float64, generator=generator)


def _large(n: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    largest = min(torch.finfo(dtype).max, (torch.finfo(torch.float32).max / 2 / n) ** 0.5)
    return _normal(n, generator).sign().mul_(largest).mul_(1 - 1e-2 * _normal(n, generator).abs().clamp_max(1))


def _outlier(n: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    x = _normal(n, generator)
    x[:, 0] = min(1e6, torch.finfo(dtype).max)
    return x


DATA: dict[str, Draw] = {
    "normal": lambda n, dtype, generator: _normal(n, generator),
    "mean 1e4 times std": lambda n, dtype, generator: 1e4 + _normal(n, generator),
    "constant rows": lambda n, dtype, generator: torch.tensor(CONSTANTS, dtype=torch.float64)[:, None].expand(ROWS, n),
    "squares that just fit in fp32": _large,
    OVERFLOWING: lambda n, dtype, generator: _normal(n, generator).sign() * torch.finfo(dtype).max / 2,
    "one outlier": _outlier,
    "tiny": lambda n, dtype, generator: _normal(n, generator) * max(1e-20, torch.finfo(dtype).tiny),
}


def ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    info = torch.finfo(dtype)
    return info.eps * torch.exp2(torch.floor(torch.log2(values.abs().clamp_min(info.smallest_normal))))


def error(rows: torch.Tensor, exact: torch.Tensor) -> float | None:
    """Returns the largest error in ulp; None where a result is not finite."""
    rows = rows.cpu()
    if not rows.isfinite().all():
        return None
    steps = ulp(exact.abs().amax(1, keepdim=True), rows.dtype)
    return float(((rows.double() - exact).abs() / steps).max())


def _workload(family: str, n: int) -> Workload:
    """Returns an input of rows of n elements, each of which is normalized by itself: a channel, a group or an
    instance."""
    shapes = {
        "rows": (ROWS, n),
        "gated": (ROWS, n),
        "modulated": (SAMPLES, ROWS // SAMPLES, n),
        "channels": (SPREAD, ROWS, n // SPREAD),
        "groups": (SAMPLES, ROWS // SAMPLES * GROUP_CHANNELS, n // GROUP_CHANNELS),
        "instances": (SAMPLES, ROWS // SAMPLES, n),
    }
    return Workload(family, "numerics", shapes[family], "", num_groups=ROWS // SAMPLES)


def _laid(rows: torch.Tensor, workload: Workload) -> torch.Tensor:
    """Returns [rows, n] in the shape of the workload."""
    if workload.family == "channels":
        return rows.view(ROWS, SPREAD, -1).transpose(0, 1).contiguous()
    return rows.view(workload.shape)


def _as_rows(tensor: torch.Tensor, workload: Workload) -> torch.Tensor:
    return (tensor.transpose(0, 1) if workload.family == "channels" else tensor).reshape(ROWS, -1)


def _call(functions: Functions, point: Point, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns y and dx as rows, of inputs by their names."""
    inputs = Inputs(**tensors, running_mean=None, running_var=None)
    inputs.x = inputs.x.clone().requires_grad_()
    forward = bind(point, functions, inputs)
    assert forward is not None
    y = forward()
    (dx,) = torch.autograd.grad(y, inputs.x, inputs.dy)
    return {name: _as_rows(tensor, point.workload) for name, tensor in (("y", y.detach()), ("dx", dx))}


@contextmanager
def _kernels_as_on_a_gpu() -> Iterator[None]:
    """Launches with the best guess: errors hardly depend on it, and a search would take most of the time."""
    with ExitStack() as stack:
        stack.enter_context(triton_norm.backend("triton"))
        stack.enter_context(mock.patch.object(launch, "search", lambda kernel, space, *arguments: space.configs[0]))
        stack.enter_context(mock.patch.object(trials, "fastest", lambda space, *arguments: space.configs[0]))
        if not has_gpu():
            from triton_norm.testing.interpreter import correct_rounding, fast_launches

            stack.enter_context(fast_launches())
            stack.enter_context(correct_rounding())
        yield


def measure(point: Point, data: str, n: int) -> dict[str, Ulps]:
    """Returns {"y": {"triton_norm": ulp, "torch": ulp}, "dx": ...} of rows of n elements."""
    dtype, workload = DTYPES[point.dtype], point.workload
    generator = torch.Generator().manual_seed(n)
    rows = {"x": DATA[data](n, dtype, generator).contiguous(), "dy": _normal(n, generator)}
    drawn = {name: _laid(tensor, workload) for name, tensor in rows.items()}
    for name in (name for name in point.declared.forward.reads if name in (*PARAMETERS, *MODULATIONS, "gate")):
        values = TENSORS[name].std * _normal(n, generator) + TENSORS[name].mean
        if name in PARAMETERS:
            drawn[name] = values[0, : workload.features]
        else:
            drawn[name] = values[:SAMPLES] if name in MODULATIONS else _laid(values, workload)
    rounded = {name: tensor.to(dtype) for name, tensor in drawn.items()}
    exact = _call(torch_functions(), point, {name: tensor.double() for name, tensor in rounded.items()})
    there = {name: tensor.to("cuda" if has_gpu() else "cpu") for name, tensor in rounded.items()}
    with _kernels_as_on_a_gpu():
        ours = _call(triton_norm_functions(), point, there)
    theirs = _call(torch_functions(), point, there)
    return {
        name: {"triton_norm": error(ours[name], reference), "torch": error(theirs[name], reference)}
        for name, reference in exact.items()
    }


def records() -> Iterator[Numerics]:
    for op, dtype, data in product(OPS, TYPES, DATA):
        for columns in FEWER_COLUMNS.get(op, COLUMNS):
            point = Point(op, "backward", dtype, _workload(FAMILY[op], columns))
            about = {"op": op, "dtype": dtype, "data": data, "columns": columns, "status": "ok", "message": ""}
            try:
                yield made(Numerics, about, measure(point, data, columns))
            except Exception as error:
                yield made(Numerics, about, failed(error))


def line(record: Numerics) -> str:
    name = f"{record['op']} {record['dtype']} {record['columns']} columns, {record['data']}"
    if record["status"] != "ok":
        return f"{name}: {record['status']}, {record['message']}"
    return f"{name}: " + "; ".join(
        f"{output} {', '.join(f'{who} {ulps_text(ulps)}' for who, ulps in ulps_of(record, output).items())}"
        for output in OUTPUTS
    )
