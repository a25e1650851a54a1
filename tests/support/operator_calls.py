"""Calls of every operator, for tests that all operators have to pass."""

import torch

from triton_norm.rows.fusible import MODULATED
from triton_norm.rows.fusible import NAME as FUSIBLE


def of_modulated_rows(device: str) -> dict[str, tuple]:
    """Calls of the operators of rows with a gate or a modulation, by name."""
    x, weight = torch.randn(3, 4, 6, device=device), torch.randn(6, device=device)
    scale, shift = torch.randn(2, 3, 6, device=device).unbind()
    heads, statistics = torch.randn(4, 6, device=device), torch.rand(24, device=device)
    layer_norm = 6, 1e-5, 0.0, True, None, None, None, "silu", False, torch.bfloat16, 1.0, False
    rms_norm = 6, 1e-5, 1.0, False, torch.half, torch.float64, None, "sigmoid", True, None, 1.0, False
    per_head = 6, 1e-5, 0.0, False, None, None, torch.half, None, False, None, 0.5, True
    every, f64 = (x.dtype,) * 8, torch.float64
    of_heads = x.dtype, None, None, None, None, x.dtype, None, None
    gated = x, None, weight, None, x + 1, None, None, None
    modulated = x, x.half(), weight, weight, x + 1, scale, shift, scale + 1
    backward = x, x, x, x + 1, weight, weight, x + 1, scale, shift, scale + 1
    ops = torch.ops.triton_norm
    fusible = getattr(ops, MODULATED)
    return {
        "modulated_rows_forward, inference": (ops.modulated_rows_forward, (*gated, False, *layer_norm)),
        "modulated_rows_forward, training": (ops.modulated_rows_forward, (*modulated, True, *layer_norm)),
        "modulated_rows_forward, gate first": (ops.modulated_rows_forward, (*modulated, True, *rms_norm)),
        "modulated_rows_forward, heads": (
            ops.modulated_rows_forward,
            (x, None, None, None, None, heads, None, None, True, *per_head),
        ),
        "modulated_rows_forward, fusible": (fusible, (*modulated, True, *layer_norm)),
        "modulated_rows_forward, fusible, gate first": (fusible, (*modulated, True, *rms_norm)),
        "modulated_rows_backward": (
            ops.modulated_rows_backward,
            (*backward, statistics, *every, 4, 3, *layer_norm),
        ),
        "modulated_rows_backward, gate first": (
            ops.modulated_rows_backward,
            (*backward[:2], x.double(), *backward[3:], statistics[:12].double(), *every[1:], f64, 4, 3, *rms_norm),
        ),
        "modulated_rows_backward, heads": (
            ops.modulated_rows_backward,
            (x, None, x, *[None] * 4, heads, None, None, statistics[:12], *of_heads, 1, 4, *per_head),
        ),
    }


