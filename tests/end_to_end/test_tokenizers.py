"""``--data.tokenizer``: any kind, or a file, from training to evaluation."""

import json
from pathlib import Path

import pytest

from lit_gpt_scratch.text.tokenizer import Tokenizer
from lit_gpt_scratch.text.tokenizer_training import TOKENIZER_KINDS
from tests.end_to_end.conftest import Command, Trained

RUN = Path("runs/pretrain/version_0")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in ("bpe", "char"))) for kind in TOKENIZER_KINDS]
)
def test_any_kind_trains_generates_and_evaluates(command: Command, small: list[str], corpus: Path, kind: str) -> None:
    special = "--data.special_tokens=['<|user|>']"
    without_vocab_size = [flag for flag in small if "vocab_size" not in flag]
    done = command("fit", *without_vocab_size, f"--data.tokenizer={kind}", special, "--trainer.max_steps=2")
    assert done.code == 0, done.err
    tokenizer = Tokenizer.load(RUN)
    assert "<|user|>" in tokenizer.to_json()
    assert ("the tokenizer is lossy" in done.err) == (kind == "char")
    generated = command("generate", "--prompt", "a b", "--max_new_tokens", "20")
    assert generated.code == 0, generated.err
    evaluated = command("evaluate", "--data.source", corpus / "00.txt", "--json")
    assert evaluated.code == 0, evaluated.err
    metrics = json.loads(evaluated.out)
    assert 0 < metrics["bits_per_byte"] < 20
    assert ("the tokenizer is lossy" in evaluated.err) == (kind == "char")
    again = command("fit", "--ckpt_path=last", "--trainer.max_steps=4", "--data.tokenizer=byte")
    assert again.code == (0 if kind == "byte" else 2)


def test_fit_uses_the_store_that_prepare_made(command: Command, small: list[str]) -> None:
    data_flags = [flag for flag in small if flag.startswith("--data.") and "block_size" not in flag]
    made = command("prepare", *data_flags)
    assert made.code == 0, made.err
    assert "training    " in made.out
    assert "tokenizer   bpe, 300 tokens" in made.out
    done = command("fit", *small)
    assert done.code == 0
    assert "encoding" not in done.err


def test_compare_measures_on_held_out_text(command: Command, small: list[str]) -> None:
    data_flags = [flag for flag in small if flag.startswith("--data.") and "vocab_size" not in flag]
    table = command("prepare", *data_flags, "--data.vocab_size=600", f"--compare={','.join(TOKENIZER_KINDS)}")
    assert table.code == 0, table.err
    head, *rows = table.out.splitlines()
    assert head.split()[0] == "tokenizer"
    assert [row.split()[0] for row in rows] == list(TOKENIZER_KINDS)
    per_token = {row.split()[0]: float(row.split()[2]) for row in rows}
    assert per_token["byte"] == 1.0 <= per_token["char"] < per_token["wordpiece"]
    assert per_token["bpe"] > 1.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compare=bpe,wordpeace"], "'wordpeace' is not a tokenizer type"),
        (
            ["--data.tokenizer=wordpiece", "--data.vocab_size=300"],
            "a wordpiece tokenizer requires at least 513",
        ),
        (["--data.tokenizer=wordpeace"], "wordpeace is not a usable tokenizer file"),
        (["--data.special_tokens=['<|endoftext|>']"], "is empty or repeated"),
        (["--data.vocab_size=5000"], "yields a bpe tokenizer of only"),
    ],
)
def test_mistake_is_one_line(command: Command, small: list[str], flags: list[str], message: str) -> None:
    data_flags = [flag for flag in small if flag.startswith("--data.")]
    failed = command("prepare", *data_flags, *flags)
    assert failed.code == 2
    assert message in failed.err.splitlines()[-1]


def test_tokenizer_of_a_run_folder(command: Command, small: list[str], trained: Trained) -> None:
    trained(*small)
    again = command("fit", *small, f"--data.tokenizer={RUN}")
    assert again.code == 0, again.err
    assert Tokenizer.load(RUN.with_name("version_1")).to_json() == Tokenizer.load(RUN).to_json()
