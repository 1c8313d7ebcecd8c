"""Adapters of a stored model are merged when a weight is read."""

from dataclasses import asdict

import pytest
import torch

from lit_gpt_scratch.checkpoint.loading import StoredModel, merge_adapters
from lit_gpt_scratch.checkpoint.metadata import CheckpointMetadata
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.tensor_stream import LazyTensors, on_meta
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.lora import LoRA, add_lora, merge_lora, remove_lora
from tests.conftest import TINY, randomised


def stored_model(gpt: GPTConfig, lora: LoRA, dtype: torch.dtype) -> tuple[StoredModel, GPT]:
    """A model with random adapters whose other weights have a dtype, and its network."""
    net = randomised(gpt)
    add_lora(net, lora, 0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.randn_like(p) * 1e-3 if "lora" in name else p.to(dtype))
    weights = {name: value if "lora" in name else value.to(dtype) for name, value in net.state_dict().items()}
    lazy = LazyTensors({name: value.to("meta") for name, value in weights.items()}, weights.__getitem__)
    return StoredModel(gpt, lora, lazy, CheckpointMetadata(asdict(gpt), 61, 24, "{}")), net


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_equals_merging_in_a_float32_network(dtype: torch.dtype) -> None:
    """Updates of 1e-6 would be lost if the sum were rounded to bfloat16."""
    stored, net = stored_model(TINY, LoRA(rank=2), dtype)
    merged = merge_adapters(stored)
    merge_lora(net)
    remove_lora(net)
    expected = net.state_dict()
    assert merged.lora is None
    assert merged.weights.keys() == expected.keys()
    for name, value in merged.weights.items():
        assert torch.equal(value.float(), expected[name]), name
        assert on_meta(merged.weights)[name].dtype == value.dtype
        assert on_meta(merged.weights)[name].shape == value.shape


def test_adapter_of_a_tied_head_is_refused() -> None:
    gpt = GPTConfig(n_layer=1, n_head=2, n_embd=32, tied_embeddings=True)
    stored, _ = stored_model(gpt, LoRA(rank=2, pattern="head"), torch.float32)
    with pytest.raises(UserError, match="the head has an adapter and is tied to the embedding"):
        merge_adapters(stored)
