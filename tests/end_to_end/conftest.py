"""Drive the doors as a user does: flags in, standard output, standard error and an exit code out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lit_gpt_scratch.cli import convert, doctor, door, evaluate, fit, generate, prepare, sweep


@dataclass
class Outcome:
    """What a command left in the terminal."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a door in this process, in an empty folder; the imports alone would take seconds in a new one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    doors = {
        "fit": fit,
        "generate": generate,
        "evaluate": evaluate,
        "convert": convert,
        "doctor": doctor,
        "prepare": prepare,
        "sweep": sweep,
    }

    def run(name: str, *args: str | Path) -> Outcome:
        code = 0
        try:
            door.run(lambda: doors[name].main([str(arg) for arg in args]))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        said = capsys.readouterr()
        return Outcome(code, said.out, said.err)

    return run


@pytest.fixture
def small(corpus: Path, cache: Path) -> list[str]:
    """Flags of a run that takes a second."""
    return [
        f"--data.source={corpus}", f"--data.cache={cache}", "--data.vocab_size=300", "--data.block_size=32",
        "--data.batch_size=4", "--data.validation_share=0.1", "--model.gpt.n_layer=2", "--model.gpt.n_head=2",
        "--model.gpt.n_embd=32", "--model.compile=false", "--trainer.accelerator=cpu", "--trainer.max_steps=12",
        "--trainer.log_every_n_steps=4", "--trainer.val_check_interval=8", "--trainer.precision=32-true",
    ]  # fmt: skip


STAGES = {
    "pretraining": [],
    "instructions": ["--data=Conversations", "--data.block_size=64"],
    "instructions, adapters": [
        "--data=Conversations", "--data.block_size=64", "--model.lora.rank=2", "--model.gpt.initialisation=gpt2",
    ],
    "classes": ["--model=Classification", "--data=LabelledText"],
    "classes, last layer, weighed": [
        "--model=Classification", "--data=LabelledText", "--model.train_layers=1", "--model.pooling=mean",
        "--model.class_weights=balanced",
    ],
}  # fmt: skip
"""Flags over those of ``small``, by what is learned."""


@pytest.fixture
def staged(small: list[str]) -> Callable[[str], list[str]]:
    """Flags of a run of a stage, on data that is generated; in pretraining on a corpus."""

    def flags(stage: str) -> list[str]:
        of_records = "--data=Conversations" in STAGES[stage] or "--data=LabelledText" in STAGES[stage]
        kept = [flag for flag in small if not (of_records and flag.startswith("--data.source"))]
        # A class is named before what it is told.
        return [*(flag for flag in STAGES[stage] if "." not in flag), *kept, *(f for f in STAGES[stage] if "." in f)]

    return flags
