"""The operators that calls become where they are recorded, under names that stay."""

from triton_norm.channels import function  # noqa: F401  these three define them
from triton_norm.library import DEFINED
from triton_norm.rows import fusible, operator  # noqa: F401
from triton_norm.sync import operator as sync_operator  # noqa: F401

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
