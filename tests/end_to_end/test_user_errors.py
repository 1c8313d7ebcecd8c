"""A user's mistake prints one line that names the flag or the file, exits with code 2 and leaves nothing behind."""

import os
from pathlib import Path

import pytest
import torch

from lit_gpt_scratch.tasks import LanguageModel
from tests.end_to_end.conftest import Command, Outcome


def one_line(outcome: Outcome, *expected: str) -> None:
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    [line] = [
        line for line in outcome.err.splitlines() if not line.startswith(("training a", "encoding", "first step"))
    ]
    assert line.startswith("error: ")
    for word in expected:
        assert word in line


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--no_such_flag", "3"], ["no_such_flag"]),
        (["--model.gpt.n_layers", "3"], ["n_layers"]),
        (["--trainer.max_stepz=3"], ["max_stepz"]),
        (["--model.gpt.n_layer", "three"], ["model.gpt.n_layer", "three"]),
        (["--trainer.max_steps", "many"], ["trainer.max_steps", "many"]),
        (["--data.batch_size", "2.5"], ["data.batch_size", "2.5"]),
        (["--model.optimizer.lr", "fast"], ["model.optimizer.lr", "fast"]),
        (["--model.gpt.n_embd", "33"], ["model.gpt.n_embd (33)", "model.gpt.n_head (2)"]),
        (["--model.gpt.n_layer", "0"], ["model.gpt.n_layer is 0"]),
        (["--model.gpt.n_head", "-2"], ["model.gpt.n_head is -2"]),
        (["--data.block_size", "0"], ["data.block_size is 0"]),
        (["--data.vocab_size", "-5"], ["data.vocab_size is -5"]),
        (["--data.vocab_size", "100"], ["data.vocab_size is 100"]),
        (["--model.gpt.n_layer=1000000000"], ["model.gpt.n_layer is 1000000000", "at most 10000"]),
        (["--model.gpt.n_layer=9999", "--model.gpt.n_embd=8192"], ["model.gpt", "GiB"]),
        (["--model.gpt.n_embd=2147483646"], ["model.gpt"]),
        (["--model.gpt.n_embd=1000000000000000000000"], ["model.gpt.n_embd is an integer of more than 64 bits"]),
        (["--model.gpt.vocab_multiple=2000000000"], ["model.gpt", "GiB"]),
        (["--model.gpt.bigram_rows=2147483647"], ["model.gpt", "GiB"]),
        (["--data.block_size=1000000000"], ["fewer than one window of 1000000000"]),
        (["--data.vocab_size=1000000000000"], ["data.vocab_size is 1000000000000"]),
        (["--model.lora.rank=1000000000000"], ["lora.rank is 1000000000000"]),
        (["--model.gpt.position", "sideways"], ["model.gpt.position", "sideways"]),
        (["--preset", "gpt5"], ["--preset is gpt5", "gpt2_124m"]),
        (["--model.gpt.attention", "no_file.Mine"], ["model.gpt.attention is no_file.Mine", "No module named"]),
        (["--model.gpt.attention", "latnt"], ["attention is latnt; it must be one of latent, or an import path"]),
        (["--model.gpt.feed_forward", "no_file.Mine"], ["model.gpt.feed_forward is no_file.Mine", "No module named"]),
        (["--model.gpt.feed_forward", "os.path"], ["model.gpt.feed_forward is os.path", "not a subclass"]),
        (["--model.gpt.attention", "os.path"], ["model.gpt.attention is os.path", "not a subclass"]),
        (
            ["--model.gpt.attention_backend=sdpa", "--model.gpt.attention_softcap=5"],
            ["model.gpt.attention_backend is sdpa", "model.gpt.attention_softcap is 5"],
        ),
        (
            ["--model.gpt.position=alibi", "--model.gpt.rotary_share=0.5"],
            ["model.gpt.position is alibi", "model.gpt.rotary_share is 0.5"],
        ),
        (["--model.gpt.attention_backend=flex"], ["model.gpt.attention_backend is flex", "cpu", "choose auto"]),
        (["--model.optimizer", "Adamax"], ["model.optimizer", "Adamax"]),
        (["--model.optimizer.lr", "-1"], ["model.optimizer.lr is -1"]),
        (["--checkpoint.every_n_steps", "0"], ["checkpoint.every_n_steps is 0"]),
        (["--inspect.every_n_steps", "-1"], ["inspect.every_n_steps is -1"]),
        (["--data.source", "no/such/text.txt"], ["no/such/text.txt"]),
        (["--data.tokenizer", "no/tokenizer.json"], ["no/tokenizer.json"]),
        (["--data.block_size", "100000"], ["fewer than one window of 100000"]),
        (["--config", "no.yaml"], ["no.yaml"]),
        (["--trainer.strategy", "teleport"], ["strategy", "teleport"]),
        (["--trainer.accelerator", "abacus"], ["abacus"]),
        (["--trainer.precision", "3-mixed"], ["precision", "3-mixed"]),
        (["--trainer.precision", "16-mixed"], ["--trainer.precision 16-mixed", "use --trainer.precision bf16-mixed"]),
        (["--trainer.strategy", "fsdp"], ["--trainer.strategy fsdp", "fsdp2"]),
        (["--trainer.max_steps", "-7"], ["max_steps", "-7"]),
        (["--ckpt_path", "last"], ["no run with a checkpoint", "lit_gpt_scratch.fit"]),
        (["--ckpt_path", "no.ckpt"], ["no.ckpt"]),
        (["--ckpt_path="], ["no checkpoint"]),
        (["--data.source="], ["data.source is empty"]),
        (["--experiment="], ["--experiment is ''"]),
        (["--experiment=a/b"], ["--experiment is 'a/b'"]),
        (["--experiment=.."], ["--experiment is '..'"]),
        (["--experiment=."], ["--experiment is '.'"]),
        (["--experiment=${HOME}"], ["--experiment is '${HOME}'"]),
        (["--seed_everything=-1"], ["seed_everything", "-1"]),
        (["--seed_everything=4294967296"], ["--seed_everything is 4294967296", "4294967295"]),
        (["--trainer.val_check_interval=0"], ["--trainer.val_check_interval is 0"]),
        (["--trainer.accumulate_grad_batches=0"], ["--trainer.accumulate_grad_batches is 0"]),
        (["--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=800"], ["val_check_interval"]),
        (["--trainer.limit_train_batches=0"], ["--trainer.limit_train_batches is 0", "no training steps"]),
        (["--trainer.limit_val_batches=1.5"], ["--trainer.limit_val_batches is 1.5", "fraction"]),
        (["--trainer.callbacks=nope.Mine"], ["--trainer.callbacks: class nope.Mine not found", "no module nope"]),
        (["--trainer.callbacks=Nope"], ["--trainer.callbacks", "class Nope not found"]),
        (["--trainer.callbacks=EarlyStopping"], ["--trainer.callbacks", "monitor"]),
        (["--trainer.max_steps=0"], ["no training steps"]),
    ],
)
def test_invalid_flags(
    command: Command, small: list[str], tmp_path: Path, flags: list[str], expected: list[str]
) -> None:
    one_line(command("fit", *small, *flags), *expected)
    assert not (tmp_path / "runs").exists()


