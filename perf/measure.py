"""Timing on a GPU: nothing is timed before it agrees with fp64, and everything is timed with a cold L2."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch.nn import functional

from perf.contenders import Contender, Functions, torch_functions
from perf.workloads import Point

Record = dict[str, Any]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
# Relative to the reference's norm. Rounding the result alone costs at most half an ulp an element, 2^-9 in bf16; the
# rest is for sums of up to a million terms in fp32.
TOLERANCE = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-17, "fp64": 2.0**-40}
WORST_ELEMENT = 16
EPS = 1e-5
MOMENTUM = 0.1
NEAR_ZERO = 1 / 16
WARMUPS = 3
HOST_CALLS = 9
MINIMUM_ROUNDS, MAXIMUM_ROUNDS = 11, 101


Forward = Callable[[], Any]


class Stopped(RuntimeError):
    """The GPU no longer answers: nothing measured after this could be trusted."""


@dataclass
class Inputs:
    """A point's tensors. Gradients are required only where the backward pass is timed."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    dy: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor
    residual: torch.Tensor | None = None
    dtotal: torch.Tensor | None = None

    def reset(self) -> None:
        self.running_mean.fill_(0.25)
        self.running_var.fill_(1.5)

    def leaves(self, point: Point) -> tuple[torch.Tensor, ...]:
        """What each of the point's gradients is the gradient of."""
        by_gradient = {"dx": self.x, "dresidual": self.residual, "dweight": self.weight, "dbias": self.bias}
        found = (by_gradient[name] for name in point.gradients)
        return tuple(leaf for leaf in found if leaf is not None)

    def double(self) -> "Inputs":
        return Inputs(*(_double(getattr(self, field.name)) for field in fields(self)))


def _double(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)


def make_inputs(point: Point, device: str, seed: int = 0, blank: bool = False) -> Inputs:
    """Random values, or `blank`: memory that nothing has touched, where only the addresses matter."""
    generator = torch.Generator(device).manual_seed(seed)
    workload = point.workload
    memory_format = torch.contiguous_format
    if workload.layout == "channels_last":
        memory_format = torch.channels_last if len(workload.shape) == 4 else torch.channels_last_3d

    def draw(shape: tuple[int, ...], dtype: str, mean: float, std: float) -> torch.Tensor:
        as_told = memory_format if len(shape) > 1 else torch.contiguous_format
        if blank:
            return torch.empty(shape, device=device, dtype=DTYPES[dtype], memory_format=as_told)
        values = torch.randn(shape, generator=generator, device=device).mul_(std).add_(mean)
        return values.to(DTYPES[dtype], memory_format=as_told)

    features = (workload.features,)
    x = draw(workload.shape, point.dtype, 0.5, 2.0)
    dy = draw(workload.shape, point.dtype, 0.0, 1.0)
    weight = draw(features, point.parameter_dtype, 1.0, 0.25)
    bias = draw(features, point.parameter_dtype, 0.0, 0.25)
    running = torch.empty(features, device=device, dtype=torch.float64 if point.dtype == "fp64" else torch.float32)
    inputs = Inputs(x, weight, bias, dy, running, running.clone())
    if point.has_residual:
        inputs.residual = draw(workload.shape, point.dtype, -0.25, 1.0)
        if point.has_total:
            inputs.dtotal = draw(workload.shape, point.dtype, 0.0, 1.0)
        elif not blank:
            _keep_from_zero(inputs, inputs.residual)
    inputs.reset()
    for leaf in inputs.leaves(point):
        leaf.requires_grad_(point.differentiates)
    return inputs


def _keep_from_zero(inputs: Inputs, residual: torch.Tensor) -> None:
    """Moves it where ReLU's argument is so near 0 that rounding decides on the side: there the derivative jumps."""
    parameters = inputs.weight.double(), inputs.bias.double()
    z = functional.batch_norm(inputs.x.double(), None, None, *parameters, True, 0.0, EPS).add_(residual)
    away = torch.full_like(z, 2 * NEAR_ZERO).copysign_(z)
    residual.add_(away.masked_fill_(z.abs() >= NEAR_ZERO, 0.0))


def bind(point: Point, functions: Functions, inputs: Inputs) -> Forward | None:
    """The forward call of one op on these inputs, or None where the contender has no such op."""
    i, function = inputs, getattr(functions, point.op.removesuffix("_eval"))
    if function is None:
        return None
    tensors = (i.x, i.residual) if point.has_residual else (i.x,)
    if point.workload.family == "channels":
        statistics, training = (i.running_mean, i.running_var), point.training
        return lambda: function(*tensors, *statistics, i.weight, i.bias, training, MOMENTUM, EPS)
    parameters = (i.weight, i.bias) if point.has_bias else (i.weight,)
    shape = (point.workload.features,)
    return lambda: function(*tensors, shape, *parameters, EPS)


