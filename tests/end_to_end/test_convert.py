"""``convert``: import and export of published models, and that scores stay the same."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file

from lit_gpt_scratch.checkpoint.checkpoint_io import save_checkpoint
from lit_gpt_scratch.checkpoint.loading import STATE_PREFIX, load_checkpoint, load_model
from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY, CheckpointMetadata
from lit_gpt_scratch.interop.hf_checkpoint import FAMILIES
from lit_gpt_scratch.interop.model_family import ModelFamily, ModelShape
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.text.tokenizer import Tokenizer
from tests.conftest import sentences
from tests.end_to_end.conftest import Command
from tests.interop.chat_models import chat_model as chat_model  # a fixture
from tests.interop.conftest import (
    LENGTH,
    VOCABULARY,
    Published,
    library,
    published,  # noqa: F401 - a fixture
    randomised,
    tokenizer,  # noqa: F401 - a fixture
)

VARIED: Final[dict[str, Any]] = {
    "sliding_window": 5, "sliding_window_pattern": 2, "rotary_local_base": 50.0, "rotary_share": 0.5,
    "rotary_skip_every": 2, "attention_scale": 20**-0.5, "attention_softcap": 3.0, "logit_softcap": 6.0,
    "normalize_gates": False,
}  # fmt: skip
"""Settings that some families fix and others may vary, with values that change the output."""


@torch.no_grad()
def bits_per_byte(model: Any, tokenizer_: Any, text: str, context: int) -> float:
    """Computed only with the library: every token once, in consecutive windows."""
    tokens = torch.tensor([tokenizer_.bos_token_id, *tokenizer_(text)["input_ids"]])
    nats = 0.0
    for start in range(0, len(tokens) - 1, context):
        inputs, labels = tokens[start : start + context][None], tokens[start + 1 : start + context + 1]
        predicted = model(inputs[:, : len(labels)]).logits[0].log_softmax(-1)
        nats -= predicted.gather(1, labels[:, None]).sum().item()
    return nats / math.log(2) / len(text.encode())


def evaluated(command: Command, model: str, source: str | Path) -> dict[str, float]:
    """Metrics reported by ``evaluate``."""
    outcome = command("evaluate", model, "--data.source", source, "--json")
    assert outcome.code == 0, outcome.err
    metrics: dict[str, float] = json.loads(outcome.out)
    return metrics


def example_config(family: ModelFamily) -> GPTConfig:
    """A small config with the settings that define a family, and some of those that it may vary."""
    chosen = {name: value for name, value in VARIED.items() if name in family.configurable}
    return GPTConfig(n_layer=3, n_head=2, n_embd=32, **family.fixed | chosen)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_model_scores_the_same_in_transformers(
    command: Command,
    tokenizer: Tokenizer,  # noqa: F811 - the fixture
    model_type: str,
) -> None:
    """``transformers`` alone scores the exported model, whose files it then saves again: these are imported."""
    transformers = library()
    shape = ModelShape(example_config(FAMILIES[model_type]), VOCABULARY, LENGTH)
    metadata = CheckpointMetadata(asdict(shape.gpt), VOCABULARY, LENGTH, tokenizer.to_json())
    weights = {STATE_PREFIX + name: tensor for name, tensor in randomised(GPT(*shape)).state_dict().items()}
    save_checkpoint({METADATA_KEY: asdict(metadata), "state_dict": weights}, Path("own.ckpt"))
    assert command("convert", "to-hf", "own.ckpt", "exported", "--model_type", model_type).code == 0

    text = sentences(99, 20) + "Çé 東京 🎉\r\n\t x"
    Path("text.txt").write_text(text, encoding="utf-8", newline="")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("exported").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained("exported")
    assert len(their_tokenizer(text)["input_ids"]) > 3 * LENGTH
    expected = bits_per_byte(theirs, their_tokenizer, text, LENGTH)
    assert evaluated(command, "own.ckpt", "text.txt")["bits_per_byte"] == pytest.approx(expected, rel=1e-5)

    theirs.save_pretrained("published")
    their_tokenizer.save_pretrained("published")
    assert command("convert", "from-hf", "published", "imported.safetensors").code == 0
    assert evaluated(command, "imported.safetensors", "text.txt")["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert command("convert", "to-hf", "imported.safetensors", "again").code == 0
    before, after = load_file("published/model.safetensors"), load_file("again/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    written = command("generate", "imported.safetensors", "--prompt", "the cat", "--max_new_tokens", "5")
    assert written.code == 0, written.err


def test_a_run_is_exported_and_imported_again(command: Command, small: list[str], corpus: Path) -> None:
    transformers = library()
    trained = command("fit", *small, "--model.gpt.vocab_multiple=64")
    assert trained.code == 0, trained.err
    outcome = command("convert", "to-hf", "runs/pretrain/version_0", "shared/qwen")
    assert outcome.code == 0, outcome.err
    assert "shared/qwen contains a Qwen3ForCausalLM" in outcome.err
    model, own = load_model(Path("runs/pretrain/version_0/checkpoints/last.ckpt"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained("shared/qwen").eval()
    text = corpus.joinpath("01.txt").read_text(encoding="utf-8")
    x = torch.tensor([own.encode(text)[:32]])
    assert (theirs(x).logits - model(x)).abs().max() <= 1e-5
    assert command("convert", "from-hf", "shared/qwen", "back.ckpt").code == 0
    scores = [evaluated(command, path, corpus / "01.txt") for path in ("runs/pretrain/version_0", "back.ckpt")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    expected = bits_per_byte(theirs, transformers.AutoTokenizer.from_pretrained("shared/qwen"), text, 32)
    assert scores[0]["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_bfloat16_weights_keep_their_dtype(
    command: Command,
    published: Published,  # noqa: F811 - the fixture
) -> None:
    _, folder = published("qwen3", torch.bfloat16)
    for name in ("m.ckpt", "m.safetensors"):
        assert command("convert", "from-hf", folder, name).code == 0
        assert {tensor.dtype for tensor in load_checkpoint(Path(name))["state_dict"].values()} == {torch.bfloat16}
        load_model(Path(name))


def test_mistakes_are_one_line(command: Command, small: list[str], tmp_path: Path) -> None:
    assert command("fit", *small, "--trainer.max_steps=1", "--model.gpt.smear=true").code == 0
    Path("there.ckpt").write_text("", encoding="utf-8")
    for args, expected in (
        ([], "FORMAT"),
        (["to-onnx"], "to-onnx"),
        (["to-hf", "runs/pretrain/version_0", "hf"], "smear is True"),
        (["to-hf", "runs/pretrain/version_0", "hf.safetensors"], "to-safetensors"),
        (["to-hf", "none.ckpt", "hf"], "no checkpoint at none.ckpt"),
        (["to-hf", "there.ckpt", "hf"], "there.ckpt"),
        (["from-hf", "none", "m.ckpt"], "no folder at none"),
        (["from-hf", "none", "there.ckpt"], "there.ckpt already exists"),
    ):
        outcome = command("convert", *args)
        assert outcome.code == 2, args
        assert outcome.err.count("\n") == 1
        assert expected in outcome.err
    assert not (tmp_path / "hf").exists()


def test_a_model_with_tied_embeddings_is_exported_as_safetensors(command: Command, small: list[str]) -> None:
    assert command("fit", *small, "--trainer.max_steps=1", "--model.gpt.tied_embeddings=true").code == 0
    outcome = command("convert", "to-safetensors", "runs/pretrain/version_0", "m.safetensors")
    assert outcome.code == 0, outcome.err
    shared, own = (command("generate", *path, "--max_new_tokens", "5") for path in (["m.safetensors"], []))
    assert shared.out == own.out


def test_a_chat_model_is_fine_tuned_and_exported(command: Command, small: list[str], chat_model: Path) -> None:
    """With its own chat template and stop tokens, in each kind of file."""
    transformers = library()
    own = ("--data.source", "--data.vocab_size", "--data.block_size", "--model.gpt")
    flags = [flag for flag in small if not flag.startswith(own)]
    stage = ["--data=Conversations", "--data.block_size=256", "--data.too_long=drop", "--trainer.max_steps=2"]
    trained = command("fit", *stage, *flags, f"--model.init_from={chat_model}")
    assert trained.code == 0, trained.err
    run, files = "runs/pretrain/version_0", ["generation_config.json", "chat_template.jinja"]
    assert command("convert", "to-safetensors", run, "m.safetensors").code == 0
    assert command("convert", "to-hf", "m.safetensors", "again").code == 0
    for file in files:
        assert Path("again", file).read_text().split() == (chat_model / file).read_text().split()
    theirs = transformers.AutoModelForCausalLM.from_pretrained("again").eval()
    encoder = transformers.AutoTokenizer.from_pretrained("again")
    prompt = encoder.apply_chat_template(
        [{"role": "system", "content": "a dog"}, {"role": "user", "content": "the cat"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    reply = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :].tolist()
    ends = theirs.generation_config.eos_token_id
    expected = encoder.decode(reply[:-1] if reply[-1] in ends else reply)
    asked = ["--chat", "--system", "a dog", "--prompt", "the cat", "--temperature=0", "--max_new_tokens=12", "--json"]
    for place in (run, "m.safetensors", "again"):
        answered = command("generate", place, *asked)
        assert answered.code == 0, answered.err
        assert json.loads(answered.out)["text"] == expected


def test_runs_are_merged_and_used_like_a_checkpoint(command: Command, small: list[str], corpus: Path) -> None:
    for seed in (0, 1):
        assert command("fit", *small, "--trainer.max_steps=2", f"--seed_everything={seed}").code == 0
    runs = [f"runs/pretrain/version_{n}" for n in range(2)]
    outcome = command("convert", "merge", *runs, "soup.safetensors", "--weights", "3,1")
    assert outcome.code == 0, outcome.err
    nets = [load_model(Path(run, "checkpoints", "last.ckpt"))[0].state_dict() for run in runs]
    soup = load_model(Path("soup.safetensors"))[0].state_dict()
    for name, weight in soup.items():
        expected = 0.75 * nets[0][name].double() + 0.25 * nets[1][name].double()
        torch.testing.assert_close(weight, expected.float(), rtol=1e-6, atol=0)
    scored = command("evaluate", "soup.safetensors", "--data.source", corpus / "01.txt", "--json")
    assert scored.code == 0, scored.err
    assert command("generate", "soup.safetensors", "--max_new_tokens=4").code == 0
    own = ("--data.vocab_size", "--model.gpt")
    flags = [flag for flag in small if not flag.startswith(own)]
    continued = command("fit", *flags, "--trainer.max_steps=1", "--model.init_from=soup.safetensors")
    assert continued.code == 0, continued.err
