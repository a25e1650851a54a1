"""Measures how far triton_norm and torch are from fp64 on data that normalizations find hard.

An error is counted in ulp: distances between neighbours of the output's type at the largest element of the exact row.
The kernels run on the GPU where there is one, otherwise under Triton's interpreter, for which the process must have
TRITON_INTERPRET=1 set before Triton is imported; torch runs on the same device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

import triton_norm
from perf.calls import DTYPES, EPS
from perf.contenders import Functions, torch_functions, triton_norm_functions
from perf.environment import has_gpu
from perf.findings import OUTPUTS, OVERFLOWING, ulps_of, ulps_text
from perf.points import FAMILY, Point, Workload
from perf.records import Numerics, Ulps, in_a_line, made
from triton_norm import launch

Draw = Callable[[int, torch.dtype, torch.Generator], torch.Tensor]

OPS = ("layer_norm", "rms_norm", "batch_norm")
TYPES = ("fp32", "bf16", "fp16")
COLUMNS = (64, 1000, 4096)
ROWS = 6
# A channel's elements are spread over this many samples.
SAMPLES = 4
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


def error(found: torch.Tensor, exact: torch.Tensor) -> float | None:
    """Returns the largest error in ulp; None where a result is not finite."""
    found = found.cpu()
    if not found.isfinite().all():
        return None
    steps = ulp(exact.abs().amax(1, keepdim=True), found.dtype)
    return float(((found.double() - exact).abs() / steps).max())


def _call(functions: Functions, point: Point, tensors: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Returns y and dx of (x, dy, weight, bias) in rows, which are BatchNorm's channels, each with its weight and
    bias."""
    x, dy, weight, bias = tensors
    if point.workload.family == "channels":
        x, dy, weight, bias = _as_channels(x), _as_channels(dy), weight[:ROWS], bias[:ROWS]
    x = x.clone().requires_grad_()
    if point.workload.family == "channels":
        y = functions.batch_norm(x, None, None, weight, bias, True, 0.0, EPS)  # type: ignore[misc]
    else:
        y = getattr(functions, point.op)(x, x.shape[1:], *((weight, bias) if point.has_bias else (weight,)), EPS)
    (dx,) = torch.autograd.grad(y, x, dy)
    found = {"y": y.detach(), "dx": dx}
    if point.workload.family == "channels":
        return {name: tensor.transpose(0, 1).reshape(ROWS, -1) for name, tensor in found.items()}
    return found


def _as_channels(rows: torch.Tensor) -> torch.Tensor:
    """Returns [rows, n] as [samples, channels, positions]."""
    return rows.view(ROWS, SAMPLES, -1).transpose(0, 1).contiguous()


@contextmanager
def _kernels_as_on_a_gpu() -> Iterator[None]:
    """Launches with the best guess: errors hardly depend on it, and a search would take most of the time."""
    with ExitStack() as stack:
        stack.enter_context(triton_norm.backend("triton"))
        stack.enter_context(mock.patch.object(launch, "search", lambda kernel, space, *arguments: space.configs[0]))
        if not has_gpu():
            from triton_norm.testing.interpreter import correct_rounding, fast_launches

            stack.enter_context(fast_launches())
            stack.enter_context(correct_rounding())
        yield


def measure(point: Point, data: str) -> dict[str, Ulps]:
    """Returns {"y": {"triton_norm": ulp, "torch": ulp}, "dx": ...}."""
    n, dtype = point.workload.features, DTYPES[point.dtype]
    generator = torch.Generator().manual_seed(n)
    x = DATA[data](n, dtype, generator)
    dy, weight, bias = _normal(n, generator), 1 + 0.25 * _normal(n, generator)[0], 0.25 * _normal(n, generator)[0]
    rounded = tuple(tensor.to(dtype).contiguous() for tensor in (x, dy, weight, bias))
    exact = _call(torch_functions(), point, tuple(tensor.double() for tensor in rounded))
    there = tuple(tensor.to("cuda" if has_gpu() else "cpu") for tensor in rounded)
    with _kernels_as_on_a_gpu():
        ours = _call(triton_norm_functions(), point, there)
    theirs = _call(torch_functions(), point, there)
    return {
        name: {"triton_norm": error(ours[name], wanted), "torch": error(theirs[name], wanted)}
        for name, wanted in exact.items()
    }


def records() -> Iterator[Numerics]:
    for op in OPS:
        for dtype in TYPES:
            for data in DATA:
                for columns in COLUMNS:
                    point = Point(op, "backward", dtype, Workload(FAMILY[op], "numerics", (ROWS, columns), ""))
                    about = {"op": op, "dtype": dtype, "data": data, "columns": columns, "status": "ok", "message": ""}
                    try:
                        yield made(Numerics, about, measure(point, data))
                    except Exception as error:
                        yield made(Numerics, about, {"status": "error", "message": in_a_line(error)})


def line(record: Numerics) -> str:
    name = f"{record['op']} {record['dtype']} {record['columns']} columns, {record['data']}"
    if record["status"] != "ok":
        return f"{name}: {record['status']}, {record['message']}"
    return f"{name}: " + "; ".join(
        f"{output} {', '.join(f'{who} {ulps_text(ulps)}' for who, ulps in ulps_of(record, output).items())}"
        for output in OUTPUTS
    )
