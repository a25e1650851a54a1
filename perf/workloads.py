"""Declares the measured shapes as data: of real models, sweeps, and shapes from a file."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from perf.ops import FAMILY, OPS, ROW_FAMILIES, of_family
from perf.points import LAYOUTS, MODES, STRIDED, Point, Workload

SWEEP_ELEMENTS = 1 << 26
COLUMNS = [128 << k for k in range(12)]
QUICK_COLUMNS = (128, 512, 1024, 4096, 8192, 16384, 32768, 65536, 262144)
LANDMARK_COLUMNS = (1024, 4096, 16384, 65536)

TOKENS_HIDDEN = 1024
TOKENS = [1 << k for k in range(0, 21, 2)]
QUICK_TOKENS = (1, 1024, 16384, 262144)
# An x of more elements fills a GPU, in fp64 with its gradient and results.
MOST_ELEMENTS = 1 << 30

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
# [channels, side of the square image] of diffusion at 512 x 512 pixels, and of a network for style transfer.
STABLE_DIFFUSION = [(320, 64), (960, 64), (640, 32), (1920, 32), (1280, 16), (2560, 16), (1280, 8), (2560, 8)]
DECODER = [(512, 64), (512, 128), (512, 256), (256, 256), (256, 512), (128, 512)]
STYLE_TRANSFER = [(32, 256), (64, 128), (128, 64)]
QUICK_RESNET50 = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))

# Rows that are the q or k of fused projections: the op, [tokens, heads, columns], and the heads of a token in memory.
HEADS = {
    "q of Qwen3 8B": ("rms_norm", (16384, 32, 128), 48),
    "k of Qwen3 8B": ("rms_norm", (16384, 8, 128), 48),
    "q of Flux": ("rms_norm", (4608, 24, 128), 72),
    "q of ViT-B": ("layer_norm", (12608, 12, 64), 36),
    "q of ViT-22B": ("layer_norm", (16448, 48, 128), 144),
}
QUICK_HEADS = ("q of Qwen3 8B", "q of ViT-B")

# Rows with a gate. Of three extents, the features of a token are groups, each normalized by itself.
GATED = {
    "16384 tokens": (16384, 2048),
    "16384 tokens, wider": (16384, 4096),
    "Mamba2-2.7B": (16384, 5120),
    "Qwen3-Next, heads": (16384, 32, 128),
    "Nemotron-H 8B, groups": (16384, 8, 1024),
    "Zamba2 7B, groups": (16384, 2, 3584),
}
QUICK_GATED = ("16384 tokens, wider", "Qwen3-Next, heads", "Nemotron-H 8B, groups")
# Models that apply the gate in one place only: before the norm, or behind it.
GATED_OPS = {
    "Mamba2-2.7B": ("rms_norm_gate_first",),
    "Qwen3-Next, heads": ("rms_norm_gated",),
    "Nemotron-H 8B, groups": ("rms_norm_gate_first",),
    "Zamba2 7B, groups": ("rms_norm_gate_first",),
}
# Groups of a token that have weights of their own.
GATED_WEIGHTS = {"Nemotron-H 8B, groups": 8, "Zamba2 7B, groups": 2}
# [samples, tokens, features] of blocks whose LayerNorm is modulated by the time step and the prompt.
MODULATED = {
    (8, 2048, 2048): "8 samples",
    (8, 2048, 4096): "8 samples",
    (32, 256, 1152): "DiT-XL/2",
    (256, 256, 1152): "DiT-XL/2",
    (8, 4096, 1536): "Stable Diffusion 3, image",
    (8, 333, 1536): "Stable Diffusion 3, text",
    (4, 4096, 3072): "Flux, image",
    (4, 4096, 1152): "PixArt",
}
QUICK_MODULATED = ((256, 256, 1152), (8, 333, 1536), (4, 4096, 3072))

BATCH_CHANNELS, BATCH_SIDE = 256, 28
BATCHES = [1 << k for k in range(11)]
QUICK_BATCHES = (4, 32, 128, 512)


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
    for n, source in MODELS.items():
        for tokens in TOKENS:
            if n != TOKENS_HIDDEN and tokens != MODEL_TOKENS and tokens * n <= MOST_ELEMENTS:
                yield Workload("rows", "tokens", (tokens, n), source)
    for source, (op, rows, heads) in HEADS.items():
        yield Workload("rows", "heads", rows, source, STRIDED, quick=source in QUICK_HEADS, heads=heads, ops=(op,))


def _gated_and_modulated() -> Iterator[Workload]:
    for source, shape in GATED.items():
        quick, weights = source in QUICK_GATED, GATED_WEIGHTS.get(source, 1)
        ops = GATED_OPS.get(source, ())
        yield Workload(
            "gated", "layers", shape, source, quick=quick, landmark=shape == (16384, 4096), weights=weights, ops=ops
        )
    for shape, source in MODULATED.items():
        quick, landmark = shape in QUICK_MODULATED, shape == (4, 4096, 3072)
        yield Workload("modulated", "layers", shape, source, quick=quick, landmark=landmark)


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


def _samples(layout: str) -> Iterator[Workload]:
    """Yields inputs of GroupNorm and InstanceNorm."""

    def workload(family: str, shape: tuple[int, ...], source: str, quick: bool = False) -> Workload:
        return Workload(family, "networks", shape, source, layout, quick, quick)

    for channels, side in STABLE_DIFFUSION:
        yield workload("groups", (8, channels, side, side), "Stable Diffusion's UNet", quick=side == 64)
    for channels, side in DECODER:
        yield workload("groups", (1, channels, side, side), "Stable Diffusion's VAE", quick=side == 512)
    yield workload("groups", (1, 128, 20, 256, 256), "video VAE")
    for channels, side in UNET_3D:
        yield workload("instances", (2, channels, side, side, side), "nnU-Net", quick=side == 64)
    for channels, side in STYLE_TRANSFER:
        yield workload("instances", (4, channels, side, side), "style transfer", quick=side == 128)


WORKLOADS = [*_rows(), *_gated_and_modulated(), *_channels("contiguous"), *_channels("channels_last")]
WORKLOADS += [*_samples("contiguous"), *_samples("channels_last")]


def read(path: Path) -> list[Workload]:
    """Returns workloads from JSON: a list of {"shape": [...]}, each with "family", "layout" and "source", all optional.

    The families are "rows" (the last extent is normalized; a shape of two extents has it by default), "gated",
    "modulated" (samples, tokens and features), "channels", "groups" and "instances".

    Raises:
        ValueError: the file has something else.
    """
    try:
        described = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(described, list) or not described:
        raise ValueError(f"{path} does not hold a list of workloads")
    return [_described(each) for each in described]


def _described(each: Any) -> Workload:
    shape = each.get("shape") if isinstance(each, dict) else None
    shape = shape if isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape) else []
    if len(shape) < 2 or not set(each) <= {"shape", "family", "layout", "source"}:
        text = "is not a workload: it needs a shape of two extents or more, and may have a family, layout and source"
        raise ValueError(f"{json.dumps(each)} {text}")
    family = each.get("family", "rows" if len(shape) == 2 else "channels")
    layout = each.get("layout", LAYOUTS[0])
    source = str(each.get("source", "from a file"))
    if family not in FAMILY.values() or layout not in LAYOUTS:
        kinds = f"family is one of {', '.join(dict.fromkeys(FAMILY.values()))}, layout one of {', '.join(LAYOUTS)}"
        raise ValueError(f"{json.dumps(each)}: {kinds}")
    if layout != LAYOUTS[0] and (family in ROW_FAMILIES or len(shape) not in (4, 5)):
        raise ValueError(f"{json.dumps(each)}: {layout} is a layout of channels with two or three spatial extents")
    if family == "rows":
        return Workload(family, "models", (prod(shape[:-1]), shape[-1]), source)
    if family == "modulated" and len(shape) < 3:
        raise ValueError(f"{json.dumps(each)}: a modulated shape has samples, tokens and features")
    group = "layers" if family in ROW_FAMILIES else "networks"
    return Workload(family, group, tuple(shape), source, layout)


def points(
    dtypes: Sequence[str] = ("bf16", "fp32"),
    quick: bool = True,
    ops: Sequence[str] = tuple(OPS),
    modes: Sequence[str] = MODES,
    chosen: Sequence[Workload] | None = None,
) -> list[Point]:
    """Returns everything to time, landmarks first: when time runs out, a picture of the whole is done.

    Args:
        chosen: workloads, instead of the `quick` ones or all.
    """
    points_to_time = [
        Point(op, mode, dtype, workload)
        for workload in (WORKLOADS if chosen is None else chosen)
        for op in ops
        if workload.is_for(op) and (chosen is not None or not quick or OPS[op].quick(workload))
        for mode in modes
        for dtype in dtypes
    ]
    return sorted(points_to_time, key=lambda point: (not point.workload.landmark, point.declared.training is False))


# The row lengths at which the bars for bytes and machine code hold, and the fewest rows that they are stated for.
BAR_COLUMNS = (
    64, 128, 256, 768, 1000, 1024, 2048, 4096, 5120, 7168, 8192, 12288, 16384, 32768, 65536, 131072, 262144,
)  # fmt: skip
BAR_ROWS = {"forward": 1024, "backward": 16384}
QUICK_BAR_COLUMNS = (1000, 1024, 4096, 8192, 32768, 65536)
ROW_OPS, CHANNEL_OPS = of_family("rows"), of_family("channels")
SAMPLE_OPS = of_family("groups", "instances")
GATED_OR_MODULATED_OPS = of_family("gated", "modulated")
CHANNEL_BARS = tuple(
    workload
    for workload in WORKLOADS
    if workload.family == "channels" and workload.source in ("ResNet-50", "3-D U-Net", "MLP")
)
SAMPLE_BARS = tuple(workload for workload in WORKLOADS if workload.family in ("groups", "instances"))
GATED_OR_MODULATED_BARS = tuple(workload for workload in WORKLOADS if workload.family in ("gated", "modulated"))
TYPES = ("bf16", "fp32")
# Networks' layers whose kernels are always compiled.
QUICK_SHAPES = {
    ((32, 64, 112, 112), "contiguous"),
    ((32, 64, 112, 112), "channels_last"),
    ((32, 1024, 14, 14), "contiguous"),
    ((32, 1024, 14, 14), "channels_last"),
    ((32, 2048, 7, 7), "contiguous"),
    ((8, 320, 64, 64), "contiguous"),
    ((8, 320, 64, 64), "channels_last"),
    ((4, 128, 64, 64), "contiguous"),
}

SLICE = "slices"
"""The group of workloads that are parts of larger ones, to be counted on a part of a GPU."""
# A slice has this many rows, and at most this many elements.
SLICE_ROWS = {"forward": 32, "backward": 128}
SLICE_ELEMENTS = 1 << 21
# A multiprocessor has a row of this many columns alone; longer ones are shared.
COLUMNS_PER_MULTIPROCESSOR = 8192


def _part(
    family: str, shape: tuple[int, ...], whole: str, multiprocessors: int, layout: str = LAYOUTS[0], num_groups: int = 1
) -> Workload:
    source = f"part of {whole}"
    return Workload(family, SLICE, shape, source, layout, num_groups=num_groups, multiprocessors=multiprocessors)


# Parts of layers of networks, each on as large a part of an H100.
CHANNEL_SLICES = (
    _part("channels", (32, 1, 112, 112), "32×64×112×112", 2),
    _part("channels", (32, 16, 14, 14), "32×1024×14×14", 2),
    _part("channels", (32, 248, 7, 7), "32×2048×7×7", 16),
    _part("channels", (16384, 32), "16384×1024", 4),
    _part("channels", (1, 64, 112, 112), "32×64×112×112", 4, "channels_last"),
    _part("channels", (32, 64, 14, 14), "32×1024×14×14", 8, "channels_last"),
    _part("channels", (256, 32, 7, 7), "256×2048×7×7", 2, "channels_last"),
)
# Few tokens of gated layers, on a multiprocessor, and whole samples of modulated ones: programs share no two samples.
GATED_OR_MODULATED_SLICES = (
    _part("gated", (128, 2048), "16384×2048", 1),
    _part("gated", (128, 4096), "16384×4096", 1),
    _part("gated", (128, 5120), "16384×5120", 1),
    _part("gated", (512, 4, 128), "16384×32×128", 1),
    replace(_part("gated", (512, 2, 1024), "16384×8×1024", 132), weights=2),
    _part("modulated", (2, 256, 1152), "256×256×1152", 132),
    _part("modulated", (1, 333, 1536), "8×333×1536", 132),
    _part("modulated", (1, 512, 3072), "4×4096×3072", 132),
)
# The programs that share a group are as many on all of a GPU, however few groups there are: those are counted on all.
SAMPLE_SLICES = (
    _part("groups", (2, 20, 64, 64), "8×320×64×64", 132, num_groups=2),
    _part("groups", (1, 80, 64, 64), "8×320×64×64", 132, "channels_last", num_groups=8),
    _part("groups", (1, 16, 128, 128), "1×512×128×128", 132),
    _part("instances", (1, 8, 64, 64), "4×128×64×64", 2),
    _part("instances", (1, 2, 64, 64, 64), "2×64×64×64×64", 2),
)


def bars(
    ops: Sequence[str] = ROW_OPS,
    modes: Sequence[str] = MODES,
    dtypes: Sequence[str] = TYPES,
    columns: Sequence[int] = BAR_COLUMNS,
    sliced: bool = False,
) -> list[Point]:
    """Returns the rows that bars are stated for, or slices of them."""

    def workload(mode: str, n: int) -> Workload:
        if sliced:
            shape = min(SLICE_ROWS[mode], SLICE_ELEMENTS // n), n
            share = max(1, n // COLUMNS_PER_MULTIPROCESSOR)
            return Workload("rows", SLICE, shape, f"{n} columns", multiprocessors=share)
        return Workload("rows", "bars", (BAR_ROWS[mode], n), "")

    return [
        Point(op, mode, dtype, workload(mode, n)) for op in ops for dtype in dtypes for n in columns for mode in modes
    ]


def layer_bars(
    workloads: Iterable[Workload] = GATED_OR_MODULATED_BARS + CHANNEL_BARS + SAMPLE_BARS,
    ops: Sequence[str] = GATED_OR_MODULATED_OPS + CHANNEL_OPS + SAMPLE_OPS,
    modes: Sequence[str] = MODES,
    dtypes: Sequence[str] = TYPES,
) -> list[Point]:
    """Returns every norm of the networks' layers that the bars for launches and machine code are stated for."""
    workloads = list(workloads)
    return [
        Point(op, mode, dtype, each)
        for op in ops
        for dtype in dtypes
        for each in workloads
        if each.is_for(op)
        for mode in modes
    ]


