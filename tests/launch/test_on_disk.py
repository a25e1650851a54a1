"""Files that can't be used are as if they weren't there; files that are written are whole at every moment."""

import itertools
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compiled import skip_beside_a_driver

import triton_norm
from support import processes
from support.gpus import H100
from support.spaces import GPU
from triton_norm import launch
from triton_norm.tuning.channel_spaces import ChannelWork, channels
from triton_norm.tuning.choices import chosen
from triton_norm.tuning.configs import Config, Space
from triton_norm.tuning.limits import INTERPRETED
from triton_norm.tuning.row_spaces import RowWork, rows_forward

pytest.importorskip("triton")

from perf import tune
from triton_norm.testing import stub_driver

interpreted = pytest.mark.skipif(not INTERPRETED, reason="on a GPU for real")
pytestmark = pytest.mark.unguarded


def space_of_40() -> Space:
    return rows_forward(RowWork(40, ("float32",), 4, 4), H100)


def choice(**others: Any) -> dict[str, Any]:
    return {**space_of_40().configs[0].keywords, **others}


FOREIGN_CHOICES = {
    "negative warps": choice(num_warps=-4),
    "more warps than there are": choice(num_warps=10**30),
    "no power of two": choice(BLOCK_N=48),
    "too few columns": choice(BLOCK_N=32),
    "no columns": choice(BLOCK_N=0),
    "programs that would wait for ever": choice(PEERS=4096),
    "unknown keys": choice(BLOCK_K=64),
    "another kernel's": {"num_warps": 4, "T": 4, "BLOCK_K": 16},
    "registers": choice(maxnreg=1),
}
UNUSABLE = {
    "nothing": "",
    "half a file": json.dumps({"choices": {space_of_40().kernel: {space_of_40().key: choice()}}})[:-9],
    "bytes": b"\x93NUMPY\xff\xfe\0\0",
    "NaN": json.dumps({"choices": {"k": {"key": {"num_warps": float("nan")}}}}),
    "infinity": json.dumps({"choices": {"k": {"key": {"num_warps": float("inf")}}}}),
    "a list for a number": json.dumps({"choices": {"k": {"key": {"num_warps": [4]}}}}),
    "no warps": json.dumps({"choices": {"k": {"key": {"BLOCK_M": 1}}}}),
    "depth": "[" * 100_000,
    "another GPU": json.dumps({"environment": {"GPU": "NVIDIA 3"}, "choices": {}}),
    "a list": json.dumps({"choices": [1]}),
    "a list for an environment": json.dumps({"environment": [1], "choices": {}}),
}


def called(monkeypatch) -> tuple[list[str], list[str]]:
    """The kernels that were searched for, and the warnings, of calls of one type and several shapes; checks results."""
    searched: list[str] = []

    def search(kernel: Any, space: Space, *arguments: Any) -> Config:
        searched.append(space.kernel)
        return space.configs[0]

    monkeypatch.setattr(launch, "search", search)
    with warnings.catch_warnings(record=True) as warned, triton_norm.backend("triton"):
        warnings.simplefilter("always")
        for shape in ((3, 40), (2, 40), (3, 33), (3, 100)):
            x = torch.randn(shape)
            y = triton_norm.layer_norm(x, shape[1:])
            torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, shape[1:]))
    return searched, [str(warning.message) for warning in warned]


@interpreted
@pytest.mark.parametrize("name", FOREIGN_CHOICES)
def test_a_choice_that_is_none_of_its_configs_is_never_launched(name, unknown_gpu, monkeypatch):
    space = space_of_40()
    keys = {space.key: FOREIGN_CHOICES[name], space.key.replace("64", "128"): FOREIGN_CHOICES[name]}
    unknown_gpu.write_text(json.dumps({"choices": {space.kernel: keys, "unknown_kernel": keys}}))
    searched, (warning,) = called(monkeypatch)
    assert searched == [space.kernel] * 2
    assert "nvidia-unheard-of-9.json has choices that can't be launched" in warning
    assert space.kernel in warning


@interpreted
def test_a_choice_is_known_whatever_the_order_of_its_keys(unknown_gpu, monkeypatch):
    space = space_of_40()
    choices = {space.kernel: {space.key: space.configs[1].keywords, "columns 128, float32": choice(BLOCK_N=1)}}
    unknown_gpu.write_text(json.dumps({"choices": choices}, sort_keys=True))
    searched, warned = called(monkeypatch)
    assert searched == [space.kernel]
    assert len(warned) == 1
    assert chosen(space, GPU) == space.configs[1]


@interpreted
@pytest.mark.parametrize("name", UNUSABLE)
def test_a_file_that_can_not_be_used_is_as_none(name, unknown_gpu, monkeypatch):
    content = UNUSABLE[name]
    unknown_gpu.write_bytes(content if isinstance(content, bytes) else content.encode())
    searched, (warning,) = called(monkeypatch)
    assert len(searched) == 2
    assert "nvidia-unheard-of-9.json is left out" in warning


@interpreted
def test_a_folder_in_the_files_place_is_as_none(unknown_gpu, monkeypatch):
    unknown_gpu.mkdir()
    searched, (warning,) = called(monkeypatch)
    assert len(searched) == 2
    assert "is left out" in warning


def test_spaces_of_one_key_are_the_same():
    """A choice that one of them has made is among the configs of every other."""
    result: dict[tuple[str, str], tuple[Config, ...]] = {}
    for kind, lanes, widths in (("flat", 4, (1,)), ("last", 32, (32,)), ("folded", 2048, (16, 32, 64, 256, 1024))):
        for width, resident, vector in itertools.product(widths, (0, 4096), (1, 4)):
            work = ChannelWork(
                "channels_forward_kernel", "waits", kind, lanes, vector, width, ("float32",), resident, 4
            )
            space = channels(work, H100)
            assert result.setdefault((space.kernel, space.key), space.configs) == space.configs


