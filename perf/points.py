"""Points of measurement, each an op, its pass, the element type and an input; and the least that they must move."""

from dataclasses import dataclass
from math import prod

from perf.records import PointFields

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
LAYOUTS = ("contiguous", "channels_last")
MODES = ("forward", "backward")
BOTH = "forward_backward"
PASSES = (*MODES, BOTH)
MODE_TITLE = {"forward": "forward", "backward": "backward", BOTH: "forward and backward"}
BULK = ("x", "residual", "y", "total", "dy", "dtotal", "dx", "dresidual")
BITS = ("bits",)
"""One bit an element: the side of 0 that an activation was taken on."""
PARAMETERS = ("weight", "bias", "dweight", "dbias")
STATISTICS = ("mean", "rstd", "running_mean", "running_var")

FAMILY = {
    "layer_norm": "rows",
    "rms_norm": "rows",
    "layer_norm_residual": "rows",
    "rms_norm_residual": "rows",
    "batch_norm": "channels",
    "batch_norm_eval": "channels",
    "batch_norm_add_relu": "channels",
    "group_norm": "groups",
    "group_norm_silu": "groups",
    "instance_norm": "instances",
}
TITLE = {
    "layer_norm": "LayerNorm",
    "rms_norm": "RMSNorm",
    "layer_norm_residual": "LayerNorm + residual",
    "rms_norm_residual": "RMSNorm + residual",
    "batch_norm": "BatchNorm, training",
    "batch_norm_eval": "BatchNorm, evaluation",
    "batch_norm_add_relu": "BatchNorm + add + ReLU",
    "group_norm": "GroupNorm",
    "group_norm_silu": "GroupNorm + SiLU",
    "instance_norm": "InstanceNorm",
}
NUM_GROUPS = 32
"""Groups of every GroupNorm: those of diffusion models and of most others."""


