"""torch's tools over rows with a gate or a modulation: compile, export, checkpoint, autocast, torch.func, copies."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import triton_norm
from support.every_op import MODULATED, MODULATIONS, PATHS
from support.inductor import generated, launches, operators, stepped
from triton_norm.library import DEFINED
from triton_norm.rows import fusible

EXACT = {"rtol": 1e-9, "atol": 1e-10}
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
OPS = pytest.mark.parametrize("op", MODULATED, ids=str)


class Block(nn.Module):
    """A DiT's block: its modulations are chunks of one projection, and its gated norm is Mamba's."""

    def __init__(self, width: int = 8, library=triton_norm) -> None:
        super().__init__()
        self.norm, self.gated = library.LayerNorm(width, elementwise_affine=False), library.RMSNorm(width)
        self.project, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, condition):
        shift, scale, gate = self.project(condition).chunk(3, dim=-1)
        if isinstance(self.norm, triton_norm.LayerNorm):
            h, total = self.norm(self.mix(x), residual=x, residual_gate=gate, scale=scale, shift=shift)
            return total + self.gated(h, gate=x)
        total = x + gate[:, None] * self.mix(x)
        h = self.norm(total) * (1 + scale[:, None]) + shift[:, None]
        return total + self.gated(h) * F.silu(x)


def blocks():
    theirs = Block(library=nn)
    ours = Block()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(n_samples, n_tokens=5, width=8):
    return torch.randn(n_samples, n_tokens, width), torch.randn(n_samples, width)


def trained(run, module, *batch):
    """Returns y and all gradients."""
    leaves = [tensor.clone().requires_grad_() for tensor in batch]
    module.zero_grad()
    y = run(*leaves)
    y.sin().sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves), *(p.grad.clone() for p in module.parameters())]


@PATHS
def test_a_block_trains_as_its_composition(path):
    ours, theirs = blocks()
    with triton_norm.backend(path):
        result = trained(ours, ours, *inputs_of(0))
    torch.testing.assert_close(result, trained(theirs, theirs, *inputs_of(0)), **CLOSE)


def inputs_of(seed, *sizes):
    torch.manual_seed(seed)
    return inputs(*(sizes or (3,)))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore")  # of Inductor and what it imports
@pytest.mark.unguarded  # Inductor's workspaces are its own
@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_inductor_with_changing_sizes(backend):
    """The second size makes shapes dynamic; the others compile nothing more."""
    ours, theirs = blocks()
    compiled = torch.compile(ours, fullgraph=True)
    sizes = (2, 3), (3, 4), (5, 6), (4, 2)
    with triton_norm.backend(backend):
        for place, size in enumerate(sizes):
            if place == 2:
                before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            batch = inputs_of(place, *size)
            result, expected = trained(compiled, ours, *batch), trained(theirs, theirs, *batch)
            torch.testing.assert_close(result, expected, **CLOSE)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.unguarded
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gate_first", [False, True])
def test_inductor_fuses_a_gated_norm_with_its_neighbours(gate_first, training):
    """One generated kernel computes the forward and its neighbours, unless the backend is "triton"."""

    def function(x, weight, gate):
        return triton_norm.rms_norm(x.sin(), (64,), weight, gate=gate.cos(), gate_first=gate_first) + x

    tensors = [torch.randn(16, 64), torch.randn(64), torch.randn(16, 64)]
    with generated() as codes:
        result = stepped(torch.compile(function, fullgraph=True), tensors, training)
    torch.testing.assert_close(result, stepped(function, tensors, training), **CLOSE)
    forward, *backward = codes
    assert (launches(forward), operators(forward)) == (1, set())
    assert [operators(code) for code in backward] == [{"modulated_rows_backward"}] * training


@PATHS
def test_exported_programs_have_torchs_functions(path):
    ours, theirs = blocks()
    n, t = torch.export.Dim("n", min=2), torch.export.Dim("t", min=2)
    with triton_norm.backend("auto" if path == "triton" else path):
        program = torch.export.export(ours, inputs_of(0), dynamic_shapes=({0: n, 1: t}, {0: n}))
    assert "triton_norm" not in program.module().code
    for size in ((2, 3), (7, 9)):
        batch = inputs_of(1, *size)
        torch.testing.assert_close(program.module()(*batch), theirs(*batch), **CLOSE)


@OPS
@PATHS
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, path, op, device):
    tensors = op.drawn(device)
    leaves = [tensor for tensor in tensors if tensor is not None]
    with triton_norm.backend(path):
        outputs = op.ours(*tensors)
        dys = [torch.randn_like(y) for y in outputs]
        expected = torch.autograd.grad(outputs, leaves, dys)
        again = checkpoint(op.ours, *tensors, use_reentrant=use_reentrant)
        torch.autograd.backward(again, dys)
    assert all(torch.equal(leaf.grad, gradient) for leaf, gradient in zip(leaves, expected, strict=True))


@OPS
@PATHS
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is ")  # by torch itself, for the first dual number
def test_transforms(transform, path, op, device):
    """torch.func goes to torch, whatever the backend but "triton"."""
    tensors = op.drawn(device, torch.float64)
    present = [tensor.detach() for tensor in tensors if tensor is not None]

    def of(function):
        def flat(*arguments):
            left = iter(arguments)
            outputs = function(*(None if tensor is None else next(left) for tensor in tensors))
            return sum(y.sin().sum() for y in outputs)

        if transform == "grad":
            return torch.func.grad(flat, argnums=tuple(range(len(present))))(*present)
        if transform == "vmap":
            return torch.func.vmap(flat)(*(torch.stack((tensor, tensor + 1)) for tensor in present))
        return torch.func.jvp(flat, tuple(present), tuple(torch.ones_like(tensor) for tensor in present))

    with triton_norm.backend("auto" if path == "triton" else path):
        torch.testing.assert_close(of(op.ours), of(op.theirs), **EXACT)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", ["layer_norm", "rms_norm"])
def test_autocast(function, dtype, path, device):
    """y has the type that the same norm without a gate has."""
    x, gate, scale = torch.randn(3, 2, 4, 8, device=device).to(dtype).unbind()
    norm = getattr(triton_norm, function)
    with triton_norm.backend(path), torch.autocast(device, dtype=torch.bfloat16):
        result, plain = norm(x, (8,), gate=gate, scale=scale), norm(x, (8,))
    assert result.dtype == plain.dtype
    exact = norm(x.double(), (8,), gate=gate.double(), scale=scale.double())
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if result.dtype == torch.bfloat16 else CLOSE
    torch.testing.assert_close(result.double(), exact, **tolerance)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_of_a_block(copied):
    ours, _ = blocks()
    batch = inputs_of(0)
    expected = trained(ours, ours, *batch)
    other = copied(ours)
    assert all(map(torch.equal, trained(other, other, *batch), expected))


DERIVATIVES = [
    (name, saves, gate_first, centred)
    for name in ("modulated_rows_forward", fusible.MODULATED)
    for saves in (True, False)
    for gate_first, centred in ((False, True), (True, False))
]


@pytest.mark.parametrize(("name", "saves", "gate_first", "centred"), DERIVATIVES)
def test_derivatives_of_operators(name, saves, gate_first, centred):
    """First and second derivatives, in fp64, of the operator as a recorded graph calls it."""
    shapes = {"x": (2, 3, 4), "residual": (2, 3, 4), "weight": (4,), "bias": (4,), "gate": (2, 3, 4)}
    shapes |= dict.fromkeys(MODULATIONS[1:], (2, 4))
    leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes.values()]
    spec = 4, 1e-5, 0.5, centred, None, None, None, "silu", gate_first, None, 1.0, False

    def ours(*tensors):
        return DEFINED[name](*tensors, saves, *spec)[:2]

    def theirs(x, residual, weight, bias, gate, scale, shift, residual_gate):
        total = residual + residual_gate[:, None] * x
        v = total * F.silu(gate) if gate_first else total
        norm = F.layer_norm(v, (4,)) if centred else F.rms_norm(v, (4,), eps=1e-5)
        y = (norm * (weight + 0.5) + bias) * (1 + scale[:, None]) + shift[:, None]
        return y if gate_first else y * F.silu(gate), total

    result, expected = ours(*leaves), theirs(*leaves)
    torch.testing.assert_close(result, expected, **EXACT)
    dys = [torch.randn_like(y).requires_grad_() for y in expected]
    first = [torch.autograd.grad(y, leaves, dys, create_graph=True) for y in (result, expected)]
    torch.testing.assert_close(*first, **EXACT)
    second = [
        torch.autograd.grad(
            sum(g.sin().sum() for g in gradients), [*leaves, *dys], allow_unused=True, materialize_grads=True
        )
        for gradients in first
    ]
    torch.testing.assert_close(*second, **EXACT)


@PATHS
@OPS
def test_second_derivatives_of_batches_of_samples(op, path, device):
    """gradgradcheck with every tensor."""
    tensors = op.drawn(device, torch.float64)
    present = [tensor for tensor in tensors if tensor is not None]

    def function(*arguments):
        left = iter(arguments)
        return op.ours(*(None if tensor is None else next(left) for tensor in tensors))

    with triton_norm.backend(path):
        torch.autograd.gradgradcheck(function, present, fast_mode=True)


@PATHS
@pytest.mark.parametrize("frozen", [(), ("scale",), ("gate", "shift"), ("x", "residual"), ("residual_gate",)])
def test_partly_frozen_tensors(frozen, path, device):
    """The gradients that are left have the bits that they have beside all others."""
    op = MODULATED[3]
    tensors = dict(zip(("x", "residual", "weight", "bias", *MODULATIONS), op.drawn(device), strict=True))
    result = []
    for cold in ((), frozen):
        leaves = {name: tensor.detach().requires_grad_(name not in cold) for name, tensor in tensors.items()}
        with triton_norm.backend(path):
            outputs = op.ours(*leaves.values())
        warm = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        gradients = torch.autograd.grad([y.sin().sum() for y in outputs], list(warm.values()))
        result.append(dict(zip(warm, gradients, strict=True)))
    whole, part = result
    for name, gradient in part.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_layers_take_all_by_keyword(kind, device):
    """A layer's call is the function's with its parameters."""
    layer = getattr(triton_norm, kind)(8, device=device)
    function = triton_norm.layer_norm if kind == "LayerNorm" else triton_norm.rms_norm
    x, residual, gate = torch.randn(3, 2, 5, 8, device=device).unbind()
    scale, shift, residual_gate = torch.randn(3, 2, 8, device=device).unbind()
    own = {"gate": gate, "gate_activation": "sigmoid", "product_dtype": torch.bfloat16, "scale": scale, "shift": shift}
    own |= {"residual": residual, "residual_gate": residual_gate, "weight_offset": 1.0, "out_dtype": torch.half}
    parameters = dict(layer.named_parameters())
    for result, expected in zip(layer(x, **own), function(x, (8,), eps=layer.eps, **parameters, **own), strict=True):
        assert torch.equal(result, expected)


class Taking:
    """No tensor, but with a tensor's protocol."""

    def __init__(self, tensor):
        self.tensor = tensor

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        named = {name: value.tensor if isinstance(value, cls) else value for name, value in (kwargs or {}).items()}
        return "taken", function, function(*args, **named)


@PATHS
@pytest.mark.parametrize("name", ["gate", "scale", "shift", "residual_gate", "head_weight"])
def test_each_tensor_may_take_the_call(name, path, device):
    x = torch.randn(2, 3, 8, device=device)
    own = torch.randn(3, 8, device=device) if name == "head_weight" else torch.randn(2, 8, device=device)
    tensor, others = (x if name == "gate" else own), ({"residual": x} if name == "residual_gate" else {})
    with triton_norm.backend("auto" if path == "triton" else path):
        expected = triton_norm.rms_norm(x, (8,), **{name: tensor}, **others)
        kind, function, result = triton_norm.rms_norm(x, (8,), **{name: Taking(tensor)}, **others)
        assert "Taking" in triton_norm.explain(triton_norm.rms_norm, x, (8,), **{name: Taking(tensor)}, **others).reason
    assert (kind, function) == ("taken", triton_norm.rms_norm)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