TRITONS_CACHE = """
import errno, json, os, sys, tempfile, warnings
from pathlib import Path
from unittest import mock

import torch, triton
from triton.runtime.cache import FileCacheManager

import triton_norm
from triton_norm.testing import stub_driver
from triton_norm.kernels import rows
from triton_norm import launch
from triton_norm.tuning.choices import choose_only, chosen_so_far
from triton_norm.tuning.row_spaces import RowWork, rows_forward

search, folder = launch.search, Path(sys.argv[1])

def call():
    # The warnings of first calls, which search.
    choose_only("stub", {})
    launch._warned.clear()
    rows.rows_forward_kernel.device_caches.clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        before = launches()
        for n_rows in (3, 4, 5):
            triton_norm.layer_norm(torch.randn(n_rows, 40), (40,))
        assert launches() >= before + 3
    ((_, keys),) = chosen_so_far("stub").items()
    (keywords,) = keys.values()
    assert rows_forward(RowWork(40, ("float32",), 4, 4), stub_driver.STUB_GPU).find(keywords)
    return [str(warning.message) for warning in warned]

def full(manager, data, filename, **options):
    if filename.endswith("autotune.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    return put(manager, data, filename, **options)

put = FileCacheManager.put
launches = stub_driver.load(Path(tempfile.mkdtemp(dir=folder)))
with (
    stub_driver.served(),
    mock.patch.object(launch, "search", search),
    mock.patch.object(triton.testing, "do_bench", lambda call, **options: (call(), [1.0] * 3)[1]),
):
    assert not call()
    timings, = folder.rglob("*.autotune.json")
    content = json.loads(timings.read_text())
    content["configs_timings"] = [[{**content["configs_timings"][0][0], "num_warps": 64}, [0.1] * 3]]
    for text in ("{}", timings.read_text()[:-7], json.dumps(content)):
        timings.write_text(text)
        (warning,) = call()
        assert "Triton's cache on disk can't be used" in warning, warning
    timings.unlink()

    os.environ["TRITON_CACHE_DIR"] = str(folder / "full")
    with mock.patch.object(FileCacheManager, "put", full):
        (warning,) = call()
        assert "No space left" in warning, warning

    file = folder / "file"
    file.write_text("")
    os.environ["TRITON_CACHE_DIR"] = str(file / "cache")
    (warning,) = call()
    assert "NotADirectoryError" in warning, warning
    assert os.environ["TRITON_CACHE_DIR"] == str(file / "cache")

    os.environ["TRITON_CACHE_DIR"] = str(folder / "compiled")
    assert not call()
    for metadata in (folder / "compiled").rglob("rows_forward_kernel.json"):
        metadata.write_text(metadata.read_text()[:50])
    (warning,) = call()
    assert "JSONDecodeError" in warning, warning

    utils = triton.runtime.driver.active.utils
    load = utils.load_binary

    def load_whole(name, binary, *rest):
        if len(binary) == 50:
            raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid")
        return load(name, binary, *rest)

    os.environ["TRITON_CACHE_DIR"] = str(folder / "loaded")
    assert not call()
    for binary in (folder / "loaded").rglob("*.cubin"):
        binary.write_bytes(binary.read_bytes()[:50])
    with mock.patch.object(utils, "load_binary", load_whole):
        (warning,) = call()
    assert "image is invalid" in warning, warning
"""


def test_tritons_cache_can_not_be_used(tmp_path):
    """Full, in a folder that can't be, cut off, or with another's configs: launched all the same, with one warning."""
    skip_beside_a_driver()
    if stub_driver.missing():
        pytest.skip(stub_driver.missing())
    processes.output("-c", TRITONS_CACHE, str(tmp_path), TRITON_CACHE_DIR=str(tmp_path / "cache"))


WRITES = """
import sys
from pathlib import Path
from types import SimpleNamespace
from perf import tune
from triton_norm.tuning.configs import config

file, warps = tune.TunedFile(Path(sys.argv[1]), fresh=True), int(sys.argv[2])
choices = {("kernel", f"key {n}"): config(warps, BLOCK=n) for n in range(200)}
print("ready", flush=True)
sys.stdin.readline()
for _ in range(200):
    file.save({"environment": {"warps": warps}}, SimpleNamespace(trials=choices, choices=choices))
"""


def test_two_processes_that_write_one_tuned_file(tmp_path):
    """It is one's or the other's at every moment, and nothing else is left."""
    path = tmp_path / "gpu.json"
    with (
        processes.started("-c", WRITES, str(path), "1") as one,
        processes.started("-c", WRITES, str(path), "2") as other,
    ):
        for process in (one, other):
            assert process.stdout.readline() == "ready\n", process.stderr.read()
        for process in (one, other):
            process.stdin.write("\n")
            process.stdin.flush()
        while one.poll() is None or other.poll() is None:
            time.sleep(1e-3)
            if path.exists():
                content = json.loads(path.read_text())
                assert len(content["choices"]["kernel"]) == 200
                warps = {choice["num_warps"] for choice in content["choices"]["kernel"].values()}
                assert warps == {content["environment"]["warps"]}
        for process in (one, other):
            assert process.communicate()[1] == ""
            assert process.returncode == 0
    assert os.listdir(tmp_path) == ["gpu.json"]


def test_what_can_not_be_written_leaves_the_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    path.write_text("before")

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        tune._replace(path, {}, sort_keys=False)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["gpu.json"]
