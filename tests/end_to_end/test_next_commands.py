"""Each command that a run offers under "Next:" succeeds, however the run ended."""

import io
import shlex
from pathlib import Path

import pytest

from tests.end_to_end.conftest import STAGES, Command

NO_STEPS = "--trainer.max_steps=-1"
EARLY_STOPPING = ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss",
                  "--trainer.callbacks.min_delta=100", "--trainer.callbacks.patience=1",
                  "--trainer.val_check_interval=2"]  # fmt: skip
TIMER = ["--trainer.callbacks=Timer", "--trainer.callbacks.duration=00:00:00:01"]
ATTENTION = "tests.custom_attention.DoubledAttention"
QUICK = "early stopping", "quoted path"
ENDINGS: dict[str, tuple[list[str], list[str]]] = {
    "max_steps": (["--trainer.max_steps=3"], ["generate", "fit --trainer.max_steps 6", "tensorboard"]),
    "max_epochs": (
        [NO_STEPS, "--trainer.max_epochs=1", "--trainer.limit_train_batches=3"],
        ["generate", "fit --trainer.max_epochs 2", "tensorboard"],
    ),
    "max_steps and max_epochs": (
        ["--trainer.max_steps=3", "--trainer.max_epochs=1", "--trainer.limit_train_batches=3"],
        ["generate", "fit --trainer.max_steps 6 --trainer.max_epochs 2", "tensorboard"],
    ),
    "max_time": (
        [NO_STEPS, "--trainer.max_time=00:00:00:01"],
        ["generate", "fit --trainer.max_time 00:00:00:02", "tensorboard"],
    ),
    "timer": ([NO_STEPS, *TIMER], ["generate", "tensorboard"]),  # no flag extends it
    "early stopping": (EARLY_STOPPING, ["generate", "fit --force", "tensorboard"]),
    "no checkpoints": (["--trainer.enable_checkpointing=false"], ["tensorboard"]),
    "no logger": (["--trainer.logger=false"], ["generate", "fit --trainer.max_steps 24"]),
    "another logger": (
        ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"],
        ["generate", "fit --trainer.max_steps 24"],
    ),
    "own TensorBoard folder": (
        ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=my logs"],
        ["generate", "fit --trainer.max_steps 24", "tensorboard"],
    ),
    "quoted path": (
        ["--runs=my $runs", "--experiment=it's", "--trainer.max_steps=3"],
        ["generate", "fit --trainer.max_steps 6", "tensorboard"],
    ),
    "path like a flag": (["--runs=-r"], ["generate", "fit --trainer.max_steps 24", "tensorboard"]),
    "no validation": (
        ["--trainer.limit_val_batches=0"],
        ["generate", "fit --trainer.max_steps 24", "tensorboard"],
    ),
    "diverged": (
        ["--model.optimizer.adamw_lr=1e30", "--trainer.gradient_clip_val=null"],
        ["doctor", "fit --trainer.max_steps 24", "tensorboard"],
    ),
    "custom attention": (
        [f"--model.gpt.attention={ATTENTION}"],
        ["generate", "fit --trainer.max_steps 24", "tensorboard"],
    ),
}  # fmt: skip


def offered(err: str) -> list[list[str]]:
    """Arguments of the offered commands, as a shell would split them."""
    return [shlex.split(line) for line in err.partition("\nNext:\n")[2].splitlines() if line.startswith("  ")]


def run_all(command: Command, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    for args in commands:
        if args[0] == "tensorboard":
            assert list(Path(args[2]).rglob("events.out.tfevents.*"))
            continue
        monkeypatch.setattr("sys.stdin", io.StringIO(""))  # of a chat
        outcome = command(args[2].removeprefix("lit_gpt_scratch."), *args[3:])
        assert outcome.code == 0, (args, outcome.err)


@pytest.mark.parametrize("ending", [e if e in QUICK else pytest.param(e, marks=pytest.mark.slow) for e in ENDINGS])
def test_every_offered_command_runs(
    command: Command, small: list[str], monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    flags, expected = ENDINGS[ending]
    outcome = command("fit", *small, *flags)
    assert outcome.code == 0, outcome.err
    commands = offered(outcome.err)
    found = []
    for args in commands:
        name = args[2].removeprefix("lit_gpt_scratch.") if args[0] == "python" else args[0]
        found.append(" ".join([name, *args[5:]]) if name == "fit" else name)
        if name == "generate":
            assert args[4] == "--prompt"
            assert args[5] in "".join(path.read_text() for path in Path(small[0].partition("=")[2]).iterdir())
    assert found == expected
    run_all(command, commands, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [stage for stage in STAGES if not stage.startswith("pretraining")])
def test_every_command_that_a_stage_offers_runs(
    command: Command, staged: object, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    outcome = command("fit", *staged(stage), "--trainer.max_steps=2")  # type: ignore[operator]
    assert outcome.code == 0, outcome.err
    commands = offered(outcome.err)
    assert len(commands) == 3
    run_all(command, commands, monkeypatch)
