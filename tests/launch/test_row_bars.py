"""The bars for rows that need no GPU: machine code without spills and with wide accesses, and no needless bytes.

Without all that a residual adds to RMSNorm and to backward passes, to save time: `python -m perf resources --shapes
full` and `traffic --shapes full` go through every op.
"""

import pytest

from perf import findings
from perf.workloads import BAR_COLUMNS
from support.bars import moved, records, wanting

pytestmark = pytest.mark.unguarded
SOME_COLUMNS = (64, 1000, 4096, 8192, 32768, 262144)
WIDE_ELEMENTS = (*SOME_COLUMNS, 16384, 131072)  # fp32 where several programs share a row: what takes most registers

RESOURCES = """
from perf import resources, workloads

target, *ops = sys.argv[1:]
points = workloads.bars(ops, dtypes=DTYPES, columns=COLUMNS)
points += workloads.bars(("layer_norm_residual",), ("forward",), DTYPES, COLUMNS)
made_records = resources.records(points, resources.targets_of([target]), at_once=len(points))
"""

ROUNDED = """
from functools import partial

import torch
from perf import resources, workloads

rms_norm = partial(resources.OPS["rms_norm"], x_hat_dtype=torch.bfloat16, out_dtype=torch.bfloat16)
resources.OPS = {"rms_norm": rms_norm}
points = workloads.bars(("rms_norm",), dtypes=("bf16",), columns=COLUMNS)
made_records = resources.records(points, resources.targets_of(sys.argv[1:]), at_once=len(points))
"""
ROUNDED_COLUMNS = (1000, 4096, 8192, 32768)

TRAFFIC = """
from perf import traffic, workloads

dtypes, shorter = sys.argv[1:], [n for n in COLUMNS if n <= 32768]
points = workloads.bars(("layer_norm", "layer_norm_residual"), ("forward",), dtypes, COLUMNS, sliced=True)
points += workloads.bars(("layer_norm",), ("backward",), dtypes, shorter, sliced=True)
made_records = traffic.records(points)
"""


def named(record):
    where = f"{record['op']} {record['mode']} {record['dtype']} {record['shape'][-1]} columns"
    return f"{where}, {record['kernel']}" if "kernel" in record else where


@pytest.mark.long
@pytest.mark.parametrize(
    ("target", "ops", "dtypes", "columns"),
    [
        pytest.param("sm_80", ("layer_norm",), ("fp32",), SOME_COLUMNS, marks=pytest.mark.thorough),
        ("sm_90", ("layer_norm",), ("bf16",), BAR_COLUMNS),
        ("sm_90", ("layer_norm",), ("fp32",), WIDE_ELEMENTS),
        ("sm_90", ("rms_norm",), ("bf16",), SOME_COLUMNS),
        pytest.param("sm_100", ("layer_norm",), ("bf16",), SOME_COLUMNS, marks=pytest.mark.thorough),
    ],
)
def test_machine_code(target, ops, dtypes, columns):
    """Covers every row length on Hopper, and RMSNorm, whose kernels are LayerNorm's with less to hold."""
    pytest.importorskip("triton")
    compiled = records(f"DTYPES, COLUMNS = {dtypes}, {columns}{RESOURCES}", target, *ops)
    assert {record["op"] for record in compiled} == {*ops, "layer_norm_residual"}
    assert {record["shape"][-1] for record in compiled} == set(columns)
    assert {record["kernel"] for record in compiled} == {
        "rows_forward_kernel", "rows_backward_kernel", "rows_backward_finalise_kernel"
    }  # fmt: skip
    assert {(name, "load") for name in ("x", "residual", "dy")} < moved(compiled)
    assert {(name, "store") for name in ("y", "total", "dx")} < moved(compiled)
    wrong = {named(record): wanting(record, 128) for record in compiled}
    assert not any(wrong.values()), "\n".join(f"{name}: {', '.join(case)}" for name, case in wrong.items() if case)


@pytest.mark.long
def test_machine_code_with_x_hat_rounded():
    """Covers the call that Hugging Face's Llama makes."""
    pytest.importorskip("triton")
    compiled = records(f"COLUMNS = {ROUNDED_COLUMNS}{ROUNDED}", "sm_90")
    assert {record["shape"][-1] for record in compiled} == set(ROUNDED_COLUMNS)
    result = [f"{named(record)}: {', '.join(wanting(record, 128))}" for record in compiled if wanting(record, 128)]
    assert not result, "\n".join(result)


def bar(record):
    """Four programs a multiprocessor share short rows, and leave four times as many sums, read again from cache."""
    if record["mode"] == "forward":
        return 1.02
    return 1.1 if record["shape"][-1] <= 2048 else 1.05


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "columns"),
    [
        ("bf16", SOME_COLUMNS),
        pytest.param("bf16", BAR_COLUMNS, marks=pytest.mark.thorough),
        pytest.param("fp32", SOME_COLUMNS, marks=pytest.mark.thorough),
    ],
)
def test_bytes(dtype, columns):
    """Counts the bytes that slices of a GPU of 132 multiprocessors move, with the fp32 sums of dweight and dbias, and
    each weight once: the other programs find it in cache.
    """
    counted = records(f"COLUMNS = {columns}{TRAFFIC}", dtype, TRITON_INTERPRET="1")
    assert {record["shape"][-1] for record in counted} == set(columns)
    assert [f"{named(record)}: {record['message']}" for record in counted if record["status"] != "ok"] == []
    result = [
        f"{named(record)}: {findings.streamed(record):.3f} of the floor"
        for record in counted
        if not 1 <= findings.streamed(record) <= bar(record)
    ]
    assert not result, "\n".join(result)
