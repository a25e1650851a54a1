"""LayerNorm and RMSNorm of DTensors, on two and four processes, and models whose sequence is sharded."""

import pytest
import torch

from support import sharded_models, sharded_scenarios, worlds

IMPORTED = ["torch.distributed.fsdp", "torch.distributed.tensor.parallel"]
SCENARIOS = {
    2: [
        sharded_scenarios.along_one_axis,
        sharded_scenarios.among_torchs_tools,
        sharded_scenarios.elsewhere_by_torch,
        sharded_scenarios.compiled_without_a_break,
        sharded_models.a_sequence_in_parallel,
        sharded_models.on_torchs_path,
        sharded_models.compiled_sequence_in_parallel,
    ],
    4: [
        sharded_scenarios.along_two_axes,
        sharded_models.fully_sharded_with_a_sequence_in_parallel,
        sharded_models.compiled_fully_sharded,
    ],
}


@pytest.mark.parametrize("size", [2, 4])
def test_through_the_kernels(size, tmp_path):
    worlds.start(tmp_path, size, True, SCENARIOS[size], preload=IMPORTED)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
def test_over_nccl(size, tmp_path):
    if torch.cuda.device_count() < size:
        pytest.skip("too few GPUs")
    worlds.start(tmp_path, size, True, SCENARIOS[size], backend="nccl")
