"""Launch choices: every config is right, the search is triton.autotune's, and what it finds is kept."""

import contextlib
import json
import warnings

import pytest
import torch
from torch.nn import functional as F

import triton_norm
from oracle import batch_norm_oracle, check, run
from row_norms import LAYER_NORM
from triton_norm import tuning
from triton_norm.ops import launch

triton = pytest.importorskip("triton")

if launch.INTERPRETED:
    from triton_norm.testing.interleave import interleaved

SMS = 132
ELEMENTS = [1, 3, 8, 64, 1000, 4096, 32768, 65536, 2**20]


def spaces():
    for n_cols in ELEMENTS:
        for dtype, stored_bytes, compute_bytes in (("bfloat16", 2, 4), ("float32", 4, 4), ("float64", 8, 8)):
            for interpreted in (False, True):
                yield tuning.rows_forward(n_cols, dtype, stored_bytes, compute_bytes, SMS, interpreted)
                yield tuning.rows_backward(n_cols, dtype, stored_bytes, compute_bytes, SMS, interpreted)
    for vector in (1, 2, 4, 8):
        for kind, lanes, width in (("flat", vector, 1), ("last", 64, 64), ("folded", 2048, 64)):
            for interpreted in (False, True):
                for held in (0, 4096, 16384):
                    yield tuning.channels(
                        "channels_forward_kernel",
                        "waits",
                        kind,
                        lanes,
                        vector,
                        width,
                        "float32",
                        held,
                        4,
                        False,
                        interpreted,
                    )


def test_spaces_are_small_and_of_powers_of_two():
    for space in spaces():
        assert 1 <= len(space.configs) <= 9, space
        assert len(set(space.configs)) == len(space.configs)
        for config in space.configs:
            assert config.num_warps in (1, 2, 4, 8, 16, 32)
            for name, value in config.blocks:
                assert name in ("HOLD_WEIGHT", "STAGES") or (value >= 1 and value & (value - 1) == 0), (space, config)


def test_a_rows_programs_cover_its_columns():
    for n_cols in ELEMENTS:
        for space in (
            tuning.rows_forward(n_cols, "float32", 4, 4, SMS, False),
            tuning.rows_backward(n_cols, "float32", 4, 4, SMS, False),
        ):
            for config in space.configs:
                assert config["BLOCK_N"] * config.keywords.get("PIECES", 1) * config["PEERS"] >= n_cols


@pytest.mark.parametrize(
    ("itemsize", "extents", "width"),
    [
        (2, (1024,), 8),
        (2, (1000,), 8),
        (2, (1002,), 2),
        (4, (1000, 0), 4),
        (4, (49,), 1),
        (8, (6,), 2),
        (2, (64, 65), 1),
    ],
)
def test_vector_width(itemsize, extents, width):
    assert tuning.vector_width(itemsize, *extents) == width


GPU_CONFIGS = [
    (kernel, n_cols, config)
    for n_cols in (24, 300, 40000)
    for kernel, space in (
        ("forward", tuning.rows_forward(n_cols, "float32", 4, 4, SMS, False)),
        ("backward", tuning.rows_backward(n_cols, "float32", 4, 4, SMS, False)),
    )
    for config in space.configs
]


@pytest.mark.parametrize(("kernel", "n_cols", "config"), GPU_CONFIGS)
def test_every_config_for_rows_is_right(kernel, n_cols, config, monkeypatch, device):
    """The configs of a GPU, run wherever the tests run."""
    space = tuning.rows_forward if kernel == "forward" else tuning.rows_backward
    forced = tuning.Space(f"rows_{kernel}_kernel", "", (config,))
    tuning.forget()
    monkeypatch.setattr(tuning, space.__name__, lambda *arguments: forced)
    monkeypatch.setattr(tuning, "INTERPRETED_SMS", 6)
    launch.multiprocessors.cache_clear()
    x, weight, bias, dy = LAYER_NORM.drawn((5, n_cols), 1, torch.float32, device)
    with interleaved() if launch.INTERPRETED else contextlib.nullcontext():
        LAYER_NORM.against_oracle(x, weight, bias, dy)
    monkeypatch.undo()
    launch.multiprocessors.cache_clear()
    tuning.forget()


