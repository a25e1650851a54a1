"""Points of measurement, each an op, its pass, the element type and an input; and the least that they must move."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from perf.ops import BITS, BULK, MODULATIONS, OPS, PARAMETERS, ROW_FAMILIES, STATISTICS, Floor, Op
from perf.records import PointFields, task_name

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
LAYOUTS = ("contiguous", "channels_last")
STRIDED = "strided"
"""The layout of rows that are the first heads of wider tokens."""
MODES = ("forward", "backward")
BOTH = "forward_backward"
PASSES = (*MODES, BOTH)
MODE_TITLE = {"forward": "forward", "backward": "backward", BOTH: "forward and backward"}


def floor_of(op: str, mode: str) -> Floor:
    """Returns the floor of a pass, or of both together: their reads and writes, and the statistics between them."""
    forward, backward = OPS[op].forward, OPS[op].backward
    if mode != BOTH:
        return forward if mode == "forward" else backward
    known = {*forward.reads, *forward.writes}
    left = tuple(name for name in backward.reads if name in STATISTICS and name not in known)
    reduced = forward.reduced + backward.reduced
    return Floor(forward.reads + backward.reads, forward.writes + left + backward.writes, reduced)


@dataclass(frozen=True)
class Workload:
    """One input.

    Args:
        family: of the ops that take it.
        group: the sweep or the picture's panel that it belongs to.
        shape: (..., features) of rows, (samples, ..., features) of modulated ones, (N, C, *spatial) of others.
        source: the model or so that it comes from.
        layout: of `LAYOUTS`, or `STRIDED`.
        quick, landmark: measured in a quick run, and among the first.
        num_groups: of a GroupNorm; 32 are those of diffusion models and of most others.
        heads: of strided rows, the heads that a token has in memory, of which x is the first shape[-2].
        weights: of gated rows, the groups of features of a token, each with weights of its own.
        multiprocessors: of the GPU, or of the part of it, that bytes are counted for; 132 are an H100's.
        ops: those that are measured on it; all of the family if there are none.
    """

    family: str
    group: str
    shape: tuple[int, ...]
    source: str
    layout: str = "contiguous"
    quick: bool = False
    landmark: bool = False
    num_groups: int = 32
    heads: int = 0
    weights: int = 1
    multiprocessors: int = 132
    ops: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def features(self) -> int:
        return self.shape[-1] if self.is_of_rows else self.shape[1]

    @property
    def is_of_rows(self) -> bool:
        return self.family in ROW_FAMILIES

    @property
    def means(self) -> int:
        """Returns how many means there are: one a row, a channel, or a group or channel of a sample."""
        counts = dict.fromkeys(ROW_FAMILIES, self.elements // self.features) | {"channels": self.features}
        counts |= {"groups": self.shape[0] * self.num_groups, "instances": self.shape[0] * self.features}
        return counts[self.family]

    def is_for(self, op: str) -> bool:
        return OPS[op].family == self.family and (not self.ops or op in self.ops)


@dataclass(frozen=True)
class Point:
    """One thing to time: an op, its direction, the element type and the input."""

    op: str
    mode: str
    dtype: str
    workload: Workload

    @property
    def declared(self) -> Op:
        return OPS[self.op]

    @property
    def is_landmark(self) -> bool:
        """Returns whether it is worth the seconds that torch.compile takes, in a quick sweep too."""
        return self.workload.landmark and self.declared.compiled(self.workload, self.dtype)

    @property
    def has_total(self) -> bool:
        """Returns whether the sum with the residual is an output, too."""
        return "total" in self.declared.forward.writes

    @property
    def differentiates(self) -> bool:
        """Returns whether tensors for its backward are saved: of a forward, where the floor has them."""
        return self.mode != "forward" or "bits" in self.floor.writes

    @property
    def gradients(self) -> tuple[str, ...]:
        """Returns the names of the backward's results, in the order of the leaves; with a total, dresidual is
        dx."""
        return tuple(f"d{name}" for name in self.declared.leaves)

    @property
    def parameter_dtype(self) -> str:
        """Returns x's type, or for BatchNorm and InstanceNorm fp32 beside 16-bit activations, as under autocast."""
        return self.dtype if self.workload.family in (*ROW_FAMILIES, "groups") or self.dtype == "fp64" else "fp32"

    @property
    def statistics_dtype(self) -> str:
        return "fp64" if self.dtype == "fp64" else "fp32"

    def tensor_bytes(self, name: str) -> int:
        if name in BULK:
            return self.workload.elements * ITEMSIZE[self.dtype]
        if name in PARAMETERS:
            return self.workload.weights * self.workload.features * ITEMSIZE[self.parameter_dtype]
        if name in MODULATIONS:
            return self.workload.shape[0] * self.workload.features * ITEMSIZE[self.dtype]
        if name in BITS:
            return -(-self.workload.elements // 8)
        return self.workload.means * ITEMSIZE[self.statistics_dtype]

    @property
    def floor(self) -> Floor:
        return floor_of(self.op, self.mode)

    @property
    def floor_bytes(self) -> int:
        return sum(map(self.tensor_bytes, self.floor.reads + self.floor.writes))

    @property
    def apart_floor_bytes(self) -> int:
        """Returns the floor of two launches, one that reduces and one that applies."""
        return self.floor_bytes + sum(map(self.tensor_bytes, self.floor.reduced))

    def describe(self) -> PointFields:
        """Returns the fields of every record that identify the point."""
        workload = self.workload
        return {
            "op": self.op,
            "mode": self.mode,
            "dtype": self.dtype,
            "shape": list(workload.shape),
            "layout": workload.layout,
            "group": workload.group,
            "source": workload.source,
            "floor_bytes": self.floor_bytes,
            "apart_floor_bytes": self.apart_floor_bytes,
        }

    def __str__(self) -> str:
        return task_name(self.describe())