@dataclass(frozen=True)
class Floor:
    """The tensors that must cross the memory bus once each."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def text(self) -> str:
        return f"{self.short}: {' + '.join(self.reads)} read once, {' + '.join(self.writes)} written once"

    @property
    def short(self) -> str:
        bulk = f"{sum(t in BULK for t in self.reads)}R{sum(t in BULK for t in self.writes)}W"
        return f"{bulk} + 1 bit" if set(BITS) & {*self.reads, *self.writes} else bulk


_GRADIENTS = ("dx", "dweight", "dbias")
_RUNNING = ("running_mean", "running_var")
FLOORS = {
    ("layer_norm", "forward"): Floor(("x", "weight", "bias"), ("y",)),
    ("layer_norm", "backward"): Floor(("x", "dy", "weight", "mean", "rstd"), _GRADIENTS),
    ("rms_norm", "forward"): Floor(("x", "weight"), ("y",)),
    ("rms_norm", "backward"): Floor(("x", "dy", "weight", "rstd"), ("dx", "dweight")),
    # dx is the residual's gradient too.
    ("layer_norm_residual", "forward"): Floor(("x", "residual", "weight", "bias"), ("y", "total")),
    ("layer_norm_residual", "backward"): Floor(("total", "dy", "dtotal", "weight", "mean", "rstd"), _GRADIENTS),
    ("rms_norm_residual", "forward"): Floor(("x", "residual", "weight"), ("y", "total")),
    ("rms_norm_residual", "backward"): Floor(("total", "dy", "dtotal", "weight", "rstd"), ("dx", "dweight")),
    ("batch_norm", "forward"): Floor(("x", "weight", "bias", *_RUNNING), ("y", *_RUNNING)),
    ("batch_norm", "backward"): Floor(("x", "dy", "weight", "mean", "rstd"), _GRADIENTS),
    ("batch_norm_eval", "forward"): Floor(("x", "weight", "bias", *_RUNNING), ("y",)),
    ("batch_norm_eval", "backward"): Floor(("x", "dy", "weight", *_RUNNING), _GRADIENTS),
    # Tensors for the backward are saved here, and not in the other forwards.
    ("batch_norm_add_relu", "forward"): Floor(
        ("x", "residual", "weight", "bias", *_RUNNING), ("y", "bits", "mean", "rstd", *_RUNNING)
    ),
    # The residual's gradient is the activation's, and dx is not.
    ("batch_norm_add_relu", "backward"): Floor(
        ("x", "dy", "bits", "weight", "mean", "rstd"), ("dx", "dresidual", "dweight", "dbias")
    ),
    ("group_norm", "forward"): Floor(("x", "weight", "bias"), ("y",)),
    ("group_norm", "backward"): Floor(("x", "dy", "weight", "mean", "rstd"), _GRADIENTS),
    ("group_norm_silu", "forward"): Floor(("x", "weight", "bias"), ("y",)),
    ("group_norm_silu", "backward"): Floor(("x", "dy", "weight", "bias", "mean", "rstd"), _GRADIENTS),
    ("instance_norm", "forward"): Floor(("x", "weight", "bias"), ("y",)),
    ("instance_norm", "backward"): Floor(("x", "dy", "weight", "mean", "rstd"), _GRADIENTS),
}

REDUCED = {
    ("batch_norm", "forward"): ("x",),
    ("batch_norm", "backward"): ("x", "dy"),
    ("batch_norm_add_relu", "forward"): ("x",),
    ("batch_norm_add_relu", "backward"): ("x", "dy", "bits"),
    ("group_norm", "forward"): ("x",),
    ("group_norm", "backward"): ("x", "dy"),
    ("group_norm_silu", "forward"): ("x",),
    ("group_norm_silu", "backward"): ("x", "dy"),
    ("instance_norm", "forward"): ("x",),
    ("instance_norm", "backward"): ("x", "dy"),
}
"""Tensors that have to be read from end to end before the first element can be written."""


def passes(mode: str) -> tuple[str, ...]:
    return MODES if mode == BOTH else (mode,)


def floor_of(op: str, mode: str) -> Floor:
    """Returns the floor of a pass, or of both together: their reads and writes, and the statistics between them."""
    if mode != BOTH:
        return FLOORS[op, mode]
    forward, backward = (FLOORS[op, each] for each in MODES)
    known = {*forward.reads, *forward.writes}
    left = tuple(name for name in backward.reads if name in STATISTICS and name not in known)
    return Floor(forward.reads + backward.reads, forward.writes + left + backward.writes)


@dataclass(frozen=True)
class Workload:
    """One input. Rows: (tokens, hidden). Others: (N, C, *spatial), lying in memory as `layout` says."""

    family: str
    group: str
    shape: tuple[int, ...]
    source: str
    layout: str = "contiguous"
    quick: bool = False
    landmark: bool = False

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def features(self) -> int:
        return self.shape[-1] if self.family == "rows" else self.shape[1]

    @property
    def groups(self) -> int:
        """Returns how many means there are: one a row, a channel, or a group or channel of a sample."""
        means = {"rows": self.elements // self.features, "channels": self.features}
        means |= {"groups": self.shape[0] * NUM_GROUPS, "instances": self.shape[0] * self.features}
        return means[self.family]


@dataclass(frozen=True)
class Point:
    """One thing to time: an op, its direction, the element type and the input."""

    op: str
    mode: str
    dtype: str
    workload: Workload

    @property
    def training(self) -> bool:
        return self.op != "batch_norm_eval"

    @property
    def is_landmark(self) -> bool:
        """Returns whether it is worth the seconds that torch.compile takes, in a quick sweep too."""
        compared_widely = self.op in ("layer_norm", "batch_norm") or self.dtype == "bf16"
        if self.op == "batch_norm_add_relu" and self.workload.layout == "contiguous":
            return False  # the end of a ResNet's block, which is trained channels-last where speed matters
        return self.workload.landmark and self.training and compared_widely

    @property
    def has_residual(self) -> bool:
        return "residual" in FLOORS[self.op, "forward"].reads

    @property
    def has_total(self) -> bool:
        """Returns whether the sum with the residual is an output, too."""
        return "total" in FLOORS[self.op, "forward"].writes

    @property
    def differentiates(self) -> bool:
        """Returns whether tensors for its backward are saved: of a forward, where the floor has them."""
        return self.mode != "forward" or "bits" in self.floor.writes

    @property
    def has_bias(self) -> bool:
        return not self.op.startswith("rms_norm")

    @property
    def gradients(self) -> tuple[str, ...]:
        """Returns the names of the backward's results, in the order of the leaves; with a total, dresidual is
        dx."""
        weights = ("dweight", "dbias") if self.has_bias else ("dweight",)
        return ("dx", "dresidual", *weights) if self.has_residual else ("dx", *weights)

    @property
    def parameter_dtype(self) -> str:
        """Returns x's type, or for BatchNorm and InstanceNorm fp32 beside 16-bit activations, as under autocast."""
        return self.dtype if self.workload.family in ("rows", "groups") or self.dtype == "fp64" else "fp32"

    def tensor_bytes(self, name: str) -> int:
        if name in BULK:
            return self.workload.elements * ITEMSIZE[self.dtype]
        if name in PARAMETERS:
            return self.workload.features * ITEMSIZE[self.parameter_dtype]
        if name in BITS:
            return -(-self.workload.elements // 8)
        return self.workload.groups * (8 if self.dtype == "fp64" else 4)

    @property
    def floor(self) -> Floor:
        return floor_of(self.op, self.mode)

    @property
    def floor_bytes(self) -> int:
        return sum(map(self.tensor_bytes, self.floor.reads + self.floor.writes))

    @property
    def apart_floor_bytes(self) -> int:
        """Returns the floor of two launches, one that reduces and one that applies."""
        reduced = (name for mode in passes(self.mode) for name in REDUCED.get((self.op, mode), ()))
        return self.floor_bytes + sum(map(self.tensor_bytes, reduced))

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
        shape = "x".join(map(str, self.workload.shape))
        layout = "" if self.workload.layout == "contiguous" else f" {self.workload.layout}"
        return f"{self.op} {self.mode} {self.dtype} {shape}{layout}"