@pytest.mark.parametrize("held", [0, 256])
@pytest.mark.parametrize("kind", ["flat", "last", "folded"])
@pytest.mark.parametrize("index", range(3))
def test_every_config_for_channels_is_right(index, kind, held, monkeypatch, device):
    shape = (9, 8, 7) if kind == "folded" else (2, 8, 3, 40)
    x, dy = torch.randn(2, *shape, device=device)
    if kind == "last":
        x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
    lanes, vector, width = {"flat": (4, 4, 1), "last": (8, 4, 8), "folded": (512, 4, 8)}[kind]
    where = "channels_forward_kernel", "waits", kind, lanes, vector, width, "float32", held, 4, False, False
    configs = tuning.channels(*where).configs
    forced = tuning.Space("channels", "", (configs[index % len(configs)],))
    tuning.forget()
    monkeypatch.setattr(tuning, "channels", lambda *arguments: forced)
    monkeypatch.setattr(tuning, "INTERPRETED_SMS", 6)
    monkeypatch.setattr(tuning, "INTERPRETED_TILE", 256)
    monkeypatch.setattr(tuning, "MIN_HELD_ELEMENTS", 64)
    monkeypatch.setattr(tuning, "ONE_LAUNCH_BYTES", 2**62 if held else 0)
    launch.multiprocessors.cache_clear()
    weight, bias = torch.randn(2, 8, device=device)
    with interleaved() if launch.INTERPRETED else contextlib.nullcontext():
        actual = run(lambda x, w, b: triton_norm.batch_norm(x, None, None, w, b, True), x, weight, bias, dy)
    axes = (0, *range(2, x.dim()))
    check(actual, x, weight, bias, dy, axes, batch_norm_oracle(None))
    monkeypatch.undo()
    launch.multiprocessors.cache_clear()
    tuning.forget()


@pytest.fixture
def unknown_gpu(monkeypatch, tmp_path):
    """A GPU that nothing is known of, on which each config seems faster than the one before; returns the timings."""
    from triton.runtime.autotuner import Autotuner

    timed = []

    def bench(call, quantiles):
        call()
        timed.append(call)
        return [1.0 / len(timed)] * 3

    monkeypatch.setattr(Autotuner, "do_bench", staticmethod(bench))
    monkeypatch.setattr(launch, "gpu_name", lambda device: "NVIDIA Unheard-Of 9")
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    for space in ("rows_forward", "rows_backward", "channels"):
        made = getattr(tuning, space)
        monkeypatch.setattr(tuning, space, lambda *a, made=made: made(*a[:-1], False))
    tuning.measured.cache_clear()
    tuning.forget()
    yield timed
    tuning.measured.cache_clear()
    tuning.forget()


@pytest.mark.skipif(not launch.INTERPRETED, reason="on a GPU the search times for real")
def test_a_search_runs_once_for_any_number_of_rows(unknown_gpu, device):
    weight = torch.randn(40, device=device, requires_grad=True)
    for n_rows in (3, 5, 64, 1):
        triton_norm.layer_norm(torch.randn(n_rows, 40, device=device), (40,), weight).sum().backward()
        if n_rows == 3:
            searched = len(unknown_gpu)
            assert searched > 2
    assert len(unknown_gpu) == searched
    space = tuning.rows_forward(40, "float32", 4, 4, 1, False)
    assert tuning.chosen(space, "NVIDIA Unheard-Of 9") == space.configs[-1]


@pytest.mark.skipif(not launch.INTERPRETED, reason="on a GPU the search times for real")
def test_a_search_leaves_peers_their_zeros(unknown_gpu, monkeypatch, device):
    """Each config is run with tickets and arrivals from zero, and the call itself once more."""
    monkeypatch.setattr(tuning, "INTERPRETED_SMS", 12)
    monkeypatch.setattr(tuning, "WHOLE_ROW_BYTES", 1024)
    monkeypatch.setattr(tuning, "FORWARD_PIECE_BYTES", 1024)
    monkeypatch.setattr(tuning, "BACKWARD_SPAN_BYTES", 1024)
    launch.multiprocessors.cache_clear()
    for numbers in (
        tuning.rows_forward(900, "float32", 4, 4, 12, False),
        tuning.rows_backward(900, "float32", 4, 4, 12, False),
    ):
        assert any(config["PEERS"] > 1 for config in numbers.configs)
    inputs = LAYER_NORM.drawn((3, 900), 1, torch.float32, device)
    with interleaved():
        LAYER_NORM.against_oracle(*inputs)
    assert len(unknown_gpu) > 2
    monkeypatch.undo()
    launch.multiprocessors.cache_clear()


