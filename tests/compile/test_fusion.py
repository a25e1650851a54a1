"""Inductor's code of compiled norms: no more kernels than of torch's own, and results as exact."""

import hashlib
import inspect
import io
import math
import tokenize

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import triton_norm
from perf import contenders
from support import processes
from support.inductor import generated, launches, operators, stepped
from support.oracle import ulp
from triton_norm import reference
from triton_norm.rows import fusible
from triton_norm.tuning.limits import INTERPRETED

pytestmark = [
    pytest.mark.unguarded,  # Inductor's workspaces are its own
    pytest.mark.filterwarnings("ignore"),  # of Inductor and what it imports
]


def add_layer_norm_gelu(norm, x, residual, weight, bias):
    return F.gelu(norm.layer_norm(x + residual, weight.shape, weight, bias))


def linear_rms_norm_mul(norm, x, gate, weight, projection):
    return norm.rms_norm(F.linear(x, projection), weight.shape, weight) * gate


def layer_norm_linear(norm, x, bias, weight, projection):
    """Its y is computed again in the backward, for the gradient of the projection."""
    return F.linear(norm.layer_norm(x.sin(), weight.shape, weight, bias), projection)


def norm_of_sum(norm, name, x, residual, weight, *bias):
    if norm is triton_norm:
        y, total = getattr(norm, name)(x, weight.shape, weight, *bias, residual=residual)
    else:
        total = x + residual
        y = getattr(norm, name)(total, weight.shape, weight, *bias)
    return y.sin(), total


def rms_norm_of_sum(norm, x, residual, weight, _):
    return norm_of_sum(norm, "rms_norm", x, residual, weight)


def layer_norm_of_sum(norm, x, residual, weight, bias):
    return norm_of_sum(norm, "layer_norm", x, residual, weight, bias)


def layer_norm(norm, x, _, weight, bias):
    return norm.layer_norm(x, weight.shape, weight, bias)


def rms_norm(norm, x, _, weight, __):
    return norm.rms_norm(x, weight.shape, weight)


N = 64
ROWS = {
    "add, LayerNorm, GELU": (add_layer_norm_gelu, (6, 5, N), (6, 5, N), (N,), (N,)),
    "Linear, RMSNorm, mul": (linear_rms_norm_mul, (6, 5, N), (6, 5, N), (N,), (N, N)),
    "LayerNorm, Linear": (layer_norm_linear, (6, 5, N), (N,), (N,), (N, N)),
    "RMSNorm of a sum": (rms_norm_of_sum, (6, 5, N), (6, 5, N), (N,), (N,)),
    "LayerNorm of a sum": (layer_norm_of_sum, (6, 5, N), (6, 5, N), (N,), (N,)),
    "of two axes": (add_layer_norm_gelu, (6, 4, 16), (6, 4, 16), (4, 16), (4, 16)),
}


def thoroughly(value):
    return pytest.param(value, marks=pytest.mark.thorough)


SOME_DTYPES = [thoroughly(torch.float32), torch.bfloat16]


def drawn(shapes, dtype, device):
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


def compiled(function, norm, tensors, training, **options):
    """Returns the code of the forward, and in training of the backward, and their results."""
    with generated() as codes, torch.set_grad_enabled(training):
        run = torch.compile(lambda *arguments: function(norm, *arguments), fullgraph=True, **options)
        result = stepped(run, tensors, training)
    assert len(codes) == 1 + training
    return codes, result


