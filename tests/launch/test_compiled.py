"""Compilations, searches and the types that code computes in, by Triton's real launches over a stub of CUDA."""

import pytest
import torch

from support import processes
from support.bars import records

pytestmark = pytest.mark.unguarded

OVER_A_STUB = """
import sys, tempfile
from pathlib import Path
from unittest import mock

import torch, triton
from triton_norm.testing import stub_driver

if stub_driver.missing():
    print(stub_driver.missing())
    sys.exit(77)
import triton_norm
from triton_norm.kernels import modulated, modulated_backward, modulated_finalise, rows, rows_backward
from triton_norm import launch

ROW_KERNELS = (
    rows.rows_forward_kernel,
    rows_backward.rows_backward_kernel,
    rows_backward.rows_backward_finalise_kernel,
)
KERNELS = (
    *ROW_KERNELS,
    modulated.modulated_forward_kernel,
    modulated_backward.modulated_backward_kernel,
    modulated_backward.modulated_row_sums_kernel,
    modulated_finalise.modulated_backward_finalise_kernel,
)

def compiled():
    return [kernel for jit in KERNELS for cache in jit.device_caches.values() for kernel in cache[0].values()]

def calls(n_rows, n_cols, dtype=torch.bfloat16):
    x, residual = torch.randn(2, n_rows, n_cols).to(dtype).unbind()
    weight, bias = torch.randn(2, n_cols).to(dtype).unbind()
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    torch.autograd.grad(triton_norm.layer_norm(x, (n_cols,), weight, bias), leaves, residual)
    y, total = triton_norm.rms_norm(x, (n_cols,), weight, residual=residual, weight_offset=1.0, eps=1e-6)
    torch.autograd.grad((y, total), leaves[:2], (residual, residual))
    if n_cols <= 8192:
        own = [tensor.requires_grad_() for tensor in torch.randn(4, n_rows, 1, n_cols).to(dtype).unbind()]
        gate, *modulations = own
        tokens = x.view(n_rows, 1, n_cols).expand(n_rows, 3, n_cols)
        named = dict(zip(("scale", "shift", "residual_gate"), modulations))
        y = triton_norm.layer_norm(tokens, (n_cols,), weight, bias, residual=tokens, **named)
        torch.autograd.grad(y, [x, weight, bias, *modulations], y)
        y = triton_norm.rms_norm(x[:, None], (n_cols,), weight, gate=gate, weight_offset=1.0, eps=1e-6)
        torch.autograd.grad(y, [x, weight, gate], y)

searched = []
search_for_real = launch.search

def search(kernel, space, *arguments):
    searched.append((kernel.__name__, space.key))
    return space.configs[0]

with tempfile.TemporaryDirectory() as built:
    with stub_driver.installed(Path(built)), mock.patch.object(launch, "search", search):
        exec(sys.argv[1])
"""

ANOTHER_NUMBER_OF_ROWS = """
for n_cols in (1024, 1000, 40000):
    for n_rows in (1, 16, 33):
        calls(n_rows, n_cols)
    before = len(compiled()), len(searched)
    for n_rows in (2, 3, 17, 64, 100, 1024):
        calls(n_rows, n_cols)
    assert (len(compiled()), len(searched)) == before, (n_cols, before, len(compiled()), len(searched))
    assert before[0] and before[1]
assert len(set(searched)) == len(searched), searched
"""

NO_FP64 = """
for n_cols in (1000, 40000):
    calls(4, n_cols)
    calls(4, n_cols, torch.float32)
texts = [kernel.asm["ptx"] for kernel in compiled()]
assert len(texts) > 8
wide = [text for text in texts if ".f64" in text]
assert not wide, wide[0]
calls(4, 1000, torch.float64)
assert any(".f64" in kernel.asm["ptx"] for kernel in compiled())
"""

BASES = """
import re

def widths(offset):
    seen = set(map(id, compiled()))
    x = torch.randn(8 * 1024 + 8).bfloat16()[offset:][: 8 * 1024].view(8, 1024)
    triton_norm.layer_norm(x, (1024,), torch.ones(1024).bfloat16())
    (kernel,) = [kernel for kernel in compiled() if id(kernel) not in seen]
    loads = re.findall(r"ld\\.global[\\w.:]*?(?:\\.v(\\d))?\\.b(\\d+) ", kernel.asm["ptx"])
    return min(int(count or 1) * int(bits) // 8 for count, bits in loads)

assert [widths(offset) for offset in (0, 4, 2, 1)] == [16, 8, 4, 2]
"""

FUSION = """
def contract():
    fuses = [kernel.metadata.enable_fp_fusion for kernel in compiled()]
    assert all(fuses), fuses
    return len(fuses)

calls(4, 1000)
started = contract()
assert started > 2
with (
    mock.patch.object(launch, "search", search_for_real),
    mock.patch.object(triton.testing, "do_bench", lambda call, **options: (call(), [1.0] * 3)[1]),
):
    calls(4, 200)
assert contract() >= 3 * started, "not every config was compiled"
"""

AHEAD_OF_TIME = """
from perf import resources
from perf.points import MODES, Point, Workload

rows = Workload("rows", "", (64, 1000), "")
images = Workload("channels", "", (4, 8, 4, 4), "")
made_records = [
    [name, kernel.metadata.enable_fp_fusion]
    for name in ("sm_90", "gfx942")
    for op, workload in (("layer_norm", rows), ("batch_norm", images))
    for mode in MODES
    for _, kernel in resources.compile_point(Point(op, mode, "bf16", workload), resources.TARGETS[name])
]
"""


def skip_beside_a_driver():
    if torch.cuda.is_available():
        pytest.skip("torch loads the driver of this machine's GPU, and the stub would be the second one")


def run_over_a_stub(code, **environment):
    """Runs the code where launches go to a stub of CUDA. The binaries stay in Triton's cache, for the others."""
    skip_beside_a_driver()
    done = processes.run("-c", OVER_A_STUB, code, **environment)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr


def test_another_number_of_rows_compiles_and_searches_nothing():
    pytest.importorskip("triton")
    run_over_a_stub(ANOTHER_NUMBER_OF_ROWS)


def test_scalars_never_make_a_kernel_compute_in_fp64():
    pytest.importorskip("triton")
    run_over_a_stub(NO_FP64)


def test_accesses_are_as_wide_as_a_base_allows():
    pytest.importorskip("triton")
    run_over_a_stub(BASES)


def test_products_and_sums_are_contracted_whatever_tritons_default(tmp_path):
    """Every kernel that a call or a search starts is contracted."""
    pytest.importorskip("triton")
    # Triton's cache would also have the times of an earlier search, which then compiles nothing.
    run_over_a_stub(FUSION, TRITON_DEFAULT_FP_FUSION="0", TRITON_CACHE_DIR=str(tmp_path))


def test_what_is_compiled_ahead_of_time_is_what_is_launched():
    pytest.importorskip("triton")
    compiled = records(AHEAD_OF_TIME, TRITON_DEFAULT_FP_FUSION="0")
    assert {name for name, _ in compiled} == {"sm_90", "gfx942"}
    assert all(contracted for _, contracted in compiled)
