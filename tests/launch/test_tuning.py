"""Launch choices: every config is right, the search is triton.autotune's, and its result is stored."""

import contextlib
import itertools
import json
import warnings
from types import SimpleNamespace

import pytest
import torch

import triton_norm
from support import spaces
from support.channel_norms import Call
from support.gpus import H100, changed
from support.row_norms import LAYER_NORM
from support.spaces import GPU
from triton_norm import launch
from triton_norm.tuning import channel_spaces, choices, row_spaces
from triton_norm.tuning.channel_spaces import ChannelWork
from triton_norm.tuning.configs import vector_width
from triton_norm.tuning.limits import INTERPRETED, STAND_IN, Gpu, assumed, gpu_of
from triton_norm.tuning.memory import forget
from triton_norm.tuning.row_spaces import RowWork, rows_backward, rows_forward

triton = pytest.importorskip("triton")

if INTERPRETED:
    from triton_norm.testing.interleave import interleaved

ELEMENTS = [1, 3, 8, 64, 1000, 4096, 32768, 65536, 2**20]


def of_rows(n_cols: int) -> RowWork:
    return RowWork(n_cols, ("float32",), 4, 4)


def of_channels(kind: str, lanes: int, vector: int, width: int, resident: int) -> ChannelWork:
    return ChannelWork("channels_forward_kernel", "waits", kind, lanes, vector, width, ("float32",), resident, 4)


def every_space():
    for gpu in (H100, changed(H100, interpreted=True)):
        for n_cols in ELEMENTS:
            for dtype, stored_bytes, compute_bytes in (("bfloat16", 2, 4), ("float32", 4, 4), ("float64", 8, 8)):
                work = RowWork(n_cols, (dtype,), stored_bytes, compute_bytes)
                yield rows_forward(work, gpu)
                yield rows_backward(work, gpu)
        for vector in (1, 2, 4, 8):
            for kind, lanes, width in (("flat", vector, 1), ("last", 64, 64), ("folded", 2048, 64)):
                for resident in (0, 4096, 16384):
                    work = of_channels(kind, lanes, vector, width, resident)
                    roles = ("waits",) if resident else ("reduces", "applies")
                    kernels = ("channels_forward_kernel", channel_spaces.BACKWARD)
                    for kernel, role, curved in itertools.product(kernels, roles, (False, True)):
                        yield channel_spaces.channels(work._replace(kernel=kernel, role=role, curved=curved), gpu)


def test_spaces_are_small_and_of_powers_of_two():
    for space in every_space():
        assert 1 <= len(space.configs) <= 9, space
        assert len(set(space.configs)) == len(space.configs)
        for config in space.configs:
            assert config.num_warps in (1, 2, 4, 8, 16, 32)
            for name, value in config.blocks:
                assert name in ("HOLD_WEIGHT", "STAGES") or (value >= 1 and value & (value - 1) == 0), (space, config)


def test_a_rows_programs_cover_its_columns():
    for n_cols in ELEMENTS:
        for space in (rows_forward(of_rows(n_cols), H100), rows_backward(of_rows(n_cols), H100)):
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
    assert vector_width(itemsize, *extents) == width


GPU_CONFIGS = [
    (kernel, n_cols, config)
    for n_cols in (24, 300, 40000)
    for kernel, space in (
        ("forward", rows_forward(of_rows(n_cols), H100)),
        ("backward", rows_backward(of_rows(n_cols), H100)),
    )
    for config in space.configs
]