def assert_as_exact(actual, torchs, exact):
    """Holds every tensor to at most twice the error of torch's, and two ulps."""
    assert len(actual) == len(torchs) == len(exact)
    for ours, theirs, truth in zip(actual, torchs, exact, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        allowed = 2 * (theirs.double() - truth).abs().max() + 2 * ulp(truth, ours.dtype)
        excess = ((ours.double() - truth).abs() / allowed).nan_to_num(nan=math.inf)
        assert excess.max() <= 1.0, f"{excess.max():.3g} times what is allowed"


def assert_fused(function, tensors, training, **options):
    codes, actual = compiled(function, triton_norm, tensors, training, **options)
    torchs, expected = compiled(function, F, tensors, training, **options)
    for ours, theirs in zip(codes, torchs, strict=True):
        assert launches(ours) <= launches(theirs)
    assert not operators(codes[0])
    if training:
        assert operators(codes[1]) == {"rows_backward"}
    wide = [tensor.double() for tensor in tensors]
    with torch.set_grad_enabled(training):
        assert_as_exact(actual, expected, stepped(lambda *arguments: function(F, *arguments), wide, training))
    return codes


@pytest.mark.parametrize("dtype", SOME_DTYPES)
@pytest.mark.parametrize(
    ("case", "training"), [(case, trains) for case in ROWS for trains in (True, False) if trains or "of" in case]
)
def test_norms_of_rows_are_fused_with_their_neighbours(case, dtype, training, device):
    """But for the backward, which is the library's own, and for which nothing is copied."""
    function, *shapes = ROWS[case]
    assert_fused(function, drawn(shapes, dtype, device), training)


def of_layout(x, layout):
    """Returns the tensor with other strides."""
    if layout == "columns apart":
        return x.mT.contiguous().mT
    if layout == "channels last":
        return x.to(memory_format=torch.channels_last)
    if layout == "rows apart":
        return torch.cat((x, x), -1)[..., : x.shape[-1]]
    return x[:1].expand(x.shape)


@pytest.mark.parametrize("layout", ["columns apart", *map(thoroughly, ("channels last", "rows apart", "expanded"))])
@pytest.mark.parametrize("function", [add_layer_norm_gelu, rms_norm_of_sum])
def test_whatever_the_layout(function, layout, device):
    x, residual, *parameters = drawn([(2, 3, 4, N)] * 2 + [(N,)] * 2, torch.bfloat16, device)
    tensors = [of_layout(tensor, layout) for tensor in (x, residual)]
    assert_fused(function, tensors + parameters, True)


@pytest.mark.parametrize("function", [add_layer_norm_gelu, rms_norm_of_sum])
def test_sizes_that_change_are_compiled_once_more(function, device):
    leaves = {n: drawn([(n, 5, N)] * 2 + [(N,)] * 2, torch.float32, device) for n in (6, 3, 4)}
    counts = {}
    for norm in (triton_norm, F):
        with generated() as codes:
            run = torch.compile(lambda *arguments, norm=norm: function(norm, *arguments), fullgraph=True)
            result = {n: stepped(run, tensors, True) for n, tensors in leaves.items()}
        counts[norm] = [launches(code) for code in codes]
        if norm is triton_norm:
            assert [operators(code) for code in codes] == [set(), {"rows_backward"}] * 2
            ours = result
    assert len(counts[triton_norm]) == len(counts[F]) == 4
    assert all(mine <= torchs for mine, torchs in zip(counts[triton_norm], counts[F], strict=True))
    for n, tensors in leaves.items():
        wide = [tensor.double() for tensor in tensors]
        assert_as_exact(ours[n], result[n], stepped(lambda *arguments: function(F, *arguments), wide, True))


def test_what_a_half_s_statistics_are_of_is_what_the_backward_reads(device):
    """Rounding x + residual changes more than x_hat in rows far from zero; the backward reads it rounded."""
    x, residual, weight, bias = drawn([(6, 5, N)] * 2 + [(N,)] * 2, torch.bfloat16, device)
    x = x + 1000.0
    setting = "emulate_precision_casts_on_saved_tensors"
    known = {setting: False} if hasattr(torch._inductor.config, setting) else {}  # without which it stays unrounded
    with torch._inductor.config.patch(known):
        codes, actual = compiled(add_layer_norm_gelu, triton_norm, [x, residual, weight, bias], True)
    assert "bitcast=True" in codes[0]
    rounded = [x + residual, torch.zeros_like(x), weight, bias]
    torchs = stepped(lambda *arguments: add_layer_norm_gelu(F, *arguments), rounded, True)
    exact = stepped(
        lambda *arguments: add_layer_norm_gelu(F, *arguments), [tensor.double() for tensor in rounded], True
    )
    assert_as_exact(actual, torchs, exact)


@pytest.mark.parametrize("dtype", SOME_DTYPES)
@pytest.mark.parametrize("function", [layer_norm, rms_norm, layer_norm_of_sum])
def test_what_is_generated_is_as_exact_as_of_torchs(function, dtype, device):
    """Rows around zero, and rows whose mean is a thousand times their deviation."""
    x, residual, *parameters = drawn([(8, N)] * 2 + [(N,)] * 2, dtype, device)
    far = x + 1e3, torch.zeros_like(x)  # whose sum is not rounded
    calls = [[x, residual, *parameters], [*far, *parameters]]
    results = {}
    for norm in (triton_norm, F):
        torch._dynamo.reset()
        with torch._inductor.config.patch(force_disable_caches=True):
            run = torch.compile(lambda *arguments, norm=norm: function(norm, *arguments), fullgraph=True)
            results[norm] = [stepped(run, tensors, True) for tensors in calls]
    torch._dynamo.reset()
    for tensors, ours, torchs in zip(calls, results[triton_norm], results[F], strict=True):
        exact = stepped(lambda *arguments: function(F, *arguments), [tensor.double() for tensor in tensors], True)
        assert_as_exact(ours, torchs, exact)


class Block(nn.Module):
    """A residual block's end: relu(norm(conv(x)) + residual)."""

    def __init__(self, norm: nn.Module, is_fused: bool) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm, self.is_fused = norm, is_fused

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        z = self.convolution(x)
        if self.is_fused:
            return self.norm(z, residual=residual, activation="relu")
        return F.relu(self.norm(z) + residual)


BLOCKS = {
    "torch": lambda: Block(nn.BatchNorm2d(8), False),
    "unfused": lambda: Block(triton_norm.BatchNorm2d(8), False),
    "fused": lambda: Block(triton_norm.BatchNorm2d(8), True),
}
TYPES = {"float32": (None, None), "halves": (torch.bfloat16, None), "all halves": (torch.bfloat16, torch.bfloat16)}
"""The types of the input, and of the norm's parameters and statistics."""


def block(kind, types, training, device):
    torch.manual_seed(0)
    made = BLOCKS[kind]().to(device).train(training)
    for module, dtype in zip((made.convolution, made.norm), TYPES[types], strict=True):
        module.to(dtype)
    nn.init.normal_(made.norm.weight)
    nn.init.normal_(made.norm.bias)
    return made


def images(types, channels_last, device):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    dtype = TYPES[types][0] or torch.float32
    return [torch.randn(shape).to(device, dtype, memory_format=layout) for shape in ((4, 3, 6, 6), (4, 8, 6, 6))]


def trained(model, run, tensors, differentiated):
    """Outputs, gradients if `differentiated`, and statistics after a step of `run`: the model, or made of it."""
    leaves = [tensor.detach().requires_grad_(differentiated) for tensor in tensors]
    y = run(*leaves)
    result = [y.detach()]
    if differentiated:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        result += torch.autograd.grad(y, [*leaves, *model.parameters()], dy)
    return result + [buffer.clone() for buffer in model.buffers() if buffer.is_floating_point()]


@pytest.mark.parametrize(
    ("types", "training", "differentiated"),
    [
        *((types, *modes) for types in TYPES for modes in ((True, True), (False, False))),
        ("halves", True, False),
        ("halves", False, True),
    ],
)
@pytest.mark.parametrize("channels_last", [False, thoroughly(True)])
def test_batch_norm_is_fused_with_its_neighbours(types, channels_last, training, differentiated, device):
    tensors = images(types, channels_last, device)
    counts, results = {}, {}
    for kind in BLOCKS:
        model = block(kind, types, training, device)
        with generated() as codes, torch.set_grad_enabled(differentiated):
            results[kind] = trained(model, torch.compile(model, fullgraph=True), tensors, differentiated)
        assert not any(operators(code) for code in codes)
        counts[kind] = [launches(code) for code in codes]
        assert len(codes) == 1 + differentiated
    exact_model = block("torch", types, training, device).double()
    with torch.set_grad_enabled(differentiated):
        exact = trained(exact_model, exact_model, [tensor.double() for tensor in tensors], differentiated)
    for kind in ("unfused", "fused"):
        assert_as_exact(results[kind], results["torch"], exact)
        assert all(ours <= torchs for ours, torchs in zip(counts[kind], counts["torch"], strict=True)), counts


@pytest.mark.parametrize("training", [True, False])
def test_backend_triton_keeps_the_operators(training, device):
    """Their neighbours are then kernels of their own, which are counted."""
    function, *shapes = ROWS["add, LayerNorm, GELU"]
    leaves = drawn(shapes, torch.float32, device)
    with triton_norm.backend("triton"):
        codes, _ = compiled(function, triton_norm, leaves, training)
    assert [operators(code) for code in codes] == [{"rows_forward"}, {"rows_backward"}][: len(codes)]
    assert launches(codes[0]) == 2
    model = block("fused", "float32", training, device)
    with triton_norm.backend("triton"), generated() as codes:
        trained(model, torch.compile(model, fullgraph=True), images("float32", False, device), True)
    forward = {"batch_norm_forward", "move_running_statistics"} if training else {"batch_norm_inference"}
    assert [operators(code) for code in codes] == [forward, {"batch_norm_backward"}]


@pytest.mark.parametrize(("policy", "called"), [("", set()), (", kernels forced", {"rows_forward"})])
def test_perf_times_both(policy, called, device):
    """Also where another contender's scope asks for the kernels alone."""
    (contender,) = (result for result in contenders.CONTENDERS if result.name == f"triton_norm, compiled{policy}")
    x, weight = drawn([(6, N), (N,)], torch.float32, device)
    with triton_norm.backend("triton"), generated() as codes:
        contender.load()["rms_norm"](x, (N,), weight, 1e-6)
    contenders._at_this_point.clear()
    assert [operators(code) for code in codes] == [called]


def code_of(function) -> list[str]:
    """The function's tokens but for its docstring and comments. ast writes the same otherwise in each Python."""
    result = []
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(function)).readline):
        is_docstring = token.type == tokenize.STRING and result[-1] == "INDENT"
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            result.append(tokenize.tok_name[token.type])
        elif token.string.strip() and token.type != tokenize.COMMENT and not is_docstring:
            result.append(token.string)
    return result


