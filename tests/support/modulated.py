"""Calls with a gate or a modulation, their exact results, and how inexact these may be."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

import triton_norm
from support.gpus import with_numbers
from support.oracle import FACTOR, assert_within, ulp
from support.strategies import F16, F32, F64, Layout, Shape, Type, values
from triton_norm.specs import ModulatedTensors
from triton_norm.tuning.limits import INTERPRETED

NAMES = ModulatedTensors._fields
OUTER = ("scale", "shift", "residual_gate")
LIKE_X = ("residual", "gate")
CHUNKS = 6
"""Modulations that a projection computes at once, of which each is a view."""

CUTS: dict[str, dict[str, int]] = {
    "whole": {},
    "rows": {"interpreted_tile_elements": 16, "multiprocessors": 3, "modulated_split_rows": 1},
    "splits": {"interpreted_tile_elements": 128, "multiprocessors": 2, "modulated_split_rows": 2},
    "pieces": {
        "interpreted_tile_elements": 32,
        "multiprocessors": 4,
        "modulated_split_rows": 2,
        "backward_span_bytes": 64,
    },
}
"""Numbers with which small inputs are cut up as large ones are on a GPU."""

Tensors = dict[str, Tensor | None]


@contextlib.contextmanager
def cut(name: str) -> Iterator[None]:
    """Sets the numbers of that name where kernels are interpreted; a GPU keeps its own."""
    numbers = dict(CUTS[name])
    if "interpreted_tile_elements" in numbers:
        numbers["rows_backward_elements_per_sm"] = numbers["interpreted_tile_elements"]
    with with_numbers(**numbers) if INTERPRETED and numbers else contextlib.nullcontext():
        yield


def chunked(tensor: Tensor, n_outer: int) -> Tensor:
    """Returns the values as one of the chunks of a wider tensor, which has NaN elsewhere."""
    memory = tensor.new_full((*tensor.shape[:n_outer], CHUNKS, *tensor.shape[n_outer:]), math.nan)
    return memory.select(n_outer, 2).copy_(tensor)


def activation(z: Tensor, name: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns f(z), f'(z), and the sum of the absolute values that f'(z) is made up from."""
    if name is None:
        return z, torch.ones_like(z), torch.ones_like(z)
    sigmoid = torch.sigmoid(z)
    if name == "sigmoid":
        return sigmoid, sigmoid * (1 - sigmoid), sigmoid
    return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid)), sigmoid * (1 + z.abs())


