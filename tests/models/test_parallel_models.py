"""Converted models of Hugging Face's transformers under DistributedDataParallel and fully_shard."""

import pytest
import torch

pytest.importorskip("transformers")
from support import parallel_scenarios, worlds

SCENARIOS = [
    parallel_scenarios.bert_in_parallel,
    parallel_scenarios.llama_fully_sharded,
    parallel_scenarios.in_mixed_precision,
    parallel_scenarios.norms_sharded_before_the_conversion,
    parallel_scenarios.norms_sharded_after_the_conversion,
    parallel_scenarios.resnet_in_parallel,
    parallel_scenarios.resnet_in_a_group,
    parallel_scenarios.resnet_without_synchronization,
    parallel_scenarios.the_same_state,
]
IMPORTED = ["torch.distributed.fsdp", "transformers.models.bert.modeling_bert"]
ON_TORCHS_PATH = [
    parallel_scenarios.bert_in_parallel,
    parallel_scenarios.llama_fully_sharded,
    parallel_scenarios.resnet_in_parallel,
]
PATHS = pytest.mark.parametrize(
    ("kernels", "scenarios"), [(True, SCENARIOS), (False, ON_TORCHS_PATH)], ids=["kernels", "torch"]
)


@pytest.mark.long
@PATHS
def test_a_step_is_that_of_one_process(kernels, scenarios, tmp_path):
    worlds.start(tmp_path, 2, kernels, scenarios, preload=IMPORTED)


@pytest.mark.gpu
@PATHS
def test_over_nccl(kernels, scenarios, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    worlds.start(tmp_path, 2, kernels, scenarios, backend="nccl")