DIGESTS = {3: "c98de5aec783a0e5"}
"""Digests of `decomposed` and of all that it calls here, by version."""

MODULATED_DIGESTS = {2: "17f48279294e1f2a"}
"""Digests of `decomposed_modulated`, likewise."""

OF_BOTH = (
    *(fusible._axes, fusible._stored),
    *(reference.add, reference._total, reference.rounded, reference.affine, reference.compute_dtype),
)
OF_MODULATED = (
    *(fusible.decomposed_modulated, reference.add_gated, reference.modulate),
    *(reference._modulation, reference.outer_shape, reference.normalize, reference.root, reference.statistics),
)


@pytest.mark.parametrize(
    ("version", "digests", "parts"),
    [
        ("VERSION", DIGESTS, (fusible.decomposed, *OF_BOTH)),
        ("MODULATED_VERSION", MODULATED_DIGESTS, (*OF_MODULATED, *OF_BOTH)),
    ],
)
def test_a_change_of_what_inductor_is_given_is_a_version_of_its_own(version, digests, parts):
    digest = hashlib.sha256(" ".join(token for part in parts for token in code_of(part)).encode()).hexdigest()[:16]
    assert digests.get(getattr(fusible, version)) == digest, (
        "What Inductor takes the operator apart into has changed, and torch's caches on disk know it by its name. "
        f"Count fusible.{version} up, and add the new version to its digests with {digest!r}."
    )


