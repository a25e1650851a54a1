"""Every listed gated norm of Hugging Face's transformers, of the version installed, against its own forward."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import triton_norm as tn
from support.layers import class_at
from triton_norm.converting import hugging_face
from triton_norm.converting.gated import FALCON_H1, GATED, KIMI, MAMBA_2, QWEN_3_NEXT

pytest.importorskip("transformers")
FAMILIES = {
    "qwen3_next.Qwen3NextRMSNormGated": QWEN_3_NEXT,
    "kimi_linear.KimiLinearRMSNormGated": KIMI,
    "mamba2.MambaRMSNormGated": MAMBA_2,
    "falcon_h1.FalconH1RMSNormGated": FALCON_H1,
}
COLUMNS = 48
FORMS = [
    ("qwen3_next.Qwen3NextRMSNormGated", {}),
    ("kimi_linear.KimiLinearRMSNormGated", {}),
    ("mamba2.MambaRMSNormGated", {"group_size": COLUMNS}),
    ("mamba2.MambaRMSNormGated", {"group_size": 16}),
    *(
        ("falcon_h1.FalconH1RMSNormGated", {"n_groups": n_groups, "norm_before_gate": before})
        for n_groups in (1, 3)
        for before in (True, False)
    ),
]
HALF, SINGLE = torch.bfloat16, torch.float32
TYPES = [(HALF, HALF), (HALF, SINGLE), (SINGLE, SINGLE), (torch.float16, torch.float16)]


def made(path: str, options: dict[str, object], dtype: torch.dtype = SINGLE, device: str = "cpu") -> nn.Module:
    cls = class_at(path)
    if cls is None:
        pytest.skip("transformers has no such class")
    module = cls(COLUMNS, **options)
    nn.init.normal_(module.weight)
    return module.to(device, dtype)


def converted(module: nn.Module) -> nn.Module:
    other = copy.deepcopy(module)
    assert list(tn.convert(other).converted) == [""]
    return other


def drawn(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x, a gate that is half of a wider projection, and dy."""
    x, dy = (3 * torch.randn(2, 2, 7, COLUMNS, device=device)).to(dtype)
    gate = torch.randn(2, 7, 2 * COLUMNS, device=device).to(dtype)[..., COLUMNS:]
    return x, gate, dy


@pytest.mark.parametrize("path", GATED)
def test_every_class_computes_what_the_list_says(path):
    options = {MAMBA_2: {"group_size": 16}, FALCON_H1: {"n_groups": 3}}.get(GATED[path], {})
    assert hugging_face.mismatch(made(path, options)) is None


@pytest.mark.parametrize(("path", "options"), FORMS)
def test_another_arithmetic_is_noticed(path, options, monkeypatch):
    module = made(path, options)
    gating = GATED[path]
    others = [
        gating._replace(x_hat=None if gating.x_hat else "input"),
        gating._replace(y="promoted" if gating.y == "input" else "input"),
        gating._replace(gate_first=not (gating.gate_first or not options.get("norm_before_gate", True))),
    ]
    if gating.product:
        others.append(gating._replace(product=None))
    for other in others:
        monkeypatch.setattr(hugging_face.counterpart(type(module)), "gating", other)
        assert hugging_face.mismatch(module) is not None, other


@pytest.mark.parametrize(("x_dtype", "dtype"), TYPES)
@pytest.mark.parametrize(("path", "options"), FORMS)
def test_the_kernels_compute_the_same(path, options, x_dtype, dtype, device, guard):
    theirs = made(path, options, dtype, device)
    ours = converted(theirs)
    x, gate, dy = drawn(x_dtype, device)
    result = []
    for module, backend in ((ours, "triton"), (theirs, "torch")):
        leaves = x.clone().requires_grad_(), gate.detach().requires_grad_()
        with tn.backend(backend):
            y = module(*leaves)
        result.append((y, *torch.autograd.grad(y, [*leaves, module.weight], dy.to(y.dtype))))
    (y, *grads), (expected, *expected_grads) = result
    assert y.dtype == expected.dtype
    if y.dtype != SINGLE:
        assert (y == expected).double().mean() > 0.98
    assert guard is None or len(guard.launches) == 3
    # In torch a gradient is rounded to each type on its way, and each row's dweight before they are summed.
    coarse = max(torch.finfo(t).eps for t in (x_dtype, dtype))
    torch.testing.assert_close(y, expected, rtol=8 * coarse, atol=8 * torch.finfo(SINGLE).eps)
    for actual, exact in zip(grads, expected_grads, strict=True):
        assert actual.dtype == exact.dtype
        torch.testing.assert_close(actual, exact, rtol=8 * coarse, atol=8 * coarse * exact.abs().max().item())


@pytest.mark.parametrize(("path", "options"), FORMS)
def test_other_calls_go_to_its_own_forward(path, options, device):
    theirs = made(path, options, device=device)
    ours = converted(theirs)
    x, gate, _ = drawn(SINGLE, device)
    explained = tn.explain(ours, x, gate)
    assert (explained.backend, explained.copies) == ("triton", ())
    with tn.backend("triton"):
        assert torch.equal(ours(hidden_states=x, gate=gate), ours(x, gate))
    for arguments in ((x.double(), gate), (x, gate[:1, :1])):
        assert tn.explain(ours, *arguments).backend == "torch"
        with tn.backend("triton"), pytest.raises(RuntimeError, match="own forward computes something else"):
            ours(*arguments)
    assert torch.equal(ours(x.double(), gate), theirs(x.double(), gate))
    with tn.backend("torch"):
        assert torch.equal(ours(x, gate), theirs(x, gate))
    for wrong in ((), (x, gate, gate)):
        with pytest.raises(TypeError) as expected:
            theirs(*wrong)
        with pytest.raises(TypeError) as result:
            ours(*wrong)
        assert str(result.value) == str(expected.value)


def test_copies_pickles_and_reverts():
    theirs = made("mamba2.MambaRMSNormGated", {"group_size": 16})
    ours = converted(theirs)
    x, gate, _ = drawn(SINGLE, "cpu")
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is type(ours)
        assert torch.equal(other(x, gate), ours(x, gate))
        assert tn.revert(other) == ("",)
        assert type(other) is type(theirs)


def test_a_fused_kernel_that_takes_the_weight_is_reported():
    """The norm is converted, for all calls but those of mamba_ssm's kernel."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(
        hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16, state_size=8, n_groups=1, vocab_size=10
    )
    report = tn.convert(transformers.Mamba2Model(config))
    assert "layers.0.mixer.norm" in report.converted
    (reason,) = report.skipped.values()
    assert reason == "Mamba2Mixer calls mamba_ssm's fused scan, in training, with its norm's weight, as a function"
