"""CPU offload: what can be tested without a GPU; the training itself is tested in ``end_to_end/test_strategies.py``."""

from dataclasses import replace

import lightning as L
import pytest
import torch
from torchmetrics import MeanMetric

from lit_gpt_scratch.distributed.fake_process_group import fake_mesh
from lit_gpt_scratch.distributed.parallelize import parallelize
from lit_gpt_scratch.distributed.strategies import ModelParallel, resolve_strategy, validate_cpu_offload
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.optim import optimizers
from lit_gpt_scratch.optim.optimizers import _group_matrices
from tests.conftest import TINY


@pytest.mark.parametrize(
    ("size", "precision", "message"),
    [
        (
            2,
            "bf16-mixed",
            r"cpu_offload is true, which tensor parallelism does not support; use --trainer.strategy fsdp2",
        ),
        (1, "16-mixed", r"--trainer.precision 16-mixed does not support, because gradients are scaled on the GPU"),
    ],
)
def test_cpu_offload_supports_neither_tensor_parallelism_nor_scaled_gradients(
    size: int, precision: str, message: str
) -> None:
    validate_cpu_offload(1, "bf16-mixed")
    with pytest.raises(UserError, match=message):
        validate_cpu_offload(size, precision)


@pytest.mark.parametrize("strategy", ["ddp", "auto"])
def test_cpu_offload_requires_sharding(strategy: str) -> None:
    with pytest.raises(UserError, match=f"--trainer.strategy is {strategy}; use fsdp2 or hsdp"):
        resolve_strategy(strategy, None, None, cpu_offload=True)


def test_offloaded_matrices_are_gathered_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each process, so that the accelerator does not hold the whole network."""
    net = GPT(replace(TINY, n_layer=5), 50, 8)
    with fake_mesh(2, 1) as devices:
        parallelize(net, devices, "32-true")
        matrices = [block.attention.query.weight for block in net.blocks]
        assert [len(group) for group in _group_matrices(matrices)] == [5]
        monkeypatch.setattr(optimizers, "is_offloaded", lambda p: True)
        groups = list(_group_matrices(matrices))
    assert [len(group) for group in groups] == [2, 2, 1]
    assert [id(p) for group in groups for p in group] == [id(p) for p in matrices]


def test_cpu_offload_moves_everything_but_the_shards_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers and metrics; the meta device takes the place of a GPU."""
    with fake_mesh(2, 1) as devices:
        module = L.LightningModule()
        module.net = GPT(TINY, 50, 8)
        module.metric = MeanMetric()
        parallelize(module.net, devices, "32-true", cpu_offload=True)
        strategy = ModelParallel(cpu_offload=True)
        strategy.model = module
        strategy.parallel_devices = [torch.device("meta")]
        monkeypatch.setattr(ModelParallel, "local_rank", 0)
        strategy.model_to_device()
        assert {p.device.type for p in module.net.parameters()} == {"cpu"}
        assert {buffer.device.type for buffer in module.net.buffers()} == {"meta"}
        assert module.metric.mean_value.device.type == "meta"
        assert module.device.type == "meta"
