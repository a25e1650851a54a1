"""Launches of rows with a gate or a modulation: their number, bytes moved and saved, and their machine code."""

from unittest import mock

import pytest
import torch

import triton_norm
from support.allocations import allocations
from support.bars import records, wanting
from support.spaces import unknown_gpu
from triton_norm import launch

pytest.importorskip("triton")

from triton_norm.testing.stub_driver import H100, as_on_gpu

pytestmark = pytest.mark.usefixtures("through_the_kernels")
OUTER = ("scale", "shift", "residual_gate")


def drawn(shape, lengths, names, device="cpu", dtype=torch.float32):
    """Returns the tensors of these names, which require gradients."""
    *_, n_cols = shape
    own = {name: (*lengths, n_cols) for name in OUTER} | {"weight": (n_cols,), "bias": (n_cols,)}
    result = {name: torch.randn(own.get(name, shape), device=device).to(dtype) for name in names}
    return {name: tensor.requires_grad_() for name, tensor in result.items()}


def called(tensors):
    """Returns y, and total if there is a residual, of layer_norm if there is a bias, else of rms_norm."""
    function = triton_norm.layer_norm if "bias" in tensors else triton_norm.rms_norm
    x, named = tensors["x"], {name: tensor for name, tensor in tensors.items() if name != "x"}
    result = function(x, x.shape[-1:], **named)
    return result if isinstance(result, tuple) else (result,)


GATED = ("x", "weight", "gate")
MODULATED = ("x", "residual", "weight", "bias", *OUTER)
BOTH = (*MODULATED, "gate")
FORWARD, BACKWARD, FINALISE = (f"modulated_{name}_kernel" for name in ("forward", "backward", "backward_finalise"))


@pytest.mark.parametrize(
    ("names", "lengths", "backward"),
    [
        (GATED, (), [BACKWARD, FINALISE]),
        (("x", "gate"), (), [BACKWARD]),
        (MODULATED, (2,), [BACKWARD, FINALISE]),
        (BOTH, (), [BACKWARD, FINALISE]),
        (("x", "scale", "shift"), (2, 3), [BACKWARD]),
        (("x", "scale", "shift"), (2, 1), [BACKWARD, FINALISE]),
    ],
    ids=str,
)
def test_one_launch_forward_and_two_backward(names, lengths, backward, guard, device):
    """The second of the backward adds sums over rows, where there are any. Each tensor of x's shape is moved once."""
    if guard is None:
        pytest.skip("the guard counts where kernels are interpreted")
    tensors = drawn((2, 3, 8), lengths, names, device)
    outputs = called(tensors)
    torch.autograd.grad(outputs, list(tensors.values()), [torch.randn_like(y) for y in outputs])
    assert [launched.kernel for launched in guard.launches] == [FORWARD, *backward]
    for launched in guard.launches[:2]:
        for name, argument in launched.arguments.items():
            whole = name.removesuffix("_ptr").lstrip("d") in ("x", "y", "residual", "total", "gate")
            if whole:
                moved = argument.bytes["load"] + argument.bytes["store"]
                assert moved == tensors["x"].numel() * 4, name


@pytest.mark.unguarded
@pytest.mark.parametrize("names", [GATED, BOTH], ids=str)
def test_another_number_of_samples_searches_and_compiles_nothing(names, tmp_path):
    searched = []

    def search(kernel, space, *arguments):
        searched.append((space.kernel, space.key))
        return space.configs[0]

    def step(n_samples, n_tokens):
        tensors = drawn((n_samples, n_tokens, 64), (n_samples,), names)
        outputs = called(tensors)
        torch.autograd.grad(outputs, list(tensors.values()), outputs)
        return len(searched)

    with unknown_gpu(tmp_path), mock.patch.object(launch, "search", search):
        before = step(2, 3)
        assert before == 3
        assert [step(*sizes) for sizes in ((3, 3), (2, 70), (5, 4))] == [before] * 3


