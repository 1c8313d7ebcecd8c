"""Averages of checkpoints, against plain averages in float64."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt_scratch.checkpoint.checkpoint_io import save_checkpoint
from lit_gpt_scratch.checkpoint.loading import STATE_PREFIX, load_model
from lit_gpt_scratch.checkpoint.merge_checkpoints import _average, merge_checkpoints
from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY, TRAINING_SETTINGS, CheckpointMetadata
from lit_gpt_scratch.checkpoint.safetensors_export import export_safetensors
from lit_gpt_scratch.cli import convert
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.tensor_stream import LazyTensors
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.lora import LoRA, add_lora, merge_lora, remove_lora
from lit_gpt_scratch.text.tokenizer import Tokenizer
from tests.conftest import sentences

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([sentences(0)], 300)


def network(seed: int, gpt: GPTConfig = CONFIG) -> GPT:
    net = GPT(gpt, 300, 32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net


def save(
    net: GPT, path: Path, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32, **metadata: Any
) -> dict[str, torch.Tensor]:
    """Save a network as a checkpoint; returns its weights."""
    weights = {name: weight.to(dtype) for name, weight in net.state_dict().items()}
    contents = CheckpointMetadata(asdict(net.config), 300, 32, tokenizer.to_json())
    state = {STATE_PREFIX + name: weight for name, weight in weights.items()}
    save_checkpoint({METADATA_KEY: asdict(replace(contents, **metadata)), "state_dict": state}, path)
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [3.0, 1.0, 0.5]])
def test_weights_are_averages(tmp_path: Path, tokenizer: Tokenizer, dtype: torch.dtype, weights: list[float]) -> None:
    paths = [tmp_path / f"{seed}.ckpt" for seed in range(3)]
    saved = [save(network(seed), path, tokenizer, dtype) for seed, path in enumerate(paths)]
    merged = merge_checkpoints(paths, weights)
    for name, average in merged["state_dict"].items():
        own = name.removeprefix(STATE_PREFIX)
        expected = sum(w * each[own].double() for w, each in zip(weights, saved, strict=True)) / sum(weights)
        assert average.dtype == dtype
        torch.testing.assert_close(average, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-15)
    sources = merged[METADATA_KEY]["merged_from"]
    assert [source["weight"] for source in sources] == [weight / sum(weights) for weight in weights]
    assert len({source["sha256"] for source in sources}) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@given(copies=st.integers(2, 9), seed=st.integers(0, 99), weights=st.lists(st.floats(0.01, 100), min_size=9))
def test_the_average_of_copies_is_bitwise_the_checkpoint(
    dtype: torch.dtype, copies: int, seed: int, weights: list[float]
) -> None:
    tensor = torch.randn(50, generator=torch.Generator().manual_seed(seed)).to(dtype)
    tensor[:2] = torch.tensor([-0.0, 0.0])
    shares = [weight / sum(weights[:copies]) for weight in weights[:copies]]
    average = _average([tensor] * copies, shares, dtype)
    assert torch.equal(average.view(torch.uint8), tensor.view(torch.uint8))


def test_the_widest_dtype_is_kept(tmp_path: Path, tokenizer: Tokenizer) -> None:
    paths = [tmp_path / "a.ckpt", tmp_path / "b.ckpt"]
    for path, dtype in zip(paths, (torch.bfloat16, torch.float32), strict=True):
        save(network(0), path, tokenizer, dtype)
    assert {weight.dtype for weight in merge_checkpoints(paths, [1, 1])["state_dict"].values()} == {torch.float32}


def test_only_one_tensor_of_each_checkpoint_is_read_at_a_time(tmp_path: Path, tokenizer: Tokenizer) -> None:
    paths = []
    for seed in range(2):
        save(network(seed), tmp_path / f"{seed}.ckpt", tokenizer)
        paths.append(tmp_path / f"{seed}.safetensors")
        convert.main(["to-safetensors", str(tmp_path / f"{seed}.ckpt"), str(paths[-1])])
    merged = merge_checkpoints(paths, [1, 1])
    assert isinstance(merged["state_dict"], LazyTensors)
    export_safetensors(merged, STATE_PREFIX, tmp_path / "merged.safetensors")
    net, _ = load_model(tmp_path / "merged.safetensors")
    for merged_weight, a, b in zip(net.parameters(), network(0).parameters(), network(1).parameters(), strict=True):
        torch.testing.assert_close(merged_weight, (a + b) / 2, rtol=1e-6, atol=1e-7)


def test_adapters_are_merged_before_the_average(tmp_path: Path, tokenizer: Tokenizer) -> None:
    plain, adapted, lora = network(0), network(1), LoRA(rank=2)
    save(plain, tmp_path / "a.ckpt", tokenizer)
    add_lora(adapted, lora, 0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    save(adapted, tmp_path / "b.ckpt", tokenizer, lora=asdict(lora))
    merge_lora(adapted)
    remove_lora(adapted)
    merged = merge_checkpoints([tmp_path / "b.ckpt", tmp_path / "a.ckpt"], [1, 1])
    assert merged[METADATA_KEY]["lora"] is None
    for name, weight in plain.state_dict().items():
        expected = (weight + adapted.state_dict()[name]) / 2
        torch.testing.assert_close(merged["state_dict"][STATE_PREFIX + name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 3}, "n_layer is 3, not 2"),
        ({"n_embd": 32, "norm_eps": 1e-5}, r"n_embd is 32, not 16; norm_eps is 1e-05, not 1e-06"),
        ({"bias": True}, "bias is True, not False"),
    ],
)
def test_other_architectures_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, change: dict[str, Any], message: str
) -> None:
    save(network(0), tmp_path / "a.ckpt", tokenizer)
    save(network(0, replace(CONFIG, **change)), tmp_path / "b.ckpt", tokenizer)
    with pytest.raises(UserError, match=rf"b\.ckpt cannot be merged with \S+a\.ckpt: {message}; merge"):
        merge_checkpoints([tmp_path / "a.ckpt", tmp_path / "b.ckpt"], [1, 1])


@pytest.mark.parametrize(
    "change",
    [
        {"dropout": 0.1}, {"attention_backend": "manual"}, {"initialisation": "gpt2"}, {"load_balance_loss": 0.0},
        {"router_z_loss": 0.001},
    ],
)  # fmt: skip
def test_settings_that_affect_only_training_may_differ(
    tmp_path: Path, tokenizer: Tokenizer, change: dict[str, Any]
) -> None:
    experts = replace(CONFIG, feed_forward="moe", n_experts=3)
    save(network(0, experts), tmp_path / "a.ckpt", tokenizer)
    save(network(1, replace(experts, **change)), tmp_path / "b.ckpt", tokenizer)
    merged = merge_checkpoints([tmp_path / "a.ckpt", tmp_path / "b.ckpt"], [1, 1])
    assert GPTConfig(**merged[METADATA_KEY]["gpt"]) == experts
    assert set(change) <= set(TRAINING_SETTINGS)
    x = torch.randint(300, (2, 32))
    nets = [network(0, config).double().eval() for config in (experts, replace(experts, **change))]
    torch.testing.assert_close(nets[0](x), nets[1](x))  # they do not change the function of a trained model


def test_other_tokenizers_and_tasks_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    other = Tokenizer.train([sentences(1)], 299)
    save(network(0, replace(CONFIG, dropout=0.1)), tmp_path / "a.ckpt", tokenizer)
    save(network(1), tmp_path / "b.ckpt", other)
    save(network(1), tmp_path / "c.ckpt", tokenizer, start_of_text=7)
    for path in ("b.ckpt", "c.ckpt"):
        with pytest.raises(UserError, match="the tokenizers differ"):
            merge_checkpoints([tmp_path / "a.ckpt", tmp_path / path], [1, 1])
    save(network(1), tmp_path / "d.ckpt", tokenizer)  # dropout may differ
    merge_checkpoints([tmp_path / "a.ckpt", tmp_path / "d.ckpt"], [1, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.ckpt", "out.safetensors"], "argument CKPT: merge requires at least two checkpoints"),
        (["a.ckpt", "a.ckpt", "out.ckpt"], r"out\.ckpt does not end with \.safetensors"),
        (["a.ckpt", "a.ckpt", "there.safetensors"], r"argument FILE: there\.safetensors already exists"),
        (["a.ckpt", "a.ckpt", "out.safetensors", "--weights=1,2,3"], "there are 3 weights for 2 checkpoints"),
        (["a.ckpt", "a.ckpt", "out.safetensors", "--weights=1,-1"], "1,-1 is not a list of positive numbers"),
        (["a.ckpt", "a.ckpt", "out.safetensors", "--weights=1,nan"], "1,nan is not a list of positive numbers"),
        (["a.ckpt", "a.ckpt", "out.safetensors", "--weights=half"], "half is not a list of positive numbers"),
        (["a.ckpt", "none.ckpt", "out.safetensors"], r"no checkpoint at none\.ckpt"),
    ],
)
def test_mistakes(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save(network(0), tmp_path / "a.ckpt", tokenizer)
    (tmp_path / "there.safetensors").touch()
    with pytest.raises(UserError, match=message) as error:
        convert.main(["merge", *arguments])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.safetensors").exists()