@pytest.mark.parametrize(("kernel", "n_cols", "config"), GPU_CONFIGS)
def test_every_config_for_rows_is_right(kernel, n_cols, config, numbers, monkeypatch, device):
    """The configs of a GPU, run wherever the tests run."""
    forced = spaces.only(f"rows_{kernel}_kernel", config)
    monkeypatch.setattr(row_spaces, f"rows_{kernel}", lambda work, gpu: forced)
    numbers(multiprocessors=6)
    forget()
    x, weight, bias, dy = LAYER_NORM.drawn((5, n_cols), 1, torch.float32, device)
    with interleaved() if INTERPRETED else contextlib.nullcontext():
        LAYER_NORM.against_oracle(x, weight, bias, dy)
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("resident", [0, 256])
@pytest.mark.parametrize("kind", ["flat", "last", "folded"])
@pytest.mark.parametrize("index", range(3))
def test_every_config_for_channels_is_right(index, kind, resident, numbers, monkeypatch, device):
    shape = (9, 8, 7) if kind == "folded" else (2, 8, 3, 40)
    x, dy = torch.randn(2, *shape, device=device)
    if kind == "last":
        x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
    lanes, vector, width = {"flat": (4, 4, 1), "last": (8, 4, 8), "folded": (512, 4, 8)}[kind]
    configs = channel_spaces.channels(of_channels(kind, lanes, vector, width, resident), H100).configs
    forced = spaces.only("channels", configs[index % len(configs)])
    monkeypatch.setattr(channel_spaces, "channels", lambda work, gpu: forced)
    numbers(
        multiprocessors=6,
        interpreted_tile_elements=256,
        min_resident_elements=64,
        one_launch_bytes=2**62 if resident else 0,
    )
    forget()
    weight, bias = torch.randn(2, 8, device=device)
    with interleaved() if INTERPRETED else contextlib.nullcontext():
        Call(x, None, weight, bias, dy).against_oracle()
    monkeypatch.undo()
    forget()


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the search times for real")
def test_a_search_runs_once_for_any_number_of_rows(unknown_gpu, timings, device):
    weight = torch.randn(40, device=device, requires_grad=True)
    for n_rows in (3, 5, 64, 1):
        triton_norm.layer_norm(torch.randn(n_rows, 40, device=device), (40,), weight).sum().backward()
        if n_rows == 3:
            searched = len(timings)
            assert searched > 2
    assert len(timings) == searched
    space = rows_forward(of_rows(40), H100)
    assert choices.chosen(space, GPU) == space.configs[-1]


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the search times for real")
def test_a_search_leaves_peers_their_zeros(unknown_gpu, timings, numbers, device):
    """Each config is run with tickets and arrivals from zero, and the call itself once more."""
    numbers(multiprocessors=12, whole_row_bytes=1024, forward_piece_bytes=1024, backward_span_bytes=1024)
    gpu = gpu_of(torch.device(device))
    for space in rows_forward(of_rows(900), gpu), rows_backward(of_rows(900), gpu):
        assert any(config["PEERS"] > 1 for config in space.configs)
    inputs = LAYER_NORM.drawn((3, 900), 1, torch.float32, device)
    with interleaved():
        LAYER_NORM.against_oracle(*inputs)
    assert len(timings) > 2


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU its own file is used")
def test_a_shipped_choice_is_used_and_nothing_searched(unknown_gpu, timings, tmp_path, device):
    space = rows_forward(of_rows(40), H100)
    expected = space.configs[1]
    content = {"choices": {space.kernel: {space.key: expected.keywords}}}
    (tmp_path / choices.file_name(GPU)).write_text(json.dumps(content))
    triton_norm.layer_norm(torch.randn(3, 40, device=device), (40,))
    assert not timings
    assert choices.chosen(space, GPU) == expected
    assert choices.chosen_so_far(GPU) == {space.kernel: {space.key: expected.keywords}}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"choices": 3}', '{"choices": {"k": {"key": {"BLOCK_M": "x"}}}}', "\0"]
)
def test_a_broken_file_is_left_out_with_one_warning(text, tmp_path):
    (tmp_path / "broken.json").write_text(text)
    with choices.begun_anew(tmp_path):
        with pytest.warns(UserWarning, match="broken.json is left out"):
            assert not choices.measured("broken")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not choices.measured("broken")


def test_shipped_files_hold_choices_of_their_spaces():
    for file in choices.TUNED.glob("*.json"):
        for kernel, keys in json.loads(file.read_text())["choices"].items():
            for key, choice in keys.items():
                assert kernel.endswith("_kernel"), (file, kernel)
                assert choice["num_warps"] in (1, 2, 4, 8, 16, 32), (file, key)


@pytest.mark.parametrize(
    ("types", "output", "key"),
    [
        ("bfloat16", "bfloat16", "columns 64, bfloat16"),
        ("bfloat16", "float32", "columns 64, bfloat16 to float32"),
        ("bfloat16, float32, float32", "bfloat16", "columns 64, bfloat16, float32, float32"),
        ("bfloat16, float32, float32", "float32", "columns 64, bfloat16, float32, float32 to float32"),
    ],
)
def test_a_key_names_the_outputs_type_where_it_is_not_xs(types, output, key):
    assert RowWork(40, tuple(types.split(", ")), 4, 4, output).key == key


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU its own choices are known")
def test_outputs_of_other_types_have_choices_of_their_own(unknown_gpu, timings, device):
    """Outputs of x's type have the choice that was measured for calls without out_dtype."""
    x, weight = torch.randn(3, 40, device=device).bfloat16(), torch.ones(40, device=device)
    for out_dtype in (None, torch.bfloat16, torch.float32, torch.float16):
        triton_norm.rms_norm(x, (40,), weight, out_dtype=out_dtype)
    keys = "columns 64, bfloat16", "columns 64, bfloat16 to float32", "columns 64, bfloat16 to float16"
    assert tuple(choices.chosen_so_far(GPU)["rows_forward_kernel"]) == keys


def test_a_cuda_devices_gpu_is_queried_once(monkeypatch):
    requested = []
    properties = SimpleNamespace(multi_processor_count=114, L2_cache_size=2**20, major=8, minor=6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: requested.append(device) or properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    device = torch.device("cuda", 3)
    forget()
    gpu = gpu_of(device)
    assert gpu_of(device) is gpu
    assert requested == [device]
    assert gpu == Gpu(GPU, 114, 2**20, STAND_IN.warp, INTERPRETED)
    monkeypatch.undo()
    forget()


def test_an_assumed_gpu_is_every_devices_until_the_last_that_assumes_one_leaves():
    cpu = torch.device("cpu")
    present = gpu_of(cpu)
    first, second = assumed(H100), assumed(changed(H100, multiprocessors=6))
    first.__enter__()
    assert gpu_of(cpu) is gpu_of(torch.device("cuda", 3)) is H100
    second.__enter__()
    assert gpu_of(cpu).multiprocessors == 6
    first.__exit__(None, None, None)
    assert gpu_of(cpu).multiprocessors == 6
    second.__exit__(None, None, None)
    assert gpu_of(cpu) == present == STAND_IN


@pytest.mark.gpu
@pytest.mark.searches
def test_a_real_search_is_right_and_runs_once(monkeypatch):
    searched = []
    search = launch.search
    monkeypatch.setattr(launch, "search", lambda kernel, *a: searched.append(kernel.__name__) or search(kernel, *a))
    module, exact = (
        torch.nn.Sequential(norms.BatchNorm1d(48), norms.LayerNorm(48)) for norms in (triton_norm, torch.nn)
    )
    module.cuda()
    with choices.begun_anew(folder=None):
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
