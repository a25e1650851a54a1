"""Two copies of the package in one process: the operators of each have a namespace of their own."""

import pytest

from support import processes
from triton_norm.tuning.limits import INTERPRETED

pytestmark = [pytest.mark.unguarded, pytest.mark.long]

SETUP = """
import copy, io, sys
import torch
from torch import nn
import triton_norm

def step(module, x):
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in module.parameters()), *map(torch.clone, module.buffers())]

def check(one, other):
    x = torch.randn(5, 8)
    for actual, expected in zip(step(one, x), step(other, x), strict=True):
        torch.testing.assert_close(actual, expected)
    torch._dynamo.reset()
    run = torch.compile(copy.deepcopy(one), fullgraph=True, backend="aot_eager")
    run(x.clone().requires_grad_()).sum().backward()

torch.manual_seed(0)
"""

IMPORTED_AGAIN = """
first_copy = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "triton_norm"}
import triton_norm as second
assert second is not triton_norm and second.OPERATORS[0] is not triton_norm.OPERATORS[0]
one, other = (nn.Sequential(library.BatchNorm1d(8), library.LayerNorm(8)) for library in (second, triton_norm))
for name in sys.argv[1:]:
    with triton_norm.backend(name), second.backend(name):
        check(one, other)
"""

PACKAGED = """
import warnings
warnings.simplefilter("ignore")  # of torch.package's own storages
from torch.package import PackageExporter, PackageImporter

model = nn.Sequential(nn.Linear(8, 8), triton_norm.BatchNorm1d(8), triton_norm.RMSNorm(8))
file = io.BytesIO()
with PackageExporter(file) as exporter:
    exporter.intern("triton_norm.**")
    exporter.extern("**")
    exporter.save_pickle("model", "model.pkl", model)
file.seek(0)
importer = PackageImporter(file)
loaded = importer.load_pickle("model", "model.pkl")
packaged = importer.import_module("triton_norm.modules")
assert type(loaded[1]) is packaged.BatchNorm1d and packaged.BatchNorm1d is not triton_norm.BatchNorm1d
for name in sys.argv[1:]:
    with triton_norm.backend(name), importer.import_module("triton_norm.dispatch").backend(name):
        check(loaded, model)
"""


@pytest.mark.parametrize("code", [IMPORTED_AGAIN, PACKAGED], ids=["imported again", "in a torch.package"])
def test_each_trains(code):
    """The kernels are interpreted here, where they can be, and torch's path is taken."""
    backends = ("triton", "torch") if INTERPRETED else ("torch",)
    processes.output("-c", SETUP + code, *backends, TRITON_INTERPRET="1")
