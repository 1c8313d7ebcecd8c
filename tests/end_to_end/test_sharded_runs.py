"""Runs that shard a pretrained model and save sharded checkpoints."""

from pathlib import Path

import pytest
import torch

from lit_gpt_scratch.checkpoint.adapters import apply_adapter, save_adapter
from lit_gpt_scratch.checkpoint.loading import build_model, load_checkpoint
from tests.end_to_end import forked
from tests.end_to_end.conftest import Command
from tests.end_to_end.test_user_errors import one_line

SHARDED = ["--trainer.devices=2", "--trainer.strategy=fsdp2", "--data.batch_size=2", "--checkpoint.format=sharded"]


@pytest.fixture
def base(small: list[str], tmp_path: Path) -> Path:
    """Sharded checkpoint of a language model that two processes have trained."""
    done = forked.fit(tmp_path / "base", *small, *SHARDED, "--model.gpt.tied_embeddings=true")
    assert done.code == 0, done.err
    return tmp_path / "base" / "pretrain" / "version_0" / "checkpoints" / "last.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [["--model.lora.rank=4"], ["--model.train_layers=1"], []], ids=["lora", "layers", "all"]
)
def test_pretrained_model_is_trained_in_shards(small: list[str], base: Path, tmp_path: Path, way: list[str]) -> None:
    """The weights equal those of one process that starts from the same checkpoint."""
    own = [flag for flag in small if not flag.startswith(("--model.gpt", "--data.vocab_size"))]
    flags = [*own, *way, f"--model.init_from={base}", "--model.optimizer=AdamW", "--trainer.precision=64-true"]
    flags.append("--data.tokens_per_step=128")
    found = []
    for name, layout in (("one", []), ("two", SHARDED)):
        done = forked.fit(tmp_path / name, *flags, *layout)
        assert done.code == 0, done.err
        found.append(tmp_path / name / "pretrain" / "version_0" / "checkpoints" / "last.ckpt")
    one, two = (load_checkpoint(path)["state_dict"] for path in found)
    assert one.keys() == two.keys()
    before = load_checkpoint(base)["state_dict"]
    assert any(name not in before or not torch.equal(weight, before[name].double()) for name, weight in one.items())
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-9, atol=1e-9)
    if way == ["--model.lora.rank=4"]:
        model = build_model(load_checkpoint(base), base)
        tokens = torch.arange(20)[None]
        logits = []
        for path in found:
            save_adapter(path, path.with_suffix(".safetensors"))
            logits.append(apply_adapter(model, path.with_suffix(".safetensors")).net(tokens))
        torch.testing.assert_close(*logits)
        assert not torch.allclose(logits[0], model.net(tokens))


@pytest.mark.slow
def test_commands_read_a_sharded_checkpoint(command: Command, base: Path, tmp_path: Path) -> None:
    replies = []
    command("convert", "to-file", str(base), str(tmp_path / "one.ckpt"))
    command("convert", "to-sharded", str(tmp_path / "one.ckpt"), str(tmp_path / "again.ckpt"))
    command("convert", "to-safetensors", str(base), str(tmp_path / "x.safetensors"))
    command("convert", "to-hf", str(base), str(tmp_path / "hf"))
    for path in (base, base.parent.parent, *(tmp_path / name for name in ("one.ckpt", "again.ckpt", "x.safetensors"))):
        done = command("generate", str(path), "--prompt=a", "--max_new_tokens=8", "--seed=1")
        assert done.code == 0, done.err
        replies.append(done.out)
    assert len(set(replies)) == 1
    (base / "manifest.json").unlink()
    one_line(command("generate", str(base), "--prompt=a"), "last.ckpt")
