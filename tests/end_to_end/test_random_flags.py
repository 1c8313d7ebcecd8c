"""Random flags either build a run or print one line of error: no traceback, and nothing is left behind."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt_scratch.lightning_compat import UnobservedLauncher
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.tasks import gpt_module
from tests.end_to_end.conftest import Command

NUMBERS = [
    "0", "1", "-1", "2", "3", "7", "16", "64", "255", "1000", "1000000000", "9223372036854775808", "1e30", "1e-300",
    "0.5", "1.5", "-0.1", "nan", "inf", "-inf", "0x10", "1_000", " 4 ", "null", "true",
]  # fmt: skip
TEXTS = [
    "", " ", "null", "None", "[]", "{}", "[1,2]", "{'a': 1}", "..", "/dev/null", "no/such/file", "a" * 5000,
    "\u0000", "\u202e\U0001f600", "${HOME}", "%s", "{0}", "os.system", "!!python/object/apply:os.system [exit]",
    "class_path: os.system", "{'class_path': 'os.mkdir', 'init_args': {'path': 'exploded'}}", "--", "-1", "*", "&a *a",
    "rotary", "learned", "constant", "AdamW", "Muon", "stdlib", "ddp", "cpu", "gpu", "tpu", "auto", "16-mixed", "64",
]  # fmt: skip
FLAGS = {
    "--model.gpt.n_layer": NUMBERS, "--model.gpt.n_head": NUMBERS, "--model.gpt.n_embd": NUMBERS,
    "--model.gpt.n_kv_head": NUMBERS, "--model.gpt.head_dim": NUMBERS, "--model.gpt.dropout": NUMBERS,
    "--model.gpt.position": TEXTS, "--model.gpt": TEXTS, "--model.gpt.bigram_rows": NUMBERS, "--model.compile": TEXTS,
    "--model.optimizer": TEXTS, "--model.optimizer.lr": NUMBERS, "--model.optimizer.weight_decay": NUMBERS,
    "--model.schedule.warmup_steps": NUMBERS, "--model.schedule.decay": TEXTS, "--model.schedule.decay_share": NUMBERS,
    "--model.schedule.stages": [*TEXTS, "[[0.5, 0.1]]", "[[1, 2, 3]]"],
    "--model": TEXTS, "--data": TEXTS, "--data.source": TEXTS, "--data.tokenizer": TEXTS, "--data.cache": TEXTS,
    "--data.vocab_size": NUMBERS, "--data.block_size": NUMBERS, "--data.batch_size": NUMBERS,
    "--data.block_size_stages": [*TEXTS, "[[0.5, 8]]", "[[1, 2, 3]]"],
    "--data.tokens_per_step_stages": [*TEXTS, "[[0.5, 128]]", "[[0.5, 0.5]]"],
    "--data.tokens_per_step": NUMBERS, "--data.validation_share": NUMBERS, "--data.num_workers": NUMBERS,
    "--data.seed": NUMBERS, "--trainer.max_steps": NUMBERS, "--trainer.max_epochs": NUMBERS,
    "--trainer.max_time": [*TEXTS, "00:00:00:01", "{'hours': 1}"], "--trainer.precision": TEXTS,
    "--trainer.accelerator": TEXTS, "--trainer.strategy": TEXTS, "--trainer.devices": [*NUMBERS, *TEXTS],
    "--trainer.num_nodes": NUMBERS, "--trainer.gradient_clip_val": NUMBERS, "--trainer.log_every_n_steps": NUMBERS,
    "--trainer.val_check_interval": NUMBERS, "--trainer.limit_train_batches": NUMBERS,
    "--trainer.limit_val_batches": NUMBERS, "--trainer.accumulate_grad_batches": NUMBERS,
    "--trainer.callbacks": TEXTS, "--trainer.logger": TEXTS, "--trainer.plugins": TEXTS,
    "--checkpoint.every_n_steps": NUMBERS, "--checkpoint.every_minutes": NUMBERS, "--checkpoint.keep_best": NUMBERS,
    "--checkpoint.background": TEXTS, "--seed_everything": NUMBERS, "--runs": TEXTS, "--experiment": TEXTS,
    "--model.init_from": TEXTS, "--model.lora.rank": NUMBERS, "--model.train_layers": NUMBERS,
    "--ckpt_path": TEXTS, "--config": TEXTS, "--no_such_flag": TEXTS, "--trainer.no_such_flag": NUMBERS,
}  # fmt: skip


class BuiltError(Exception):
    """Raised instead of building the model: all flags were accepted."""


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*sizes: Any) -> GPT:
        with torch.device("meta"):  # an invalid architecture fails here
            GPT(*sizes)
        raise BuiltError

    monkeypatch.setattr(gpt_module, "GPT", build)
    monkeypatch.setattr(UnobservedLauncher, "launch", accept)


def accept(self: object, function: Any, *args: Any, trainer: object = None, **kwargs: Any) -> Any:
    """Replaces launching further processes: all flags were accepted."""
    raise BuiltError


def outcome_of(command: Command, flags: list[str]) -> str:
    """Return ``accepted``, ``rejected``, or a description of wrong output."""
    try:
        outcome = command("fit", *flags)
    except BuiltError:
        return "accepted"
    except Exception as error:
        return f"a traceback: {error!r}"
    lines = [line for line in outcome.err.splitlines() if not line.startswith(("training a", "encoding"))]
    if outcome.code != 2 or len(lines) != 1 or not lines[0].startswith("error: "):
        return f"exit code {outcome.code}, output: {lines}"
    return "rejected"


def random_flags(command: Command, small: list[str], n: int, seed: int) -> Counter[str]:
    rng, found = random.Random(seed), Counter[str]()
    wrong = []
    for _ in range(n):
        flags = [f"{name}={rng.choice(FLAGS[name])}" for name in rng.sample(list(FLAGS), rng.choice([1, 1, 1, 2, 3]))]
        answer = outcome_of(command, [*small, *flags])
        found[answer if answer in ("accepted", "rejected") else "wrong"] += 1
        if answer not in ("accepted", "rejected"):
            wrong.append(f"{[flag[:80] for flag in flags]}: {answer[:400]}")
    assert not wrong, "\n".join(wrong)
    assert not Path("exploded").exists()
    assert not list(Path().glob("runs/*/*"))
    return found


@pytest.mark.usefixtures("built")
def test_random_flags(command: Command, small: list[str]) -> None:
    found = random_flags(command, small, 15, seed=0)
    assert found["accepted"] > 1
    assert found["rejected"] > 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("built")
def test_two_thousand_random_flags(command: Command, small: list[str]) -> None:
    print(random_flags(command, small, 2000, seed=1))