def kept_by(function):
    """Returns the function's result, and the tensors that it keeps for a backward."""
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: stored.append(tensor) or tensor, lambda tensor: tensor
    ):
        return function(), stored


def address(tensor):
    return tensor.untyped_storage().data_ptr()


@pytest.mark.unguarded
@pytest.mark.parametrize("lengths", [(2,), (2, 3)])
@pytest.mark.parametrize(
    ("names", "saved"),
    [
        (GATED, "x weight gate"),
        (("x", "bias", "scale", "shift"), "x bias scale"),
        (("x", "bias", "scale", "shift", "gate"), "x bias scale shift gate"),
        (("x", "residual", "bias", "shift"), "total"),
        (MODULATED, "x total weight bias scale residual_gate"),
    ],
    ids=str,
)
def test_saved_tensors(names, saved, lengths, device):
    """Nothing is saved that is not an input, total, or statistics of each row."""
    tensors = drawn((2, 3, 8), lengths, names, device)
    outputs, stored = kept_by(lambda: called(tensors))
    known = tensors | ({"total": outputs[1]} if len(outputs) > 1 else {})
    places = {address(tensor): name for name, tensor in known.items()}
    assert {places[address(tensor)] for tensor in stored if address(tensor) in places} == set(saved.split())
    (statistics,) = [tensor for tensor in stored if address(tensor) not in places]
    assert statistics.untyped_storage().nbytes() == 6 * 4 * (1 + ("bias" in names))


@pytest.mark.unguarded
@pytest.mark.parametrize("by_operator", [False, True])
def test_x_is_saved_for_the_gradient_of_residual_gate_alone(by_operator, device):
    names = ("x", "residual", "residual_gate", "scale")
    tensors = drawn((2, 3, 8), (2,), names, device)

    def gradients():
        function = torch.compile(called, backend="aot_eager", fullgraph=True) if by_operator else called
        outputs, stored = kept_by(lambda: function(tensors))
        leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
        return torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs]), [*map(address, stored)]

    with triton_norm.backend("triton"):
        (dx, dresidual, _, dscale), stored = gradients()
        assert address(tensors["x"]) in stored
        tensors["residual_gate"].requires_grad_(False)
        frozen, stored = gradients()
    assert address(tensors["x"]) not in stored
    assert all(map(torch.equal, frozen, (dx, dresidual, dscale)))


@pytest.mark.unguarded
def test_without_gradients_nothing_is_saved(device):
    tensors = drawn((2, 3, 8), (2,), BOTH, device)
    with torch.no_grad():
        assert kept_by(lambda: called(tensors))[1] == []


@pytest.mark.unguarded
@pytest.mark.parametrize(
    ("names", "shape", "n_programs", "n_sums"),
    [
        (("x", "bias", "scale", "shift"), (16, 1024, 1152), 16 * 16, 2),
        (MODULATED, (16, 1024, 1152), 16 * 16, 3),
        (("x", "bias", "scale", "shift"), (256, 64, 1024), 256, 2),
        (("x", "bias", "scale", "shift"), (1, 65536, 4096), 264, 2),
        (GATED, (1, 65536, 4096), 264, 1),
    ],
    ids=str,
)
def test_sums_are_a_small_part_of_the_traffic(names, shape, n_programs, n_sums):
    """Each sum of a program is written and read once, in float32; with them a backward moves at most 1.05 times the
    bytes of the tensors of x's shape, in a 16-bit type."""
    n_samples, n_tokens, n_cols = shape
    own = {name: (n_samples, n_cols) for name in OUTER} | {"weight": (n_cols,), "bias": (n_cols,)}
    tensors = {name: torch.empty(own.get(name, shape), dtype=torch.bfloat16).requires_grad_() for name in names}
    made = {}

    def note(tensor):
        made[address(tensor)] = tensor.untyped_storage().nbytes()

    with as_on_gpu(H100, start=lambda *_: None), allocations(after=note):
        outputs = called(tensors)
        gradients = [torch.empty_like(y) for y in outputs]
        made.clear()
        result = torch.autograd.grad(outputs, list(tensors.values()), gradients)
        workspace = sum(made.values()) - sum(made.get(address(tensor), 0) for tensor in set(result))
    assert workspace == n_sums * n_programs * n_cols * 4
    like_x = [tensor for tensor in (*tensors.values(), *outputs[1:], *gradients, *result) if tensor.shape == shape]
    read_again = [tensors["residual"]] if "residual" in tensors else []  # total is read in place of the residual
    floor = (len(like_x) - len(read_again)) * n_samples * n_tokens * n_cols * 2
    assert 1 < (floor + 2 * workspace) / floor <= 1.05


