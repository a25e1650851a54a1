"""The documents name files and names of the code that exist, and leave out nothing that is public."""

import inspect
import json
import re
from pathlib import Path

import pytest

import triton_norm
from triton_norm.activations import ACTIVATIONS

PACKAGE = Path(triton_norm.__file__).parent
ROOT = PACKAGE.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
SOURCES = [file for folder in ("triton_norm", "perf", "tests") for file in sorted((ROOT / folder).rglob("*.py"))]
OF_THE_CODE = pytest.mark.parametrize("name", ["architecture.md", "add-an-op.md", "glossary.md"])
MOST_README_LINES = 200


def prose(page: Path) -> str:
    """The page without its Python code."""
    return re.sub(r"^```python\n.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def code_words(text: str) -> list[str]:
    """Returns the words between backticks, outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def exists(name: str) -> bool:
    """Below the root, the package or its tests; of a test file or a kernel's the name alone is enough."""
    if any((base / name).exists() for base in (ROOT, PACKAGE)):
        return True
    return "/" not in name and any(file.name == name for file in SOURCES)


@EACH_PAGE
def test_files_that_are_named_exist(page):
    text = prose(page)
    files = re.findall(r"(?<![\w/.<…*-])[\w.][\w./-]*\.(?:py|md|toml|yaml|txt)\b", text)
    folders = [word for word in code_words(text) if re.fullmatch(r"[\w.][\w./-]*/", word)]
    linked = {name for name in files if (page.parent / name).exists()}
    assert [name for name in (*files, *folders) if name not in linked and not exists(name)] == []


@OF_THE_CODE
def test_names_of_the_code_exist(name):
    """Functions, classes, arguments and options: each is a word of some source file."""
    this = Path(__file__)
    words = {word for file in SOURCES if file != this for word in re.findall(r"\w+", file.read_text(encoding="utf-8"))}
    named = [word for word in code_words(prose(DOCS / name)) if re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", word)]
    assert len(named) > 20
    assert [word for word in named if not exists(word) and word.strip("()").split(".")[-1] not in words] == []


def test_the_map_has_every_module():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    modules = [file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py"]
    assert [file.name for file in modules if not re.search(rf"\b{file.name}\b", text)] == []


def test_all_that_is_public_is_named():
    from triton_norm import testing

    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    public = [*triton_norm.__all__, *testing.__all__]
    assert [name for name in public if not re.search(rf"\b{name}\b", text)] == []


def test_the_layers_own_arguments_and_activations_are_named():
    text = (DOCS / "layers.md").read_text(encoding="utf-8")
    functions = [value for name, value in vars(triton_norm).items() if name.endswith("_norm") and callable(value)]
    functions.remove(triton_norm.fold_batch_norm)
    arguments = {
        parameter.name
        for function in functions
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert [name for name in sorted(arguments) if f"`{name}`" not in text] == []
    for page in ("layers.md", "memory.md"):
        text = (DOCS / page).read_text(encoding="utf-8")
        assert [name for name in ACTIVATIONS if f'"{name}"' not in text] == []


def test_gpu_support_has_the_pairs_and_the_gpus_that_timed():
    text = (DOCS / "gpu-support.md").read_text(encoding="utf-8")
    pairs = re.findall(r"\b(\d+\.\d+\.\d+)/(\d+\.\d+\.\d+)\b", (ROOT / ".ci" / "pairs").read_text(encoding="utf-8"))
    assert pairs
    assert [pair for pair in pairs if f"| {' | '.join(pair)} |" not in text] == []
    for file in sorted((ROOT / "perf" / "results").glob("*.json")):
        environment = json.loads(file.read_text(encoding="utf-8"))["environment"]
        assert environment["date"].partition(" ")[0] in text, file.name
        assert f"| {environment['triton']}" in text or f"Triton {environment['triton']}" in text, file.name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < MOST_README_LINES
