"""The operators that calls become where they are recorded, under names that stay."""

from triton_norm.ops import channels, fusible, rows, synchronized  # noqa: F401  they define them
from triton_norm.ops.library import DEFINED

OPERATORS = tuple(
    DEFINED[name]
    for name in (
        "rows_forward",
        fusible.NAME,
        "batch_norm_forward",
        "batch_norm_inference",
        "move_running_statistics",
        "sync_batch_norm_moments",
        "sync_batch_norm_apply",
    )
)
"""The operators of forwards, for a policy of selective checkpoints: one that saves these computes no norm again, and
moves no running statistics twice. The operators of backwards are not among them: a policy never sees one."""
