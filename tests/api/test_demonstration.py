"""The classic demonstration by hand, the picture that goes with it, and the README's own code and commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import triton_norm as tn
from support import processes
from triton_norm.tuning.limits import INTERPRETED

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {file: file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md"))}


def images() -> Tensor:
    torch.manual_seed(0)
    return 10 * torch.randn(2, 3, 4, 4) + 100


def tokens() -> Tensor:
    torch.manual_seed(0)
    return 10 * torch.randn(2, 5, 8) + 100


def assert_rounds_to(got: Tensor, exact: Tensor, ulps: float) -> None:
    """`got`, fp32, is within `ulps` roundings of numbers of about 1 from `exact`, fp64."""
    torch.testing.assert_close(got.double().cpu(), exact, rtol=ulps * 2**-24, atol=ulps * 2**-24)


# In (x − mean) · rstd a rounding of the mean, of about 100, is divided by the standard deviation, of about 10: it
# weighs as much as 10 roundings of the result. The sum behind the mean has a few of them.
NORMALISED = 8 * 10


@pytest.mark.parametrize("norms", [nn, tn])
def test_batch_norm_by_hand(norms: type, device: str) -> None:
    x = images()
    mean = x.double().mean((0, 2, 3), keepdim=True)
    std = (x.double() - mean).square().mean((0, 2, 3), keepdim=True).add(1e-5).sqrt()
    assert_rounds_to(norms.BatchNorm2d(3).to(device)(x.to(device)), (x.double() - mean) / std, NORMALISED)


@pytest.mark.parametrize("norms", [nn, tn])
def test_layer_norm_by_hand(norms: type, device: str) -> None:
    x = tokens()
    mean = x.double().mean(-1, keepdim=True)
    std = (x.double() - mean).square().mean(-1, keepdim=True).add(1e-5).sqrt()
    assert_rounds_to(norms.LayerNorm(8).to(device)(x.to(device)), (x.double() - mean) / std, NORMALISED)


@pytest.mark.parametrize("norms", [nn, tn])
def test_running_statistics_by_hand(norms: type, device: str) -> None:
    """One step of momentum 0.1 from mean 0, variance 1; unbiased variance of the 2·4·4 = 32 elements of a channel."""
    x, norm = images(), norms.BatchNorm2d(3).to(device)
    mean = x.double().mean((0, 2, 3))
    unbiased = (x.double() - mean.view(1, 3, 1, 1)).square().sum((0, 2, 3)) / 31
    norm(x.to(device))
    assert_rounds_to(norm.running_mean, 0.1 * mean, 8)
    assert_rounds_to(norm.running_var, 0.9 + 0.1 * unbiased, 16)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("norms", [nn, tn])
def test_evaluation_uses_the_running_statistics(norms: type, device: str) -> None:
    x, norm = images(), norms.BatchNorm2d(3).to(device)
    norm(x.to(device))
    mean, var = (t.double().cpu().view(1, 3, 1, 1) for t in (norm.running_mean, norm.running_var))
    before = {name: t.clone() for name, t in norm.state_dict().items()}
    norm.eval()
    # About (100 − 10) / 3.3, and no rounding of a mean in it.
    assert_rounds_to(norm(x.to(device)), (x.double() - mean) / (var + 1e-5).sqrt(), 8)
    assert all(torch.equal(t, before[name]) for name, t in norm.state_dict().items())


def test_layer_norm_is_the_same_in_evaluation(device: str) -> None:
    x, norm = tokens().to(device), tn.LayerNorm(8).to(device)
    assert torch.equal(norm(x), norm.eval()(x))


@pytest.mark.parametrize(
    ("norm", "shape", "reduced"),
    [
        (tn.BatchNorm2d(3), (2, 3, 4, 4), (0, 2, 3)),
        (tn.LayerNorm([3, 4, 4]), (2, 3, 4, 4), (1, 2, 3)),
        (tn.BatchNorm1d(6), (2, 6, 4), (0, 2)),
        (tn.LayerNorm(6), (2, 4, 6), (2,)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_an_element_depends_on_the_elements_that_share_its_mean(
    norm: nn.Module, shape: tuple[int, ...], reduced: tuple[int, ...], device: str
) -> None:
    """Checks the claim of the picture in docs/norms.md."""
    torch.manual_seed(0)
    x = torch.randn(shape, device=device, requires_grad=True)
    element = (1,) * len(shape)
    norm.to(device)(x)[element].backward()
    shared = torch.zeros(shape, dtype=torch.bool)
    shared[tuple(slice(None) if axis in reduced else 1 for axis in range(len(shape)))] = True
    assert torch.equal(x.grad.cpu() != 0, shared)


def code_of(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document, re.M | re.S)


@pytest.mark.parametrize("code", [code for text in (README, *DOCS.values()) for code in code_of(text)])
def test_printed_code_runs(code: str) -> None:
    """Code that turns the interpreter on runs in a process of its own, as it has to."""
    if "os.environ" not in code:
        exec(compile(code, "printed", "exec"), {"__name__": "printed"})
    elif not INTERPRETED:
        pytest.skip("the kernels run on a GPU")
    else:
        processes.output("-W", "error", "-c", code)


def test_readme_prints_the_commands_that_ci_runs() -> None:
    names = re.findall(r"\$\(printed (\w+)\)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert names == ["tests", "perf"]
    for name in names:
        (command,) = re.findall(rf"^<!-- command: {name} -->\n```sh\n([^\n]+)\n```$", README, re.M)
        assert "python3 -m venv" in command
        assert "-c .ci/constraints.txt" in command


@pytest.mark.parametrize("file", [ROOT / "README.md", *DOCS], ids=lambda file: file.name)
def test_links_point_at_files_and_headings_that_exist(file: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", file.read_text(encoding="utf-8")):
        path, _, heading = link.partition("#")
        target = (file.parent / path) if path else file
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link