@pytest.mark.skipif(not launch.INTERPRETED, reason="on a GPU the search times for real")
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_search_moves_running_statistics_once(unknown_gpu, momentum, monkeypatch, device):
    monkeypatch.setattr(tuning, "ONE_LAUNCH_BYTES", 0)  # whose one config is not searched for
    module = triton_norm.BatchNorm1d(3, momentum=momentum, device=device)
    x = torch.randn(4, 3, 8, device=device)
    module(x)
    assert unknown_gpu
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    F.batch_norm(x, mean, var, training=True, momentum=momentum or 1.0)
    torch.testing.assert_close(module.running_mean, mean)
    torch.testing.assert_close(module.running_var, var)
    assert module.num_batches_tracked.item() == 1


def stored(gpu: str, text: str) -> None:
    tuning.tuned_file(gpu).write_text(text)


@pytest.mark.skipif(not launch.INTERPRETED, reason="on a GPU its own file is used")
def test_a_shipped_choice_is_used_and_nothing_searched(unknown_gpu, device):
    gpu = "NVIDIA Unheard-Of 9"
    space = tuning.rows_forward(40, "float32", 4, 4, 1, False)
    wanted = space.configs[1]
    stored(gpu, json.dumps({"choices": {space.kernel: {space.key: wanted.keywords}}}))
    triton_norm.layer_norm(torch.randn(3, 40, device=device), (40,))
    assert not unknown_gpu
    assert tuning.chosen(space, gpu) == wanted
    assert tuning.choices(gpu) == {space.kernel: {space.key: wanted.keywords}}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"choices": 3}', '{"choices": {"k": {"key": {"BLOCK_M": "x"}}}}', "\0"]
)
def test_a_broken_file_is_left_out_with_one_warning(text, monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    tuning.measured.cache_clear()
    stored("broken", text)
    with pytest.warns(UserWarning, match="broken.json is left out"):
        assert not tuning.measured("broken")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not tuning.measured("broken")
    tuning.measured.cache_clear()


def test_shipped_files_hold_choices_of_their_spaces():
    for file in tuning.TUNED.glob("*.json"):
        for kernel, keys in json.loads(file.read_text())["choices"].items():
            for key, choice in keys.items():
                assert kernel.endswith("_kernel"), (file, kernel)
                assert choice["num_warps"] in (1, 2, 4, 8, 16, 32), (file, key)


@pytest.mark.gpu
@pytest.mark.searches
def test_a_real_search_is_right_and_runs_once(monkeypatch):
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "measured", lambda gpu: {})
    searched = []
    search = launch.search
    monkeypatch.setattr(launch, "search", lambda kernel, *a: searched.append(kernel.__name__) or search(kernel, *a))
    module, exact = (
        torch.nn.Sequential(norms.BatchNorm1d(48), norms.LayerNorm(48)) for norms in (triton_norm, torch.nn)
    )
    module.cuda()
    for n_rows in (512, 700):
        x = torch.randn(n_rows, 48)
        torch.testing.assert_close(module(x.cuda()).cpu(), exact(x), rtol=1e-4, atol=1e-4)
    assert len(searched) == len(set(searched)) == 2
    torch.testing.assert_close(module[0].running_var.cpu(), exact[0].running_var)


@pytest.mark.gpu
def test_another_batch_size_compiles_nothing():
    """Once there has been one on either side of each at which BatchNorm's programs begin to share channels, or to keep
    a larger tile: these are kernels of their own, a few for all sizes."""
    from triton_norm.kernels import channels, channels_backward, rows, rows_backward

    kernels = [
        rows.rows_forward_kernel,
        rows_backward.rows_backward_kernel,
        channels.channels_forward_kernel,
        channels_backward.channels_backward_kernel,
    ]
    module = torch.nn.Sequential(triton_norm.BatchNorm1d(64), triton_norm.LayerNorm(64)).cuda()

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    earlier = compiled()
    for n_rows in (8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513, 1024, 1025):
        module(torch.randn(n_rows, 64, device="cuda")).sum().backward()
    before = compiled()
    assert before - earlier <= 12
    for n_rows in (48, 50, 700, 1000, 100, 333, 7):
        module(torch.randn(n_rows, 64, device="cuda")).sum().backward()
    assert compiled() == before