def _few_rows(sliced: bool) -> list[Point]:
    several = bars(("layer_norm",), dtypes=("bf16",), columns=QUICK_BAR_COLUMNS, sliced=sliced)
    several += bars(("layer_norm",), dtypes=("fp32",), columns=(4096, 16384), sliced=sliced)
    return several + bars(ROW_OPS[1:], dtypes=("bf16",), columns=(4096,), sliced=sliced)


def resource_points(full: bool = False) -> list[Point]:
    """Returns shapes whose launches differ, or with `full` all that the bars for machine code are stated for."""
    if full:
        return bars() + layer_bars()
    chosen = [each for each in CHANNEL_BARS + SAMPLE_BARS if (each.shape, each.layout) in QUICK_SHAPES]
    chosen += [each for each in GATED_OR_MODULATED_BARS if each.quick]
    every_op = GATED_OR_MODULATED_OPS + CHANNEL_OPS + SAMPLE_OPS
    ops = [op for op in every_op if op != "group_norm"]  # whose kernels are those with SiLU
    return _few_rows(sliced=False) + layer_bars(chosen, ops, dtypes=("bf16",))


def traffic_points(full: bool = False) -> list[Point]:
    """Returns slices of the workloads that bars for bytes are stated for: a few, or all row lengths, ops and types."""
    slices = GATED_OR_MODULATED_SLICES + CHANNEL_SLICES + SAMPLE_SLICES
    if full:
        return bars(sliced=True) + layer_bars(slices)
    return _few_rows(sliced=True) + layer_bars(slices, dtypes=("bf16",))