RESOURCES = """
import torch, triton_norm
from perf import resources

target = resources.TARGETS[sys.argv[1]]
made_records = []
for names, shape, dtype in CALLS:
    n_samples, _, n_cols = shape
    own = dict.fromkeys(("scale", "shift", "residual_gate"), (n_samples, 6, n_cols))
    own |= {"weight": (n_cols,), "bias": (n_cols,)}
    tensors = {}
    for name in names:
        tensor = torch.empty(own.get(name, shape), dtype=getattr(torch, dtype), requires_grad=True)
        tensors[name] = tensor[:, 1] if tensor.dim() == 3 and tensor.shape != shape else tensor
    function = triton_norm.layer_norm if "bias" in names else triton_norm.rms_norm
    x, named = tensors["x"], {name: tensor for name, tensor in tensors.items() if name != "x"}
    with resources.compiling_for(target) as launches:
        y = function(x, (n_cols,), **named)
        outputs = y if isinstance(y, tuple) else (y,)
        torch.autograd.grad(outputs, list(tensors.values()), [torch.empty_like(y) for y in outputs])
        described = [launch.describe() for launch in launches]
        kernels = [launch.compile() for launch in launches]
    for one, code in zip(described, resources.inspect(kernels, target)):
        made_records.append({**one, **code, "call": f"{names} {shape} {dtype}", "status": "ok", "message": ""})
"""
WIDE = {"gate": 128, "dgate": 128} | dict.fromkeys(OUTER, 64)
"""Bits of the narrowest access, by argument."""


@pytest.mark.long
@pytest.mark.unguarded
def test_machine_code():
    """No kernel spills, and each access to x, y, gate and their like moves 16 bytes: heads of 128, a DiT's rows of 1152
    with chunks of six modulations, and the longest rows of 16 and of 32 bits. Modulations, which several rows find in
    cache, are read by at least 8 bytes.
    """
    calls = [
        (GATED, (64, 64, 128), "bfloat16"),
        (GATED, (4, 512, 4096), "bfloat16"),
        (("x", "bias", "scale", "shift"), (4, 1024, 1152), "bfloat16"),
        (("x", "bias", "scale", "shift"), (4, 256, 8192), "float32"),
        (MODULATED, (4, 1024, 3072), "bfloat16"),
        (MODULATED, (4, 256, 8192), "bfloat16"),
    ]
    compiled = records(f"CALLS = {calls}{RESOURCES}", "sm_90")
    assert [record["kernel"] for record in compiled] == [FORWARD, BACKWARD, FINALISE] * len(calls)
    wrong = {}
    for record in compiled:
        if record["kernel"] == FINALISE:
            continue
        result = wanting(record, 128)
        for name, narrowest in WIDE.items():
            widths = {int(width) for kind in record["accesses"].get(name, {}).values() for width in kind}
            result += [f"{name} of {sorted(widths)} bits"] if min(widths, default=128) < narrowest else []
        wrong[f"{record['call']}, {record['kernel']}"] = result
    assert not any(wrong.values()), "\n".join(
        f"{name}: {', '.join(result)}" for name, result in wrong.items() if result
    )
    touched = {(name, kind) for record in compiled for name, access in record["accesses"].items() for kind in access}
    assert {("gate", "load"), ("scale", "load"), ("dgate", "store"), ("dresidual", "store")} < touched
