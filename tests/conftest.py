import contextlib
import os
import random
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("support")

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    assert "triton" not in sys.modules, "Triton reads TRITON_INTERPRET when it is imported, and it has been"
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

if TYPE_CHECKING:
    from support.row_norms import Norm
    from triton_norm.testing.guards import Guard

if INTERPRETED:
    # The interpreter works in one thread; under pytest-xdist torch's pools would only contend for the cores.
    torch.set_num_threads(1)

# A GPU compiles for most examples. `--hypothesis-profile=long` takes 50 times as many, and others each time.
hypothesis.settings.register_profile(
    "short",
    max_examples=100 if INTERPRETED else 10,
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # by the clock
    phases=set(hypothesis.Phase) - {hypothesis.Phase.explain},
)
short = hypothesis.settings.get_profile("short")
hypothesis.settings.register_profile("long", short, max_examples=50 * short.max_examples, derandomize=False)
hypothesis.settings.load_profile("short")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough", action="store_true", help="also what takes minutes and tells little more than others"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--thorough"):
        for item in items:
            if "thorough" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --thorough"))
    items.sort(key=lambda item: "long" not in item.keywords)  # what is begun last should not take long
    if HAS_GPU and not INTERPRETED:
        return
    reason = "the interpreter is on (TRITON_INTERPRET=1)" if HAS_GPU else "no GPU"
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Each test draws the same numbers whichever tests run before it, on whichever worker, in whichever folder."""
    seed = zlib.crc32(f"{request.path.name}::{request.node.nodeid.partition('::')[2]}".encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def guard(request: pytest.FixtureRequest) -> "Iterator[Guard | None]":
    """Records a test's launches; None if the kernels run unguarded."""
    if not INTERPRETED or request.node.get_closest_marker("unguarded"):
        yield None
        return
    from triton_norm.testing.guards import guarded

    with guarded() as guard:
        yield guard


@pytest.fixture(params=["layer_norm", "rms_norm"])
def norm(request: pytest.FixtureRequest) -> "Norm":
    """Both norms of rows, one after the other."""
    from support import row_norms

    return getattr(row_norms, request.param.upper())


@pytest.fixture
def through_the_kernels() -> Iterator[None]:
    """A call that the kernels can't serve is an error."""
    import triton_norm

    with triton_norm.backend("triton"):
        yield


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing that was compiled before is found, nor afterwards."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _no_search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches the best guesses on a GPU: searching for each of the tests' shapes would take most of their time."""
    if not INTERPRETED and not request.node.get_closest_marker("searches"):
        from triton_norm import launch, trials

        monkeypatch.setattr(launch, "search", lambda kernel, space, *arguments: space.configs[0])
        monkeypatch.setattr(trials, "fastest", lambda space, *arguments: space.configs[0])


@pytest.fixture
def numbers() -> "Iterator[Callable[..., None]]":
    """Sets numbers of `tuning.limits.Gpu` and its limits by name where the kernels are interpreted; a GPU keeps its
    own. With smaller tiles there are no more programs, each of which so has several."""
    from support.gpus import with_numbers

    with contextlib.ExitStack() as assumed:

        def use(**values: Any) -> None:
            if INTERPRETED:
                if "interpreted_tile_elements" in values:
                    values.setdefault("rows_backward_elements_per_sm", values["interpreted_tile_elements"])
                assumed.enter_context(with_numbers(**values))

        yield use


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lists the kernels that are launched, by name."""
    from triton_norm import launch

    names: list[str] = []
    call = launch.Launch.__call__

    def note(started: "launch.Launch", *arguments: Any) -> None:
        names.append(started.launcher.space.kernel)
        call(started, *arguments)

    monkeypatch.setattr(launch.Launch, "__call__", note)
    return names


@pytest.fixture
def few_programs(numbers: "Callable[..., None]") -> None:
    """Wide tiles of channels-last images: the interpreter's cost is by the program."""
    numbers(channels_last_lanes=8192)


@pytest.fixture
def unknown_gpu(tmp_path: Path) -> Iterator[Path]:
    """A GPU that nothing is known of; returns the path that its file of choices would have."""
    from support import spaces
    from triton_norm.tuning.choices import file_name

    with spaces.unknown_gpu(tmp_path):
        yield tmp_path / file_name(spaces.GPU)


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> "list[Callable[[], None]]":
    """Has each config of a search seem faster than the one before; returns the calls that are timed."""
    from triton.runtime.autotuner import Autotuner

    timed: list[Callable[[], None]] = []

    def bench(call: "Callable[[], None]", quantiles: object) -> list[float]:
        call()
        timed.append(call)
        return [1.0 / len(timed)] * 3

    monkeypatch.setattr(Autotuner, "do_bench", staticmethod(bench))
    return timed