@dataclass(frozen=True)
class Candidate:
    """`run(prepare())` is one call; only `run` is timed."""

    name: str
    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


def candidate(name: str, point: Point, forward: Forward, inputs: Inputs) -> Candidate:
    """A backward pass is timed after a fresh, untimed forward pass: no graph is kept from one call to the next."""
    if point.mode == "forward":
        return Candidate(name, lambda: None, lambda _: forward())
    leaves = inputs.leaves(point)
    gradients = (inputs.dy, inputs.dtotal) if point.has_total else inputs.dy
    return Candidate(name, forward, lambda y: torch.autograd.grad(y, leaves, gradients))


def outputs(point: Point, entry: Candidate, inputs: Inputs) -> dict[str, torch.Tensor]:
    """One call from fresh running statistics."""
    inputs.reset()
    return named(point, entry.run(entry.prepare()), inputs)


def named(point: Point, result: Any, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Everything that a call must have computed."""
    if point.mode == "backward":
        return dict(zip(point.gradients, result, strict=True))
    if point.has_total:
        return dict(zip(("y", "total"), result, strict=True))
    if "running_mean" in point.floor.writes:
        return {"y": result, "running_mean": inputs.running_mean, "running_var": inputs.running_var}
    return {"y": result}


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To the type's nearest values, in fp64; gradients pass as they are."""
    return x + (x.detach().to(dtype).double() - x.detach())


def exact_functions(total_dtype: torch.dtype) -> Functions:
    """torch's own in fp64, where total = x + residual is what a total of that type would hold."""

    def layer_norm(x: Any, residual: Any, *arguments: Any) -> Any:
        total = _rounded(x + residual, total_dtype)
        return functional.layer_norm(total, *arguments), total

    def rms_norm(x: Any, residual: Any, *arguments: Any) -> Any:
        total = _rounded(x + residual, total_dtype)
        return functional.rms_norm(total, *arguments), total

    return replace(torch_functions(), layer_norm_residual=layer_norm, rms_norm_residual=rms_norm)


def expected(point: Point, inputs: Inputs) -> dict[str, torch.Tensor]:
    """What is right, in fp64."""
    inputs.reset()
    exact = inputs.double()
    forward = bind(point, exact_functions(inputs.x.dtype), exact)
    assert forward is not None
    return outputs(point, candidate("fp64", point, forward, exact), exact)


def errors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """For each output ||found - wanted|| / ||wanted||, and the worst element's error over the largest wanted value."""
    measured = {}
    for name, exact in wanted.items():
        reference = exact.detach()
        difference = found[name].detach().double() - reference
        norm = max(float(reference.norm()), 1e-300)
        largest = max(float(reference.abs().max()), 1e-300)
        measured[name] = (float(difference.norm()) / norm, float(difference.abs().max()) / largest)
    return measured


def verdict(measured: dict[str, tuple[float, float]], tolerance: float) -> str:
    """What is wrong, in words; nothing if all is well. NaN is never well."""
    for name, (overall, worst) in measured.items():
        if not (overall <= tolerance and worst <= WORST_ELEMENT * tolerance):
            return f"{name} is off by {overall:.2e} overall and {worst:.2e} at worst, {tolerance:.2e} is allowed"
    return ""


def in_a_line(error: BaseException) -> str:
    """Its first and its last line: Triton's errors begin with a place and end with what is wrong."""
    lines = str(error).strip().splitlines()
    ends = dict.fromkeys(line.strip()[:300] for line in (lines[:1] + lines[-1:]))
    return f"{type(error).__name__}: {' ... '.join(ends)}" if lines else type(error).__name__


class Timer(Protocol):
    """What a sweep needs of a device and its clock; a test replaces it."""

    device: str

    def round(self, entries: Sequence[Candidate], backlog_us: Sequence[float]) -> list[float]: ...

    def host(self, entry: Candidate) -> float: ...

    def synchronize(self) -> None: ...


class CudaTimer:
    """CUDA events around one call that starts on a flushed L2, queued behind enough work to hide the host's time."""

    device = "cuda"

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._cycles_per_us = properties.clock_rate / 1e3
        flush_bytes = max(256 << 20, 4 * int(properties.L2_cache_size))
        self._scratch = torch.empty(flush_bytes, dtype=torch.int8, device=self.device)

    def _enqueue(self, entry: Candidate, backlog_us: float) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        state = entry.prepare()
        self._scratch.zero_()
        torch.cuda._sleep(int(backlog_us * self._cycles_per_us))
        start.record()
        entry.run(state)
        end.record()
        return start, end

    def round(self, entries: Sequence[Candidate], backlog_us: Sequence[float]) -> list[float]:
        events = [self._enqueue(entry, backlog) for entry, backlog in zip(entries, backlog_us, strict=True)]
        self.synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in events]

    def host(self, entry: Candidate) -> float:
        spent = []
        for _ in range(HOST_CALLS):
            state = entry.prepare()
            self.synchronize()
            before = time.perf_counter_ns()
            entry.run(state)
            spent.append((time.perf_counter_ns() - before) / 1e3)
        self.synchronize()
        return statistics.median(spent)

    def synchronize(self) -> None:
        torch.cuda.synchronize()