ANEW = """
import sys, warnings
sys.path.insert(0, "tests")
warnings.simplefilter("ignore")
import torch

device = "cuda" if torch.cuda.is_available() else "cpu"

def fused(namespace="triton_norm"):
    import triton_norm
    from support.inductor import generated
    with generated() as codes:
        x = torch.randn(6, 64, device=device, requires_grad=True)
        torch.compile(lambda x: triton_norm.rms_norm(x.sin(), (64,)).cos(), fullgraph=True)(x).sum().backward()
    forward, backward = codes
    assert "torch.ops.triton_norm" not in forward
    assert f"torch.ops.{namespace}.rows_backward.default(" in backward
"""

TABLES = {
    "filled before": """
torch.compile(lambda x: x.sin() + 1)(torch.randn(3, device=device))
assert "triton_norm" not in sys.modules
fused()
""",
    "filled before, random as in eager": """
torch._inductor.config.fallback_random = True
torch.compile(lambda x: torch.nn.functional.dropout(x.sin()))(torch.randn(3, device=device))
assert "triton_norm" not in sys.modules
fused()
""",
    "copied by another thread meanwhile": """
fused()
from torch._inductor import decomposition
from triton_norm.rows.fusible import NAME
from triton_norm.library import DEFINED
del decomposition.fast_random_decomps()[DEFINED[NAME]]
fused()
""",
    "of a module that is imported twice": """
fused()
for name in [name for name in sys.modules if name.partition(".")[0] in ("triton_norm", "support")]:
    del sys.modules[name]
fused("triton_norm_2")
""",
    "of a module that is reloaded": """
fused()
import importlib
from torch._inductor import decomposition
from triton_norm.rows import fusible
from triton_norm.tuning.limits import INTERPRETED
from triton_norm.library import DEFINED
importlib.reload(fusible)
fused()
assert decomposition.fast_random_decomps()[DEFINED[fusible.NAME]] is fusible.decomposed
""",
}


@pytest.mark.parametrize(
    "table", ["filled before", *(thoroughly(table) for table in TABLES if table != "filled before")]
)
def test_inductor_knows_the_operator(table):
    """Whatever its table of decompositions, of which it keeps a copy, was filled by before."""
    interpreted = {"TRITON_INTERPRET": "1"} if INTERPRETED else {}
    processes.output("-c", ANEW + TABLES[table], **interpreted)
