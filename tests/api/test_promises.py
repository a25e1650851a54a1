"""Promises about the library's interface and its structure, read off its source and signatures."""

import ast
import inspect
import itertools
from pathlib import Path

import pytest
from torch import nn
from torch.nn import functional as F

import triton_norm

ROOT = Path(triton_norm.__file__).parent
TESTS = Path(__file__).parents[1]
FLOORS = (
    ("kernels", "tuning.memory"),
    ("tuning.limits",),
    ("tuning.configs",),
    ("tuning",),
    ("specs", "plain", "activations", "overrides", "symbolic", "captures"),
    ("plans", "reference", "shares", "checks", "checks_rows"),
    ("launch", "library", "saved"),
    ("trials",),
    ("rows", "channels"),
    ("sync",),
    ("dispatch",),
    ("resolve",),
    ("functional", "functional_groups", "functional_modulated", "distributed", "operators"),
    ("explaining",),
    ("modules", "modules_groups"),
    ("converting.calls", "converting.joining", "converting.gated", "converting.adaptive", "converting.adaptive_trial"),
    ("converting.sources", "converting.layer_lists"),
    ("converting.sequences", "converting.blocks", "converting.timm_norms", "converting.additions"),
    ("converting.hugging_face",),
    ("converting.sums",),
    ("converting.layers",),
    ("converting.fusing",),
    ("converting",),
    ("__init__",),
    ("testing", "hub"),
)
"""Modules from the ground up: data fall from modules to kernels. A module without a floor of its own is on its
package's."""

SOURCES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}
KEYWORD_ONLY, EMPTY = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty


def floor(module: str) -> int:
    floors = {name: number for number, names in enumerate(FLOORS) for name in names}
    names = itertools.accumulate(module.split("."), "{}.{}".format)
    return [floors[name] for name in names if name in floors][-1]


def imported(source: Path) -> list[str]:
    """Returns the dotted names that a source imports."""
    names = []
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_imports_upward(module):
    own = [name.removeprefix("triton_norm.") for name in imported(SOURCES[module]) if name.startswith("triton_norm.")]
    assert [name for name in own if floor(name) > floor(module)] == []


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("kernels.")])
def test_kernels_know_of_triton_alone(module):
    known = "triton.", "triton_norm.kernels.", "typing."
    assert [name for name in imported(SOURCES[module]) if not f"{name}.".startswith(known)] == []


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("kernels.")])
def test_atomics_are_on_the_counters_alone(module):
    """No sum's bits depend on who comes first."""
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("tl.atomic_"):
            assert ast.unparse(node.args[0]).split(" ")[0] == "sync_ptr"


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm"])
def test_functions_take_torchs_arguments_and_their_own_by_keyword(name):
    theirs = list(inspect.signature(getattr(F, name)).parameters.values())
    ours = list(inspect.signature(getattr(triton_norm, name)).parameters.values())
    for one, other in zip(ours, theirs, strict=False):
        assert (one.name, one.default, one.kind) == (other.name, other.default, other.kind)
    assert len(ours) > len(theirs)
    assert all(own.kind is KEYWORD_ONLY and own.default is not EMPTY for own in ours[len(theirs) :])


MODULES = [name for name in triton_norm.__all__ if name.endswith(("Norm", "Norm1d", "Norm2d", "Norm3d"))]


@pytest.mark.parametrize("name", MODULES)
def test_modules_take_torchs_arguments(name):
    theirs, ours = (dict(inspect.signature(getattr(module, name)).parameters) for module in (nn, triton_norm))
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind)


def test_what_is_public_is_documented():
    for name in triton_norm.__all__:
        assert inspect.getdoc(getattr(triton_norm, name)), name


MOST_LINES, MOST_OF_A_FUNCTION, MOST_PARAMETERS = 400, 60, 8
PUBLIC = set(triton_norm.__all__)


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("triton." in ast.unparse(decorator) for decorator in function.decorator_list)


def parameters(function: ast.FunctionDef) -> int:
    arguments = function.args
    return len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])


@pytest.mark.parametrize("module", SOURCES)
def test_files_and_functions_are_short(module):
    """Torch says how many arguments its functions take, and that autograd is given tensors one by one."""
    tree = ast.parse(SOURCES[module].read_text())
    assert len(SOURCES[module].read_text().splitlines()) <= MOST_LINES
    flat = {
        function
        for cls in ast.walk(tree)
        if isinstance(cls, ast.ClassDef) and any("autograd.Function" in ast.unparse(base) for base in cls.bases)
        for function in ast.walk(cls)
    }
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and not is_kernel(function):
            assert function.end_lineno - function.lineno < MOST_OF_A_FUNCTION, function.name
            of_layer = module == "modules" and function.name == "forward"
            if (
                function not in flat
                and not of_layer
                and not (module.startswith("functional") and function.name in PUBLIC)
            ):
                assert parameters(function) <= MOST_PARAMETERS, function.name


NO_BEGINNING = {"About", "After", "As", "At", "Before", "Behind", "Beside", "Between", "By", "For", "From", "How", "In"}
NO_BEGINNING |= {"Into", "Like", "Of", "On", "Over", "Since", "That", "Through", "To", "Under", "Until", "Via", "What"}
NO_BEGINNING |= {
    "When",
    "Where",
    "Whether",
    "Which",
    "While",
    "Who",
    "Whom",
    "Whose",
    "Why",
    "With",
    "Within",
    "Without",
}
"""Words that leave out the subject of a sentence."""

FOLDERS = ("triton_norm", "perf", "tests")
WRITTEN = [path for folder in FOLDERS for path in sorted((TESTS.parent / folder).rglob("*.py"))]


def docstrings(source: Path) -> list[str]:
    """Returns the docstrings of a file, and the strings below its constants."""
    result = []
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            lines = [line.value for line in node.body if isinstance(line, ast.Expr)]
            result += [line.value for line in lines if isinstance(line, ast.Constant) and isinstance(line.value, str)]
    return [text.strip() for text in result]


@pytest.mark.parametrize("source", WRITTEN, ids=lambda path: path.relative_to(TESTS.parent).as_posix())
def test_docstrings_begin_with_a_verb_or_their_subject(source):
    """Returns, Launches, Validates: not a preposition, nor a word that relates to nothing."""
    result = docstrings(source)
    assert [text for text in result if text.split()[0].strip(",:;.") in NO_BEGINNING] == []
    assert [text for text in result if text.startswith("The same")] == []
