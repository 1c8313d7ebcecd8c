"""``generate``: samples, stop strings, sampling flags, trusted code; presets."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt_scratch.cli.early_flags import EarlyFlags
from tests.end_to_end.conftest import Command, Trained

RUN = Path("runs/pretrain/version_0")
OWN = "tests.custom_attention.DoubledAttention"


@pytest.fixture
def model(small: list[str], trained: Trained) -> None:
    trained(*small)


@pytest.mark.usefixtures("model")
def test_texts_generated_together_equal_those_generated_alone(command: Command) -> None:
    flags = ["--max_new_tokens=20", "--temperature=1.5"]
    several = command("generate", *flags, "--prompt=the cat", "--prompt=a", "--samples=2", "--seed=5", "--json")
    assert several.code == 0, several.err
    texts = [json.loads(line) for line in several.out.splitlines()]
    assert [(text["prompt"], text["seed"]) for text in texts] == [("the cat", 5), ("the cat", 6), ("a", 7), ("a", 8)]
    assert texts[0]["text"] != texts[1]["text"]
    for text in texts:
        alone = command("generate", *flags, f"--prompt={text['prompt']}", f"--seed={text['seed']}")
        assert alone.out == f"{text['prompt']}{text['text']}\n"
    plain = command("generate", *flags, "--prompt=the cat", "--prompt=a", "--samples=2", "--seed=5")
    assert plain.out == "\n".join(f"{text['prompt']}{text['text']}\n" for text in texts)


@pytest.mark.usefixtures("model")
def test_generation_stops_before_a_stop_string(command: Command) -> None:
    flags = ["--max_new_tokens=30", "--prompt=the", "--temperature=0"]
    whole = command("generate", *flags).out
    stop = whole[10:13]
    assert command("generate", *flags, "--stop", stop).out == f"the{whole[3 : 3 + whole[3:].find(stop)]}\n"
    assert command("generate", *flags, "--stop", "nothing like that", "--stop", stop).out != whole
    assert command("generate", *flags, "--stop", "nothing like that").out == whole


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("flags", [["--precision=bf16-true"], ["--top_p=0.5", "--min_p=0.1"], ["--sink_tokens=4"]])
def test_other_flags_generate_text(command: Command, flags: list[str]) -> None:
    outcome = command("generate", "--max_new_tokens=40", "--prompt=the", *flags)  # longer than the context of 32
    assert outcome.code == 0, outcome.err
    assert len(outcome.out) > len("the\n")


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sink_tokens=32"], "sink_tokens is 32; it must be 0 or more, and below the context length, 32"),
        (["--sink_tokens=4", "--rank=answers.jsonl"], "argument --rank cannot be combined with --sink_tokens"),
    ],
)
def test_wrong_numbers_of_sink_tokens(command: Command, flags: list[str], message: str) -> None:
    outcome = command("generate", "--prompt=the", *flags)
    assert outcome.code == 2
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


@pytest.mark.usefixtures("model")
def test_compile_compiles_the_decoding_step(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """That compiled code generates the same text is tested with the step itself; here the backend does nothing."""
    compiler, asked = torch.compile, []

    def compile(*args: Any, **settings: Any) -> Any:
        asked.append(args)
        return compiler(*args, **{**settings, "backend": "eager"})

    monkeypatch.setattr(torch, "compile", compile)
    flags = ["--max_new_tokens=40", "--prompt=the", "--temperature=0"]
    plain, compiled = command("generate", *flags), command("generate", *flags, "--compile")
    assert compiled.code == 0, compiled.err
    assert len(asked) == 1
    assert compiled.out == plain.out


def test_a_checkpoint_runs_user_code_only_with_trust(command: Command, small: list[str]) -> None:
    assert command("fit", *small, f"--model.gpt.attention={OWN}").code == 0
    for args in (["--max_new_tokens=3"], ["--trust=os.system"]):
        rejected = command("generate", RUN, *args)
        assert rejected.code == 2
        assert f"--trust {OWN}" in rejected.err
    assert command("generate", RUN, "--max_new_tokens=3", f"--trust={OWN}").code == 0
    assert command("fit", "--ckpt_path=last", "--trainer.max_steps=14").code == 0
    rejected = command("convert", "to-hf", RUN, "exported")
    assert rejected.code == 2
    assert "attention" in rejected.err
    assert not Path("exported").exists()


def test_lists_of_factors_survive_flags_configs_and_checkpoints(command: Command, small: list[str]) -> None:
    flags = [
        "--model.gpt.head_dim=8", "--model.gpt.rotary_scaling=longrope", "--model.gpt.rotary_trained_context=20",
        "--model.gpt.rotary_factor=1.6", "--model.gpt.rotary_short_factors=[1, 1, 1.5, 2]",
        "--model.gpt.rotary_long_factors=[1,2.5,3,4]",
    ]  # fmt: skip
    assert command("fit", *small, *flags).code == 0
    assert "rotary_long_factors:\n      - 1.0\n      - 2.5\n" in (RUN / "config.yaml").read_text()
    assert command("fit", "--ckpt_path=last", "--trainer.max_steps=14").code == 0
    assert command("fit", f"--config={RUN / 'config.yaml'}", "--trainer.max_steps=1").code == 0
    long = command("generate", RUN, "--max_new_tokens=40", "--prompt=the", "--temperature=0").out
    for name in ("model.safetensors", "hf"):
        assert command("convert", "to-hf" if name == "hf" else "to-safetensors", RUN, name).code == 0
        assert command("generate", name, "--max_new_tokens=40", "--prompt=the", "--temperature=0").out == long
    rejected = command("fit", *small, *flags[:-1], "--model.gpt.rotary_long_factors=[1,2]")
    assert rejected.code == 2
    assert "model.gpt.rotary_long_factors has 2 numbers" in rejected.err


def test_the_last_preset_is_used() -> None:
    assert EarlyFlags.scan([]).get("preset") is EarlyFlags.scan(["--plan"]).get("preset") is None
    assert EarlyFlags.scan(["--preset=nano", "--preset", "mini"]).get("preset") == "mini"


@pytest.mark.slow
def test_configs_and_flags_override_a_preset(command: Command, small: list[str]) -> None:
    shape = ["--preset=gpt2_124m", "--model.gpt.n_head=4", "--model.gpt.ffn_dim=64"]
    assert command("fit", *shape, *small).code == 0
    config = (RUN / "config.yaml").read_text()
    for line in ("preset: gpt2_124m", "n_embd: 32", "n_head: 2", "ffn_dim: 64", "position: learned", "norm: layernorm"):
        assert f"{line}\n" in config, line
    assert command("fit", "--ckpt_path=last", "--trainer.max_steps=14").code == 0
    Path("mine.yaml").write_text("preset: micro\nmodel:\n  init_args:\n    gpt:\n      n_layer: 7\n")
    shown = command("fit", "--config=mine.yaml", "--print_config").out
    assert "n_layer: 7\n" in shown
    assert "n_embd: 256\n" in shown
    assert "n_embd: 128\n" in command("fit", "--config=mine.yaml", "--preset", "nano", "--print_config").out
