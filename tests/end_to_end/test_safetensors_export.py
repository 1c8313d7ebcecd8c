"""Export to safetensors: the same model, and damaged files are rejected."""

import random
from pathlib import Path

import pytest
import torch

from lit_gpt_scratch.checkpoint.loading import load_model
from lit_gpt_scratch.errors import UserError
from tests.end_to_end.conftest import Command, Trained


def test_an_exported_model_generates_and_scores_like_its_checkpoint(
    command: Command, small: list[str], trained: Trained, corpus: Path
) -> None:
    trained(*small)
    assert command("convert", "to-safetensors", "runs/pretrain/version_0", "m.safetensors").code == 0
    for name, flags in (
        ("generate", ["--prompt", "the"]),
        ("evaluate", ["--data.source", corpus / "01.txt", "--json"]),
    ):
        shared, own = command(name, "m.safetensors", *flags), command(name, *flags)
        assert shared.code == 0, shared.err
        assert shared.out == own.out
    rejected = command("fit", *small, "--ckpt_path=m.safetensors")
    assert rejected.code == 2
    assert "m.safetensors contains only weights" in rejected.err
    assert command("convert", "to-safetensors", "runs/pretrain/version_0", "m.bin").code == 2
    assert command("convert", "to-safetensors", "none", "m.safetensors").code == 2


def test_a_damaged_file_is_rejected_by_name(command: Command, small: list[str]) -> None:
    assert command("fit", *small, "--trainer.max_steps=1").code == 0
    path = Path("m.safetensors")
    assert command("convert", "to-safetensors", "runs/pretrain/version_0", path).code == 0
    model, tokenizer = load_model(path)
    whole, rng = path.read_bytes(), random.Random(0)
    header = int.from_bytes(whole[:8], "little")
    for n in range(300):
        end = header if n % 2 else len(whole)  # half of them in the header
        here, there = sorted(rng.sample(range(end), 2))
        ways = [
            whole[:here] + bytes([whole[here] ^ (1 << rng.randrange(8))]) + whole[here + 1 :],
            whole[:here], whole[:here] + whole[there:], whole[there:] + whole[:there], whole + b"\0",
        ]  # fmt: skip
        path.write_bytes(rng.choice(ways))
        message = error_message(path)
        if message is None:  # an undetected change, such as a space in the header, has no effect
            loaded, loaded_tokenizer = load_model(path)
            assert loaded_tokenizer.to_json() == tokenizer.to_json()
            assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
        else:
            assert str(path) in message
            assert "\n" not in message


def error_message(path: Path) -> str | None:
    try:
        load_model(path)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("content", [b"", b"text", b"\xff" * 100, b"PK\3\4"])
def test_a_file_of_another_format(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors"):
        load_model(tmp_path / "x.safetensors")
