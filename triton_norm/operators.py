"""Lists the operators that recorded calls consist of, under stable names."""

from triton_norm.channels import function, groups  # noqa: F401  these define them
from triton_norm.library import DEFINED
from triton_norm.rows import fusible, modulated, operator  # noqa: F401
from triton_norm.sync import operator as sync_operator  # noqa: F401

OPERATORS = tuple(
    DEFINED[name]
    for name in (
        "rows_forward",
        fusible.NAME,
        "modulated_rows_forward",
        fusible.MODULATED,
        "batch_norm_forward",
        "batch_norm_inference",
        "move_running_statistics",
        "group_norm_forward",
        "sync_batch_norm_moments",
        "sync_batch_norm_apply",
    )
)
"""These are the operators of the forwards, for a policy of selective checkpoints. A policy that saves their results
recomputes no norm, and updates no running statistics twice. Policies never see the operators of backwards."""