def summary(samples: Sequence[float]) -> dict[str, float]:
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return {"median_us": statistics.median(samples), "p20_us": fifths[0], "p80_us": fifths[3]}


def time_interleaved(entries: Sequence[Candidate], timer: Timer, seconds: float) -> list[Record]:
    """Rounds of one call each, so that a drifting clock falls on every contender alike."""
    for entry in entries:
        for _ in range(WARMUPS):
            entry.run(entry.prepare())
    timer.synchronize()
    host = [timer.host(entry) for entry in entries]
    backlog = [2 * us for us in host]
    rounds: list[list[float]] = []
    until = time.monotonic() + seconds
    while len(rounds) < MINIMUM_ROUNDS or (time.monotonic() < until and len(rounds) < MAXIMUM_ROUNDS):
        rounds.append(timer.round(entries, backlog))
    samples = zip(*rounds, strict=True)
    return [
        {**summary(sample), "host_us": host_us, "repetitions": len(rounds)}
        for sample, host_us in zip(samples, host, strict=True)
    ]


def copy_bandwidth(timer: Timer, size: int = 1 << 30, seconds: float = 0.5) -> float:
    """GB/s of a large device-to-device copy, bytes read plus bytes written: the roof."""
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=timer.device)
    target = torch.empty_like(source)
    entry = Candidate("copy", lambda: None, lambda _: target.copy_(source))
    median_us: float = time_interleaved([entry], timer, seconds)[0]["median_us"]
    return 2 * size / median_us / 1e3


def _admit(
    contender: Contender, point: Point, inputs: Inputs, wanted: dict[str, torch.Tensor], timer: Timer
) -> tuple[Record, Candidate | None]:
    """Build a contender's call and hold its results against fp64."""
    record: Record = {**point.describe(), "contender": contender.name}
    try:
        forward = bind(point, contender.load(), inputs)
        if forward is None:
            return record | {"status": "unsupported", "message": "the contender has no such op"}, None
        entry = candidate(contender.name, point, forward, inputs)
        measured = errors(outputs(point, entry, inputs), wanted)
        timer.synchronize()
    except Exception as error:
        return record | {"status": "error", "message": in_a_line(error)}, None
    message = verdict(measured, contender.accuracy * TOLERANCE[point.dtype])
    record |= {"errors": {name: overall for name, (overall, _) in measured.items()}}
    return record | {"status": "wrong" if message else "ok", "message": message}, None if message else entry


def measure_point(point: Point, contenders: Sequence[Contender], timer: Timer, seconds: float = 0.12) -> list[Record]:
    """One record a contender: timed, or the reason why not."""
    try:
        inputs = make_inputs(point, timer.device)
        wanted = expected(point, inputs)
        admitted = [_admit(contender, point, inputs, wanted, timer) for contender in contenders]
        del wanted
        entries = [entry for _, entry in admitted if entry]
        timings = iter(time_interleaved(entries, timer, seconds) if entries else [])
    except Exception as error:
        message = in_a_line(error)
        admitted = [
            ({**point.describe(), "contender": contender.name, "status": "error", "message": message}, None)
            for contender in contenders
        ]
        timings = iter(())
    records = []
    for record, entry in admitted:
        if entry:
            record |= next(timings)
            record["gbps"] = record["floor_bytes"] / record["median_us"] / 1e3
        records.append(record)
    try:
        timer.synchronize()
    except Exception as error:
        raise Stopped(in_a_line(error)) from error
    return records
