"""A tokenizer is a flag: any kind, or a file, from training to evaluation."""

import json
from pathlib import Path

import pytest

from lit_gpt_scratch.text.tokenizer import Tokenizer
from lit_gpt_scratch.text.tokenizer_training import TOKENIZER_KINDS
from tests.end_to_end.conftest import Command, Trained

RUN = Path("runs/pretrain/version_0")


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_any_kind_trains_generates_and_evaluates(command: Command, small: list[str], corpus: Path, kind: str) -> None:
    special = "--data.special_tokens=['<|user|>']"
    as_many_as_there_are = [flag for flag in small if "vocab_size" not in flag]
    done = command("fit", *as_many_as_there_are, f"--data.tokenizer={kind}", special)
    assert done.code == 0, done.err
    tokenizer = Tokenizer.load(RUN)
    assert "<|user|>" in tokenizer.to_json()
    assert ("the tokenizer is lossy" in done.err) == (kind == "char")
    wrote = command("generate", "--prompt", "a b", "--max_new_tokens", "20")
    assert wrote.code == 0, wrote.err
    scored = command("evaluate", "--data.source", corpus, "--json")
    assert scored.code == 0, scored.err
    figures = json.loads(scored.out)
    assert 0 < figures["bits_per_byte"] < 20
    assert ("the tokenizer loses text" in scored.err) == (kind == "char")
    again = command("fit", "--ckpt_path=last", "--trainer.max_steps=14", "--data.tokenizer=byte")
    assert again.code == (0 if kind == "byte" else 2)


def test_what_prepare_makes_is_what_fit_finds(command: Command, small: list[str]) -> None:
    of_data = [flag for flag in small if flag.startswith("--data.") and "block_size" not in flag]
    made = command("prepare", *of_data)
    assert made.code == 0, made.err
    assert "training    " in made.out
    assert "tokenizer   bpe, 300 tokens" in made.out
    done = command("fit", *small)
    assert done.code == 0
    assert "encoding" not in done.err


def test_tokenizers_are_compared_on_what_is_held_out(command: Command, small: list[str]) -> None:
    of_data = [flag for flag in small if flag.startswith("--data.") and "vocab_size" not in flag]
    table = command("prepare", *of_data, "--data.vocab_size=600", f"--compare={','.join(TOKENIZER_KINDS)}")
    assert table.code == 0, table.err
    head, *rows = table.out.splitlines()
    assert head.split()[0] == "tokenizer"
    assert [row.split()[0] for row in rows] == list(TOKENIZER_KINDS)
    per_token = {row.split()[0]: float(row.split()[2]) for row in rows}
    assert per_token["byte"] == 1.0 <= per_token["char"] < per_token["wordpiece"]
    assert per_token["bpe"] > 1.5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--compare=bpe,wordpeace"], "'wordpeace' is no kind of tokenizer"),
        (["--data.tokenizer=wordpiece", "--data.vocab_size=300"], "a tokenizer of kind wordpiece has at least 513"),
        (["--data.tokenizer=wordpeace"], "wordpeace is not a usable tokenizer file"),
        (["--data.special_tokens=['<|endoftext|>']"], "is empty or repeated"),
        (["--data.vocab_size=5000"], "gives a tokenizer of kind bpe only"),
    ],
)
def test_a_mistake_is_one_line(command: Command, small: list[str], flags: list[str], said: str) -> None:
    of_data = [flag for flag in small if flag.startswith("--data.")]
    refused = command("prepare", *of_data, *flags)
    assert refused.code == 2
    assert said in refused.err.splitlines()[-1]


def test_a_folder_with_a_tokenizer_will_do(command: Command, small: list[str], trained: Trained) -> None:
    trained(*small)
    again = command("fit", *small, f"--data.tokenizer={RUN}")
    assert again.code == 0, again.err
    assert Tokenizer.load(RUN.with_name("version_1")).to_json() == Tokenizer.load(RUN).to_json()