def of_rows_and_channels(device: str) -> dict[str, tuple]:
    """Calls of every operator, by name."""
    x, weight = torch.randn(3, 4, 6, device=device), torch.randn(6, device=device)
    row_statistics = torch.rand(2 * 12, device=device)
    of_rows = (x.dtype, None, weight.dtype, x.dtype)
    of_both = (torch.half, x.dtype, weight.dtype, None)
    statistics = torch.rand(3, 4, device=device)
    running = torch.rand(4, device=device), torch.rand(4, device=device)
    channel_weight = torch.randn(4, device=device)
    moved = [statistics[0].clone(), statistics[1].clone(), torch.tensor(0, device=device)]
    moments = torch.cat((torch.rand(12), torch.tensor([18.0]))).to(device)[None]
    requested = (x.dtype, None, x.dtype, None)
    of_residual = (x.dtype, torch.half, x.dtype, None)
    bits = torch.randint(256, (18,), dtype=torch.uint8, device=device)
    ops = torch.ops.triton_norm
    fusible = getattr(ops, FUSIBLE)
    last = x.mT.contiguous().mT
    return of_modulated_rows(device) | {
        "rows_forward, inference": (
            ops.rows_forward,
            (x, None, weight, None, False, 6, 1e-5, 0.0, True, torch.bfloat16, None, None),
        ),
        "rows_forward, training": (
            ops.rows_forward,
            (x, None, weight, weight, True, 6, 1e-5, 0.0, True, None, None, torch.half),
        ),
        "rows_forward, residual": (
            ops.rows_forward,
            (x.half(), x, weight, None, True, 6, 1e-5, 1.0, False, None, torch.float64, None),
        ),
        "rows_forward, fusible": (
            fusible,
            (x, None, weight, weight, True, 6, 1e-5, 0.0, True, None, None, torch.half),
        ),
        "rows_forward, fusible, residual": (
            fusible,
            (x.half(), x, weight, None, True, 6, 1e-5, 1.0, False, None, torch.float64, None),
        ),
        "rows_backward": (
            ops.rows_backward,
            (x, None, x + 1, weight, row_statistics, None, *of_rows, 6, 1e-5, 0.0, True, None, None, None),
        ),
        "rows_backward, statistics apart": (
            ops.rows_backward,
            (x, None, x + 1, weight, *row_statistics.view(2, 12), *of_rows, 6, 1e-5, 0.0, True, None, None, None),
        ),
        "rows_backward, residual": (
            ops.rows_backward,
            (x, x, x + 1, weight, row_statistics, None, *of_both, 6, 1e-5, 1.0, False, None, None, torch.half),
        ),
        "batch_norm_forward": (
            ops.batch_norm_forward,
            (x, None, channel_weight, None, None, True, 1e-5, None, 0.0),
        ),
        "batch_norm_forward, nothing moves": (
            ops.batch_norm_forward,
            (x, None, channel_weight, None, None, False, 1e-5, "silu", 0.0),
        ),
        "batch_norm_forward, channels last": (
            ops.batch_norm_forward,
            (last, x.half(), None, None, "last", True, 1e-5, "relu", 0.0),
        ),
        "move_running_statistics": (
            ops.move_running_statistics,
            (moments, moved[:2], moved[2:], None, 1e-5, True),
        ),
        "move_running_statistics, nothing moves": (
            ops.move_running_statistics,
            (moments, [], [], 0.1, 1e-5, False),
        ),
        "batch_norm_inference": (
            ops.batch_norm_inference,
            (last, None, channel_weight, None, *running, None, 1e-5, "silu", 0.0),
        ),
        "batch_norm_inference, residual": (
            ops.batch_norm_inference,
            (x, x + 1, channel_weight, None, *running, "flat", 1e-5, "leaky_relu", 0.1),
        ),
        "batch_norm_backward": (
            ops.batch_norm_backward,
            (x, last, None, None, channel_weight, None, statistics, None, None, *requested, None, 1e-5, None, 0.0),
        ),
        "batch_norm_backward, residual": (
            ops.batch_norm_backward,
            (x, last, last, None, channel_weight, None, None, *running, *of_residual, None, 1e-5, "silu", 0.0),
        ),
        "batch_norm_backward, bits": (
            ops.batch_norm_backward,
            (x, x, None, bits, channel_weight, None, statistics, None, None, *of_residual, "last", 1e-5, "relu", 0.0),
        ),
        "group_norm_forward": (
            ops.group_norm_forward,
            (x, None, channel_weight, None, False, 2, 1e-5, None, 0.0, None),
        ),
        "group_norm_forward, residual": (
            ops.group_norm_forward,
            (last, x.half(), channel_weight, channel_weight, True, 4, 1e-5, "silu", 0.0, torch.float64),
        ),
        "group_norm_backward": (
            ops.group_norm_backward,
            (x, last, None, channel_weight, None, torch.rand(18, device=device), *requested, 2, 1e-5, None, 0.0, None),
        ),
        "group_norm_backward, residual": (
            ops.group_norm_backward,
            (x, x, x + 1, channel_weight, None, statistics.repeat(3, 1), *of_residual, 4, 1e-5, "silu", 0.0, None),
        ),
    }


def synchronized(device: str) -> dict[str, tuple]:
    """A call of every operator, by name."""
    x, residual, dy = torch.randn(3, 3, 4, 6, device=device)
    weight = torch.randn(4, device=device)
    merged = torch.rand(13, device=device)
    last = x.mT.contiguous().mT
    applied = x, residual, weight, None, merged, "flat", 1e-5, "relu", 0.0, "0", True
    bits = torch.ops.triton_norm.sync_batch_norm_apply(*applied)[1]
    return {
        "moments": (last, True),
        "moments, by torch": (last, False),
        "apply": applied,
        "sums": (dy, x, None, bits, weight, None, merged, weight.dtype, None, "flat", "relu", 0.0, True),
        "gradient": (dy, last, None, None, weight, weight, merged, torch.rand(8), torch.half, None, "silu", 0.0, True),
    }