def test_flags_that_contradict_the_cluster(command: Command, small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    one_line(command("fit", *small), "--ntasks=2", "--ntasks-per-node=2")


def test_out_of_memory(command: Command, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def training_step(*_: object) -> None:
        torch.empty(2**60)  # the allocator raises its own error

    monkeypatch.setattr(LanguageModel, "training_step", training_step)
    expected = (
        "out of memory while allocating ",
        "--data.batch_size 2 --data.tokens_per_step 128; or --model.activation_checkpointing",
    )
    outcome = command("fit", *small)
    assert outcome.code == 2
    assert all(words in outcome.err.splitlines()[-1] for words in expected), outcome.err  # the plan is printed above it
    assert not (tmp_path / "runs").exists()


def test_a_missing_compiler(
    command: Command, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    one_line(command("fit", *small, "--model.compile=true"), "model.compile: no compiler (no-such-compiler)")
    assert not list(tmp_path.glob("runs/*/*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu(command: Command, small: list[str], tmp_path: Path) -> None:
    one_line(command("fit", *small, "--trainer.accelerator", "gpu"), "gpu")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["empty file", "empty folder", "folder without text", "binary file", "short file"])
def test_an_unusable_corpus(command: Command, small: list[str], tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    if "folder" in kind:
        source.mkdir()
        if kind == "folder without text":
            (source / "picture.png").write_bytes(b"\x89PNG\r\n\0")
    else:
        source.write_bytes({"empty file": b"", "binary file": b"\0\1\xff", "short file": b"too short"}[kind])
    one_line(command("fit", *small, "--data.source", source), str(source))
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_that_is_not_writable(command: Command, small: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    one_line(command("fit", *small, "--runs", tmp_path / "file"), "--runs", "file")
    one_line(command("fit", *small, "--runs", tmp_path / "file" / "runs"), "--runs", "file")
    if os.geteuid():  # root can write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        one_line(command("fit", *small, "--runs", tmp_path / "closed"), "--runs", "closed")


@pytest.mark.parametrize("name", ["fit", "generate", "evaluate"])
def test_a_file_that_is_no_checkpoint(command: Command, small: list[str], tmp_path: Path, name: str) -> None:
    path = tmp_path / "notes.ckpt"
    path.write_text("not a checkpoint", encoding="utf-8")
    source = tmp_path / "text.txt"
    source.write_text("text", encoding="utf-8")
    args = {"fit": [*small, "--ckpt_path", path], "generate": [path], "evaluate": [path, "--data.source", source]}
    one_line(command(name, *args[name]), str(path))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("generate", [], "no run with a checkpoint"),
        ("generate", ["--temperature", "-1"], "temperature is -1"),
        ("generate", ["--temperature", "warm"], "--temperature"),
        ("generate", ["--top_k", "0"], "top_k is 0"),
        ("generate", ["--top_p", "1.5"], "top_p is 1.5"),
        ("generate", ["--min_p", "0"], "min_p is 0"),
        ("generate", ["--repetition_penalty", "-1"], "repetition_penalty is -1"),
        ("generate", ["--samples", "0"], "--samples is 0"),
        ("generate", ["--precision", "16-mixed"], "--precision"),
        ("generate", ["--stop", "\udc80"], "--stop"),
        ("generate", ["--seed", "-1"], "--seed"),
        ("generate", ["--promt", "x"], "--promt"),
        ("generate", ["--prompt", "\udc80"], "--prompt"),
        ("evaluate", ["--data.source", ""], "data.source is empty"),
        ("evaluate", ["--data.source", "stdlib"], "no run with a checkpoint"),
        ("evaluate", [], "--data.source"),
        ("doctor", ["--resum"], "--resum"),
        ("doctor", ["no/such"], "no/such contains no TensorBoard events"),
        ("fit", ["--guard", "rewind"], "--guard"),
        ("doctor", ["no/such", "--kills", "3"], "--kills requires --resume"),
        ("doctor", ["--layouts", "ddp 2"], "--layouts requires --parity"),
        ("doctor", ["--json"], "--json requires a run folder"),
        ("doctor", ["--resume", "--kills", "0"], "--kills is 0"),
        ("doctor", ["--minutes", "3"], "--minutes requires --acceptance"),
        ("doctor", ["--text", "x", "--parity"], "--text requires --acceptance"),
        ("doctor", ["--rows", "MFU"], "--rows requires --acceptance"),
        ("doctor", ["--acceptance", "--rows", "no such row"], "no row matches 'no such row'"),
        ("doctor", ["--acceptance", "--minutes", "0"], "--minutes is 0"),
        ("doctor", ["--acceptance", "--minutes", "soon"], "--minutes: invalid float value"),
        ("doctor", ["--acceptance", "--resume"], "not allowed with argument"),
        ("doctor", ["--widths", "64", "128"], "--widths requires --coordinates"),
        ("doctor", ["--coordinates", "--data.batch_size=3"], "--data.batch_size=3 has no effect with --coordinates"),
        ("doctor", ["--coordinates", "--widths", "64"], "requires at least two widths"),
        ("doctor", ["--coordinates", "--widths", "64", "70"], "a width of 70 channels is not divisible by 16"),
        ("doctor", ["--coordinates", "--model.gpt.parametrisation=mup"], "model.gpt.mup_base_width is not set"),
        ("doctor", ["--acceptance", "--kills", "3"], "--kills requires --resume"),
        ("doctor", ["--acceptance", "no/such"], "with --acceptance: no/such"),
        ("doctor", ["--acceptance", "--json"], "with --acceptance: --json"),
        ("doctor", ["--acceptance", "--trainer.max_steps=3"], "with --acceptance: --trainer.max_steps=3"),
        ("doctor", ["--acceptance", "--text", "no/such"], "--text: no/such is not a file"),
        ("doctor", ["--acceptance", "--out", "/dev/null/x"], "--out: cannot write to /dev/null/x"),
        ("doctor", ["--resume", "--runs=x"], "--runs=x is not supported by doctor"),
        pytest.param(
            "doctor",
            ["--resume", "--data.source", "no/such"],
            "it was not killed: error: no such file or folder",
            marks=pytest.mark.slow,
        ),
        ("convert", ["to-safetensors", "x.ckpt", "x.bin"], "x.bin does not end with .safetensors"),
        ("convert", ["to-hf", "x.ckpt", "x.safetensors"], "to-hf"),
        ("evaluate", ["--data.source", "no/such"], "no/such"),
    ],
)
def test_mistakes_in_other_commands(command: Command, name: str, flags: list[str], expected: str) -> None:
    one_line(command(name, *flags), expected)


LONG_NAME = "a" * 5000


TOO_LONG = ["ame too long"]  # file name, or the system's File name


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        *(
            ("fit", [f"--{flag}={LONG_NAME}"], TOO_LONG)
            for flag in (
                "config", "ckpt_path", "runs", "experiment", "model.init_from", "data.source", "data.store",
                "data.cache", "model",
            )
        ),
        ("fit", [f"--data={LONG_NAME}"], ["--data", "not found"]),
        ("fit", [f"--data.tokenizer={LONG_NAME}"], []),
        *((name, [LONG_NAME], TOO_LONG) for name in ("generate", "sweep", "doctor")),
        ("evaluate", ["--data.source", LONG_NAME], TOO_LONG),
        ("convert", ["to-hf", LONG_NAME, "x"], TOO_LONG),
        ("convert", ["from-hf", LONG_NAME, "x.ckpt"], TOO_LONG),
        ("prepare", ["--data.source", LONG_NAME], TOO_LONG),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value).replace(LONG_NAME, "long"),
)  # fmt: skip
def test_names_that_are_too_long(
    command: Command, small: list[str], name: str, flags: list[str], expected: list[str]
) -> None:
    """Each operation on such a path raises ``OSError``, even ``Path.exists``."""
    if name == "sweep":
        pytest.importorskip("optuna")
    one_line(command(name, *(small if name == "fit" else []), *flags), *expected)
    assert not list(Path().iterdir())