@dataclasses.dataclass(frozen=True)
class Modulated:
    """A call of layer_norm or rms_norm with a gate or a modulation.

    Args:
        dtypes: of the tensors by name; None for those that are missing.
        shapes: of scale, shift and residual_gate.
        placements: how tensors lie in memory, by name; those that are missing are contiguous.
        chunks: modulations that are views of a wider tensor.
        needs: names of the tensors that need a gradient.
        used: outputs with a gradient: "y", "total" or "both".
        by_torch: torch's path rounds the gradients of total to its type, unless x is of float64.
    """

    function: str
    shape: Shape
    n_axes: int
    dtypes: dict[str, Type]
    shapes: dict[str, Shape]
    placements: dict[str, Layout] = dataclasses.field(default_factory=dict)
    chunks: frozenset[str] = frozenset()
    eps: float = 1e-5
    hard: str = "normal"
    seed: int = 0
    cut: str = "whole"
    gate_activation: str | None = "silu"
    gate_first: bool = False
    product: Type = None
    x_hat: Type = None
    out: Type = None
    total: Type = None
    offset: float = 0.0
    per_head: bool = False
    needs: frozenset[str] = frozenset(NAMES)
    used: str = "both"
    by_torch: bool = False

    @property
    def n_outer(self) -> int:
        return len(self.shape) - self.n_axes

    @property
    def row(self) -> Shape:
        return self.shape[self.n_outer :]

    @property
    def total_dtype(self) -> torch.dtype:
        return self.total or self.dtypes["residual"] or self.dtypes["x"]  # type: ignore[return-value]

    @property
    def computed(self) -> torch.dtype:
        return F64 if F64 in (self.total_dtype, self.dtypes["x"]) else F32

    def drawn(self, device: str) -> Tensors:
        """Returns the tensors of the call, and dy and dtotal."""
        generator = torch.Generator().manual_seed(self.seed)
        narrow = F16 in (*self.dtypes.values(), self.out, self.total)
        axes = tuple(range(self.n_outer, len(self.shape)))
        result: Tensors = {"x": values(self.hard, self.shape, axes, generator, narrow)}
        dtypes = self.dtypes | {"dy": self.out or self.dtypes["x"], "dtotal": self.total_dtype}
        for name, dtype in dtypes.items():
            if name != "x":
                of_row = self.row if name in ("weight", "bias") else self.shape
                shape = self.shapes.get(name, of_row)
                result[name] = None if dtype is None else torch.randn(shape, generator=generator, dtype=F64)
        if self.dtypes["residual"] is None:
            result["dtotal"] = None
        return {name: self._placed(name, tensor, dtypes[name], device) for name, tensor in result.items()}

    def _placed(self, name: str, tensor: Tensor | None, dtype: Type, device: str) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.to(device, dtype)
        if name in self.chunks:
            return chunked(tensor, tensor.dim() - self.n_axes)
        strides = self.placements.get("dy" if name == "dtotal" else name)
        return tensor if strides is None else strides.of(tensor)

    def call(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """Returns y, and total if there is a residual."""
        named = {name: tensors[name] for name in NAMES if name != "x"}
        if self.function == "rms_norm":
            del named["bias"]
        if self.per_head:
            named["head_weight"] = named.pop("scale")
        options = {"weight_offset": self.offset, "x_hat_dtype": self.x_hat, "out_dtype": self.out}
        options |= {"product_dtype": self.product, "gate_first": self.gate_first}
        options |= {"gate_activation": self.gate_activation, "residual_dtype": self.total}
        result = getattr(triton_norm, self.function)(tensors["x"], self.row, eps=self.eps, **named, **options)
        return result if isinstance(result, tuple) else (result,)

    def run(self, tensors: Tensors) -> Tensors:
        """Returns the outputs, and the gradients of the tensors that need one, as "d" and their name."""
        leaves = {name: tensors[name] for name in NAMES}
        leaves = {
            name: None if tensor is None else tensor.detach().requires_grad_(name in self.needs)
            for name, tensor in leaves.items()
        }
        with cut(self.cut):
            outputs = self.call(leaves)
            needed = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
            pairs = [
                (output, tensors[dy])
                for output, dy in zip(outputs, ("dy", "dtotal"), strict=False)
                if self.used in ("both", {"dy": "y", "dtotal": "total"}[dy]) and output.requires_grad
            ]
            gradients = torch.autograd.grad(
                [y for y, _ in pairs], list(needed.values()), [dy for _, dy in pairs], allow_unused=True
            )
        result: Tensors = {"y": outputs[0].detach(), "total": outputs[1].detach() if len(outputs) > 1 else None}
        return result | {f"d{name}": gradient for name, gradient in zip(needed, gradients, strict=True)}

    def check(self, tensors: Tensors, result: Tensors) -> None:
        """Asserts that results are within their bounds."""
        exact, errors = Bound(self, tensors, result["total"]).results()
        for name, actual in result.items():
            if actual is not None:
                leaf = tensors.get(name[1:]) if name.startswith("d") else None
                assert leaf is None or (actual.dtype, actual.shape) == (leaf.dtype, leaf.shape), name
                assert_within(actual, exact[name], errors[name].expand(exact[name].shape), name)
            elif name.startswith("d"):
                assert not exact[name].any(), f"{name} is missing"


class Bound:
    """The exact results of a call, and the largest error of a correctly rounded computation; see ErrorBound.

    Args:
        total: the call's, rounded, from which all else follows.
    """

    def __init__(self, case: Modulated, tensors: Tensors, total: Tensor | None) -> None:
        self.case = case
        wide = {name: None if t is None else t.detach().double().cpu().contiguous() for name, t in tensors.items()}
        self.wide, self.axes = wide, tuple(range(case.n_outer, len(case.shape)))
        self.u = torch.finfo(case.computed).eps / 2
        self.growth = (FACTOR + math.log2(math.prod(case.row))) * (2 if case.computed == F64 else 1)
        x = wide["x"]
        assert x is not None
        self.total = x if total is None else total.detach().double().cpu()
        zero, one = torch.zeros((), dtype=F64), torch.ones((), dtype=F64)
        self.weight = one if wide["weight"] is None else wide["weight"] + case.offset
        self.weight_terms = one if wide["weight"] is None else wide["weight"].abs() + abs(case.offset)
        self.bias = zero if wide["bias"] is None else wide["bias"]
        offset = case.offset if case.per_head else 1.0
        self.scale = one if wide["scale"] is None else self.along("scale") + offset
        self.scale_terms = one if wide["scale"] is None else self.along("scale").abs() + abs(offset)
        self.shift = zero if wide["shift"] is None else self.along("shift")
        self._set_gate(one)

    def _set_gate(self, one: Tensor) -> None:
        gate = self.wide["gate"]
        self.f = self.f_terms = self.slope = self.slope_terms = one
        if gate is not None:
            self.f, self.slope, self.slope_terms = activation(gate, self.case.gate_activation)
            self.f_terms = self.f.abs()
            if self.case.dtypes["gate"] == F64 != self.case.computed:  # the gate itself is rounded
                self.f_terms, self.slope_terms = (t * (1 + gate.abs()) for t in (self.f_terms, self.slope_terms))

    def along(self, name: str) -> Tensor:
        """Returns a modulation with an axis of length 1 for each axis of x that it lacks."""
        own, case = self.wide[name], self.case
        assert own is not None
        missing = (1,) * (len(case.shape) - own.dim())
        if name == "scale" and case.per_head:
            return own.reshape(*missing, *own.shape)
        n = own.dim() - case.n_axes
        return own.reshape(*own.shape[:n], *missing, *case.row)

    def summed(self, name: str, terms: Tensor) -> Tensor:
        """Returns the sum of the terms over the rows that share a parameter or a modulation."""
        own = self.wide[name]
        assert own is not None
        lengths = (1,) * self.case.n_outer + self.case.row if name in ("weight", "bias") else self.along(name).shape
        return terms.expand(self.case.shape).sum_to_size(lengths).reshape(own.shape)

    def slack(self, terms: Tensor, name: str | None = None) -> Tensor:
        """Returns the error of a result with these terms; that of a sum over rows if `name` is a parameter's."""
        growth = self.growth
        own = None if name is None else self.wide[name]
        if own is not None:
            terms, growth = self.summed(name, terms), growth + math.sqrt(terms.numel() / own.numel())  # type: ignore[arg-type]
        return growth * self.u * terms

    def rounding(self, value: Tensor, dtype: Type, terms: Tensor) -> Tensor:
        """Returns half an ulp of the type that a value is rounded to in between."""
        if dtype is None or torch.finfo(dtype).eps / 2 <= self.u:
            return torch.zeros_like(value)
        info = torch.finfo(dtype)
        return info.eps / 2 * (value.abs() + self.slack(terms) + info.smallest_normal)

    def results(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns exact results and errors by name."""
        case, wide, mean = self.case, self.wide, lambda t: t.expand(case.shape).mean(self.axes, keepdim=True)
        first = case.gate_first and wide["gate"] is not None
        v = self.total * self.f if first else self.total
        centre = mean(v) if case.function == "layer_norm" else torch.zeros_like(v[..., :1])
        rstd = torch.rsqrt(mean((v - centre).square()) + case.eps)
        x_hat = (v - centre) * rstd
        blur = x_hat.abs() + (self.total * self.f_terms).abs() * rstd * first
        if case.function == "layer_norm":
            blur = blur + (centre.abs() + mean((v - centre).abs())) * rstd
        rounding = self.rounding(x_hat, case.x_hat, blur)
        z, z_terms = x_hat * self.weight + self.bias, blur * self.weight_terms + self.bias.abs()
        m, m_terms = z * self.scale + self.shift, z_terms * self.scale_terms + self.shift.abs()
        m_rounding = rounding * self.weight_terms * self.scale_terms
        m_rounding = m_rounding + self.rounding(m, case.product, m_terms + m_rounding / self.u)
        f, f_terms = (torch.ones_like(v),) * 2 if first else (self.f, self.f_terms)
        exact = {"y": m * f, "total": self.total}
        errors = {"y": self.slack(m_terms * f_terms) + m_rounding * f_terms, "total": torch.zeros_like(v)}
        dy = wide["dy"] if case.used != "total" or wide["residual"] is None else torch.zeros_like(v)
        assert dy is not None
        g, g_terms = dy * f, dy.abs() * f_terms

        def put(name: str, value: Tensor, terms: Tensor, rest: Tensor | None = None) -> None:
            """Sets the gradient of a tensor that may be shared by rows; `rest`: error beside that of the terms."""
            if wide[name] is not None:
                shared = name not in ("x", *LIKE_X)
                exact[f"d{name}"] = self.summed(name, value) if shared else value
                error = self.slack(terms, name if shared else None)
                if rest is not None:
                    error = error + (self.summed(name, rest) if shared else rest)
                errors[f"d{name}"] = error

        put("shift", g, g_terms)
        put("scale", g * z, g_terms * z_terms, g_terms * rounding * self.weight_terms)
        s, s_terms = g * self.scale, g_terms * self.scale_terms
        put("weight", s * x_hat, s_terms * blur, s_terms * rounding)
        put("bias", s, s_terms)
        wdy, terms = s * self.weight, s_terms * self.weight_terms
        dv = rstd * (wdy - x_hat * mean(wdy * x_hat))
        terms = rstd * (terms + blur * mean(terms * blur) + mean(terms))
        if case.function == "layer_norm":
            dv = dv - rstd * mean(wdy)
        dtotal, dtotal_terms = (dv * self.f, terms * self.f_terms) if first else (dv, terms)
        if first:
            put("gate", dv * self.total * self.slope, terms * self.total.abs() * self.slope_terms)
        else:
            of_gate = dy.abs() * self.slope_terms
            put("gate", dy * m * self.slope, of_gate * m_terms, of_gate * m_rounding)
        of_total = wide["dtotal"]
        if of_total is not None and case.used != "y":
            dtotal, dtotal_terms = dtotal + of_total, dtotal_terms + of_total.abs()
        rounds = case.by_torch and case.dtypes["x"] != F64
        rest = self._rounded_on_the_way(dtotal) if rounds else torch.zeros_like(v)
        put("residual", dtotal, dtotal_terms, rest)
        gate = torch.ones_like(v) if wide["residual_gate"] is None else self.along("residual_gate")
        put("x", dtotal * gate, dtotal_terms * gate.abs(), rest * gate.abs())
        x = wide["x"]
        assert x is not None
        put("residual_gate", dtotal * x, dtotal_terms * x.abs(), rest * x.abs())
        return exact, errors

    def _rounded_on_the_way(self, dtotal: Tensor) -> Tensor:
        """Returns the error of the gradient of total, rounded to its type, as are its parts before they are added."""
        of_total, dtype = self.wide["dtotal"], self.case.total_dtype
        parts = torch.zeros_like(dtotal) if of_total is None else ulp(dtotal.abs() + 2 * of_total.abs(), dtype)
        return 2 * torch.finfo(dtype).eps * dtotal.abs() + parts

    def check_total(self, total: Tensor) -> None:
        """Asserts that total is x + residual, or residual + residual_gate · x, rounded once."""
        x, residual = self.wide["x"], self.wide["residual"]
        assert x is not None
        assert residual is not None
        added = x if self.wide["residual_gate"] is None else x * self.along("residual_gate")
        assert total.dtype == self.case.total_dtype
        computed = F64 if F64 in (self.case.dtypes["x"], self.case.dtypes["residual"], self.case.total_dtype) else F32
        terms = (added.abs() + residual.abs()) * (2 if self.wide["residual_gate"] is not None else 1)
        assert_within(total, residual + added, 2 * torch.finfo(computed).eps * terms, "total")
