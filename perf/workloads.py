"""What is measured, declared as data: shapes of real models, sweeps, and the fewest bytes each op must move."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
MODES = ("forward", "backward")
BULK = ("x", "residual", "y", "total", "dy", "dtotal", "dx", "dresidual")
BITS = ("bits",)  # one an element: the side of 0 that an activation was taken on
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
}
TITLE = {
    "layer_norm": "LayerNorm",
    "rms_norm": "RMSNorm",
    "layer_norm_residual": "LayerNorm + residual",
    "rms_norm_residual": "RMSNorm + residual",
    "batch_norm": "BatchNorm, training",
    "batch_norm_eval": "BatchNorm, evaluation",
    "batch_norm_add_relu": "BatchNorm + add + ReLU",
}


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
    # What the backward needs is saved here, and not in the other forwards.
    ("batch_norm_add_relu", "forward"): Floor(
        ("x", "residual", "weight", "bias", *_RUNNING), ("y", "bits", "mean", "rstd", *_RUNNING)
    ),
    # The residual's gradient is the activation's, and dx is not.
    ("batch_norm_add_relu", "backward"): Floor(
        ("x", "dy", "bits", "weight", "mean", "rstd"), ("dx", "dresidual", "dweight", "dbias")
    ),
}

REDUCED = {
    ("batch_norm", "forward"): ("x",),
    ("batch_norm", "backward"): ("x", "dy"),
    ("batch_norm_add_relu", "forward"): ("x",),
    ("batch_norm_add_relu", "backward"): ("x", "dy", "bits"),
}
"""What has to be read from end to end before the first element can be written."""


@dataclass(frozen=True)
class Workload:
    """One input. Rows: (tokens, hidden). Channels: (N, C, *spatial), lying in memory as `layout` says."""

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
        """How many means there are: one a row, or one a channel."""
        return self.elements // self.features if self.family == "rows" else self.features


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
        """Worth the seconds that torch.compile takes, in a quick sweep too."""
        compared_widely = self.op in ("layer_norm", "batch_norm") or self.dtype == "bf16"
        if self.op == "batch_norm_add_relu" and self.workload.layout == "contiguous":
            return False  # the end of a ResNet's block, which is trained channels-last where speed matters
        return self.workload.landmark and self.training and compared_widely

    @property
    def has_residual(self) -> bool:
        return "residual" in FLOORS[self.op, "forward"].reads

    @property
    def has_total(self) -> bool:
        """Whether the sum with the residual is an output, too."""
        return "total" in FLOORS[self.op, "forward"].writes

    @property
    def differentiates(self) -> bool:
        """Whether what its backward needs is saved: of a forward, where the floor has it."""
        return self.mode == "backward" or "bits" in self.floor.writes

    @property
    def has_bias(self) -> bool:
        return not self.op.startswith("rms_norm")

    @property
    def gradients(self) -> tuple[str, ...]:
        """What its backward computes, in the order of the leaves; where there is a total, dresidual is dx."""
        weights = ("dweight", "dbias") if self.has_bias else ("dweight",)
        return ("dx", "dresidual", *weights) if self.has_residual else ("dx", *weights)

    @property
    def parameter_dtype(self) -> str:
        """BatchNorm keeps its parameters in fp32 beside 16-bit activations, as autocast does; the others follow x."""
        return self.dtype if self.workload.family == "rows" or self.dtype == "fp64" else "fp32"

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
        return FLOORS[self.op, self.mode]

    @property
    def floor_bytes(self) -> int:
        return sum(map(self.tensor_bytes, self.floor.reads + self.floor.writes))

    @property
    def apart_floor_bytes(self) -> int:
        """The floor of two launches, one that reduces and one that applies."""
        return self.floor_bytes + sum(map(self.tensor_bytes, REDUCED.get((self.op, self.mode), ())))

    @property
    def bulk_floor_bytes(self) -> int:
        return sum(self.tensor_bytes(name) for name in self.floor.reads + self.floor.writes if name in BULK)

    def describe(self) -> dict[str, object]:
        """The part of every record that says what was measured."""
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
            "bulk_floor_bytes": self.bulk_floor_bytes,
        }

    def __str__(self) -> str:
        shape = "x".join(map(str, self.workload.shape))
        layout = "" if self.workload.layout == "contiguous" else f" {self.workload.layout}"
        return f"{self.op} {self.mode} {self.dtype} {shape}{layout}"


SWEEP_ELEMENTS = 1 << 26
COLUMNS = [128 << k for k in range(12)]
QUICK_COLUMNS = (128, 512, 1024, 4096, 8192, 16384, 32768, 65536, 262144)
LANDMARK_COLUMNS = (1024, 4096, 16384, 65536)
QUICK_RESIDUAL_COLUMNS = (1024, 4096, 16384)

TOKENS_HIDDEN = 1024
TOKENS = [1 << k for k in range(0, 21, 2)]
QUICK_TOKENS = (1, 1024, 16384, 262144)

MODEL_TOKENS = 16384
MODELS = {
    768: "BERT base, GPT-2, ViT-B",
    896: "Qwen2.5 0.5B",
    1000: "divisible by 8 only",
    1023: "odd",
    1024: "BERT large, ViT-L",
    1280: "ViT-H, GPT-2 large",
    1536: "Qwen2.5 1.5B",
    1600: "GPT-2 XL",
    2560: "Phi-2",
    3072: "Llama-3.2 3B",
    3584: "Qwen2.5 7B",
    4096: "Llama-3 8B",
    5120: "Qwen2.5 14B",
    7168: "DeepSeek-V3",
    8192: "Llama-3 70B",
    12288: "GPT-3",
    16384: "Llama-3 405B",
}
QUICK_MODELS = (768, 1000, 1023, 1600, 5120, 7168)

# [channels, side of the square image]: every distinct BatchNorm of the network at 224 x 224 pixels.
RESNET50 = [
    (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28),
    (256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7),
]  # fmt: skip
MOBILENET_V2 = [
    (32, 112), (16, 112), (96, 112), (96, 56), (24, 56), (144, 56), (144, 28), (32, 28), (192, 28), (192, 14),
    (64, 14), (384, 14), (96, 14), (576, 14), (576, 7), (160, 7), (960, 7), (320, 7), (1280, 7),
]  # fmt: skip
UNET_3D = [(32, 128), (64, 64), (128, 32), (256, 16), (320, 8), (320, 4)]
MLP = [(16384, 1024), (8192, 4096), (4096, 1000), (65536, 64)]
QUICK_RESNET50 = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))
QUICK_ADD_CHANNELS = (256, 2048)

BATCH_CHANNELS, BATCH_SIDE = 256, 28
BATCHES = [1 << k for k in range(11)]
QUICK_BATCHES = (4, 32, 128, 512)
LAYOUTS = ("contiguous", "channels_last")


def _rows() -> Iterator[Workload]:
    for n in COLUMNS:
        source = f"{SWEEP_ELEMENTS >> 20}M elements"
        shape = (SWEEP_ELEMENTS // n, n)
        yield Workload("rows", "columns", shape, source, quick=n in QUICK_COLUMNS, landmark=n in LANDMARK_COLUMNS)
    for n, source in MODELS.items():
        yield Workload("rows", "models", (MODEL_TOKENS, n), source, quick=n in QUICK_MODELS)
    for tokens in TOKENS:
        quick = tokens in QUICK_TOKENS
        yield Workload("rows", "tokens", (tokens, TOKENS_HIDDEN), f"{TOKENS_HIDDEN} columns", quick=quick)


def _channels(layout: str) -> Iterator[Workload]:
    def image(batch: int, channels: int, side: int, source: str, quick: bool, landmark: bool = False) -> Workload:
        group = "batch" if source == "batch sweep" else "networks"
        return Workload("channels", group, (batch, channels, side, side), source, layout, quick, landmark)

    for batch in BATCHES:
        yield image(batch, BATCH_CHANNELS, BATCH_SIDE, "batch sweep", batch in QUICK_BATCHES, batch == 128)
    for batch in (32, 256):
        for channels, side in RESNET50:
            quick = batch == 256 and (channels, side) in QUICK_RESNET50
            yield image(batch, channels, side, "ResNet-50", quick, quick and channels == 256)
    for channels, side in MOBILENET_V2:
        yield image(64, channels, side, "MobileNetV2", quick=(channels, side) == (96, 112))
    for channels, side in UNET_3D:
        shape = (2, channels, side, side, side)
        yield Workload("channels", "networks", shape, "3-D U-Net", layout, quick=side == 64)
    if layout == "contiguous":
        for matrix in MLP:
            yield Workload("channels", "networks", matrix, "MLP", quick=matrix == MLP[0])


WORKLOADS = [*_rows(), *_channels("contiguous"), *_channels("channels_last")]


def _is_quick(op: str, workload: Workload) -> bool:
    if op.endswith("_residual"):
        return workload.landmark and workload.features in QUICK_RESIDUAL_COLUMNS
    if op == "batch_norm_add_relu":  # what a bottleneck block of ResNet-50 ends with
        return workload.quick and workload.source == "ResNet-50" and workload.features in QUICK_ADD_CHANNELS
    return workload.quick or workload.landmark


def points(
    dtypes: tuple[str, ...] = ("bf16", "fp32"), quick: bool = True, ops: tuple[str, ...] = tuple(FAMILY)
) -> list[Point]:
    """Everything to time, landmarks first, so that whatever is done when time runs out is a picture of the whole."""
    found = [
        Point(op, mode, dtype, workload)
        for workload in WORKLOADS
        for op in ops
        if FAMILY[op] == workload.family and (not quick or _is_quick(op, workload))
        for mode in MODES
        for dtype in dtypes
    ]
    return sorted(found, key=lambda point: (not point.workload.landmark, point.op == "batch_norm_eval"))


# The row lengths at which the bars for bytes and machine code hold, and the fewest rows that they are stated for.
BAR_COLUMNS = (
    64, 128, 256, 768, 1000, 1024, 2048, 4096, 5120, 7168, 8192, 12288, 16384, 32768, 65536, 131072, 262144,
)  # fmt: skip
BAR_ROWS = {"forward": 1024, "backward": 16384}
QUICK_BAR_COLUMNS = (1000, 1024, 4096, 8192, 32768, 65536)
ROW_OPS = tuple(op for op, family in FAMILY.items() if family == "rows")


def bars(
    ops: Sequence[str] = ROW_OPS,
    modes: Sequence[str] = MODES,
    dtypes: Sequence[str] = ("bf16", "fp32"),
    columns: Sequence[int] = BAR_COLUMNS,
) -> list[Point]:
    return [
        Point(op, mode, dtype, Workload("rows", "bars", (BAR_ROWS[mode], n), ""))
        for op in ops
        for dtype in dtypes
        for n in columns
        for mode in modes
    ]


CHANNEL_OPS = tuple(op for op, family in FAMILY.items() if family == "channels")
CHANNEL_BARS = tuple(
    workload
    for workload in WORKLOADS
    if workload.family == "channels" and workload.source in ("ResNet-50", "3-D U-Net", "MLP")
)


def channel_bars(
    ops: Sequence[str] = CHANNEL_OPS,
    modes: Sequence[str] = MODES,
    dtypes: Sequence[str] = ("bf16", "fp32"),
    workloads: Sequence[Workload] = CHANNEL_BARS,
) -> list[Point]:
    """Every BatchNorm of the networks that the bars for bytes, launches and machine code are stated for."""
    return [
        Point(op, mode, dtype, workload) for op in ops for dtype in dtypes for workload in workloads for mode in modes
    ]


def _rows_to_inspect(full: bool) -> list[Point]:
    if full:
        return bars()
    several = bars(("layer_norm",), dtypes=("bf16",), columns=QUICK_BAR_COLUMNS)
    several += bars(("layer_norm",), dtypes=("fp32",), columns=(4096, 16384))
    return several + bars(ROW_OPS[1:], dtypes=("bf16",), columns=(4096,))


def _channels_to_inspect(full: bool, *shapes: tuple[tuple[int, ...], str]) -> list[Point]:
    if full:
        return channel_bars()
    chosen = [workload for workload in CHANNEL_BARS if (workload.shape, workload.layout) in shapes]
    return channel_bars(dtypes=("bf16",), workloads=chosen)


def traffic_points(full: bool = False) -> list[Point]:
    """`full`: everything that bars for bytes are stated for."""
    return _rows_to_inspect(full) + _channels_to_inspect(
        full,
        ((32, 64, 112, 112), "contiguous"),
        ((256, 64, 112, 112), "contiguous"),
        ((32, 1024, 14, 14), "contiguous"),
        ((32, 2048, 7, 7), "contiguous"),
        ((16384, 1024), "contiguous"),
        ((32, 64, 112, 112), "channels_last"),
        ((32, 1024, 14, 14), "channels_last"),
        ((256, 2048, 7, 7), "channels_last"),
    )


def resource_points(full: bool = False) -> list[Point]:
    """Shapes whose launches differ. They are compiled, never run. `full`: everything that bars for machine code are
    stated for."""
    return _rows_to_inspect(full) + _channels_to_inspect(
        full,
        ((32, 256, 56, 56), "contiguous"),
        ((32, 1024, 14, 14), "contiguous"),
        ((32, 2048, 7, 7), "contiguous"),
        ((32, 256, 56, 56), "channels_last"),
    )
