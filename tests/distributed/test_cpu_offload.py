"""CPU offload: what can be tested without a GPU; the training itself is tested in ``end_to_end/test_strategies.py``."""

import lightning as L
import pytest
import torch
from torchmetrics import MeanMetric

from lit_gpt_scratch.distributed.fake_process_group import fake_mesh
from lit_gpt_scratch.distributed.parallelize import parallelize
from lit_gpt_scratch.distributed.strategies import ModelParallel, resolve_strategy
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT
from tests.conftest import TINY


@pytest.mark.parametrize(
    ("strategy", "tensor_parallel"), [("ddp", None), ("tp", None), ("fsdp2_tp", 2), ("hsdp", 2), ("auto", None)]
)
def test_cpu_offload_requires_a_strategy_that_only_fsdp2_shards(strategy: str, tensor_parallel: int | None) -> None:
    with pytest.raises(UserError, match=r"requires --trainer.strategy fsdp2 or hsdp without tensor parallelism"):
        resolve_strategy(strategy, tensor_parallel, None, cpu_offload=True)


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
