"""The run plan's lines and warnings."""

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.callbacks.checkpointing import Checkpointing, ValidateAtEnd
from lit_gpt_scratch.callbacks.diagnostics import DiagnosticsCallback
from lit_gpt_scratch.callbacks.progress import format_count
from lit_gpt_scratch.callbacks.run_plan import RunPlan
from lit_gpt_scratch.callbacks.summary import BaselineMetrics, RunSummary
from lit_gpt_scratch.callbacks.throughput import FIRST_STEPS, Throughput
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.cli.prepare import _prepare as print_report
from lit_gpt_scratch.data import Conversations, LabelledText, PackedText, Preferences, Prompts
from lit_gpt_scratch.data.base_datamodule import BaseDataModule, SplitCounts
from lit_gpt_scratch.optim import AdamW, OptimizerRecipe
from lit_gpt_scratch.tasks import LanguageModel, Reward
from tests.conftest import sentences


def plan_lines(
    caplog: pytest.LogCaptureFixture,
    trainer: Callable[..., L.Trainer],
    task: LanguageModel,
    data: PackedText,
    **flags: object,
) -> dict[str, list[str]]:
    with caplog.at_level(logging.INFO, logger="lit_gpt_scratch"):
        trainer(callbacks=[Throughput(), BaselineMetrics(), RunPlan()], **flags).fit(task, data)
    lines: dict[str, list[str]] = {}
    for record in caplog.records:
        lines.setdefault(record.getMessage()[:11].strip(), []).append(record.getMessage()[12:])
    return lines


def test_the_plan_describes_the_run(
    caplog: pytest.LogCaptureFixture,
    trainer: Callable[..., L.Trainer],
    task: Callable[..., LanguageModel],
    packed_text: Callable[..., PackedText],
) -> None:
    data, model = packed_text(tokens_per_step=256), task()
    lines = plan_lines(caplog, trainer, model, data, max_steps=FIRST_STEPS + 1, accumulate_grad_batches=1)
    assert "1 thread; 32-true" in lines["device"][0]
    assert "not compiled" in lines["device"][0]
    assert format_count(sum(p.numel() for p in model.net.parameters())) in lines["model"][0]
    assert f"{data.store.train.n_documents} documents" in lines["data"][0]
    # Two micro-batches of 4 windows of 32 tokens.
    assert f"{FIRST_STEPS + 1} steps of 256 tokens: 2.3 k tokens" in lines["run"][0]
    assert lines["optimizer"] == [
        "muon 26.6 k in 14 matrices at 0.02; adamw 19.2 k in 2 tables at 0.008; adamw 224 in 9 vectors at 0.008"
    ]
    assert "FLOPs per token" in lines["cost"][0]
    assert "uniform" in lines["baselines"][0]
    assert "xz" in lines["baselines"][0]
    assert "ms per step" in lines["time"][0]
    assert lines["time"][0].endswith("tokens per second")  # and no step is left


class Validations(L.Callback):
    """Count the validation runs after the estimate is printed."""

    n = 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.n += trainer.global_step > FIRST_STEPS + 1 and not trainer.sanity_checking


@pytest.mark.parametrize(
    "flags",
    [
        {"max_steps": 15, "val_check_interval": 4, "check_val_every_n_epoch": None},
        {"max_epochs": 4, "limit_train_batches": 6, "val_check_interval": 0.5},
        {"max_epochs": 5, "limit_train_batches": 5, "check_val_every_n_epoch": 2},
        {"max_epochs": 6, "limit_train_batches": 4, "check_val_every_n_epoch": 3, "val_check_interval": 2},
        {"max_steps": 16, "limit_train_batches": 6, "check_val_every_n_epoch": 2, "val_check_interval": 4},
        {"max_steps": 11, "overfit_batches": 1},
        {"max_steps": 11, "limit_val_batches": 0},
        {"max_epochs": 4, "limit_train_batches": 7, "accumulate_grad_batches": 2},
    ],
)
def test_the_plan_follows_the_trainers_limits(
    caplog: pytest.LogCaptureFixture,
    trainer: Callable[..., L.Trainer],
    task: Callable[..., LanguageModel],
    packed_text: Callable[..., PackedText],
    flags: dict[str, Any],
) -> None:
    """The number of validation runs is that of the run itself."""
    validations = Validations()
    runner = trainer(callbacks=[Throughput(), RunPlan(), ValidateAtEnd(), validations], **({"max_steps": -1} | flags))
    with caplog.at_level(logging.INFO, logger="lit_gpt_scratch"):
        runner.fit(task(), packed_text())
    [found] = re.findall(r"for (\d+) steps? and (\d+) validation run", caplog.text)
    assert (int(found[0]), int(found[1])) == (runner.global_step - FIRST_STEPS - 1, validations.n)


@pytest.mark.parametrize("flags", [{"max_steps": -1, "max_epochs": 3}, {"max_steps": 17}])
@pytest.mark.parametrize("scheduling", [{0: 2}, {0: 3, 1: 1}, {1: 4, 2: 1}])
def test_the_plan_counts_scheduled_accumulation(
    caplog: pytest.LogCaptureFixture,
    trainer: Callable[..., L.Trainer],
    task: Callable[..., LanguageModel],
    packed_text: Callable[..., PackedText],
    flags: dict[str, Any],
    scheduling: dict[int, int],
) -> None:
    """The planned steps and tokens are those of the run itself."""
    throughput = Throughput()
    callbacks = [GradientAccumulationScheduler(scheduling), throughput, RunPlan()]
    runner = trainer(callbacks=callbacks, limit_train_batches=7, limit_val_batches=0, **flags)
    with caplog.at_level(logging.INFO, logger="lit_gpt_scratch"):
        runner.fit(task(), packed_text())
    [line] = [record.getMessage() for record in caplog.records if record.getMessage().startswith("run ")]
    assert f"{runner.global_step} steps of " in line
    assert f"{format_count(throughput.tokens)} tokens, " in line


@pytest.mark.parametrize(
    ("flags", "epochs"),
    [
        ({"overfit_batches": 1, "max_steps": 9}, "9 epochs of 1 micro-batches"),
        ({"overfit_batches": 3, "max_steps": 9}, "3 epochs of 3 micro-batches"),
        ({"limit_train_batches": 2, "max_steps": 8}, "4 epochs of 2 micro-batches ("),
    ],
)
def test_epochs_are_those_of_the_trainer(
    caplog: pytest.LogCaptureFixture,
    trainer: Callable[..., L.Trainer],
    task: Callable[..., LanguageModel],
    packed_text: Callable[..., PackedText],
    flags: dict[str, Any],
    epochs: str,
) -> None:
    [line] = plan_lines(caplog, trainer, task(), packed_text(), limit_val_batches=0, **flags)["run"]
    assert f"tokens, {epochs}" in line


def test_padding_is_not_counted_as_tokens(
    caplog: pytest.LogCaptureFixture,
    trainer: Callable[..., L.Trainer],
    task: Callable[..., LanguageModel],
    packed_text: Callable[..., PackedText],
) -> None:
    data = packed_text(packing="one_document", block_size=48)
    [line] = plan_lines(caplog, trainer, task(), data, max_steps=1, limit_val_batches=0)["run"]
    [used] = re.findall(r"positions \(([\d.]+)% tokens, the rest padding\)", line)
    labels = [data.train_dataset[n]["labels"] for n in range(len(data.train_dataset))]
    counted = sum(int((row != IGNORE_INDEX).sum()) for row in labels)
    # A document's last token is in the window, but has no label.
    assert float(used) == pytest.approx(100 * counted / (len(labels) * 48), abs=3)
    assert float(used) < 99
    assert "positions per parameter" in line


class Own(OptimizerRecipe):
    """A user's recipe, around any optimizer."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.5)


@pytest.mark.parametrize(
    ("recipe", "average", "expected"),
    [
        (
            AdamW(weight_decay=0.3), 0.99,
            "adamw {decayed} in 16 matrices and tables at 0.003 with weight decay 0.3; adamw {vectors} in 9 vectors at "
            "0.003; moving average 0.99",
        ),
        (Own(), None, "SGD {all} in 25 tensors at 0.5"),
    ],
)  # fmt: skip
def test_the_plan_names_the_groups_of_the_optimizer(
    caplog: pytest.LogCaptureFixture,
    trainer: Callable[..., L.Trainer],
    task: Callable[..., LanguageModel],
    packed_text: Callable[..., PackedText],
    recipe: OptimizerRecipe,
    average: float | None,
    expected: str,
) -> None:
    model = task(optimizer=recipe, ema_decay=average)
    [line] = plan_lines(caplog, trainer, model, packed_text(), max_steps=1, limit_val_batches=0)["optimizer"]
    sizes = {ndim: sum(p.numel() for p in model.net.parameters() if p.ndim == ndim) for ndim in (1, 2)}
    numbers = {"decayed": sizes[2], "vectors": sizes[1], "all": sum(sizes.values())}
    assert line == expected.format(**{name: format_count(n) for name, n in numbers.items()})


class OwnData(PackedText):
    """A data module that reports only some of what it could: rows of two splits, and a command of its own."""

    next_command = "doctor {}"
    item_name = "poem"

    @property
    def split_counts(self) -> dict[str, SplitCounts]:
        return {"train": SplitCounts(1, 2000), "spring": SplitCounts(3, 50)}

    def sample_train_tokens(self, n: int) -> None:  # type: ignore[override]  # not continuous text
        return None

    def validation_warnings(self) -> Iterator[str]:
        yield "few poems"


def test_a_data_module_may_report_little(
    caplog: pytest.LogCaptureFixture, trainer: Callable[..., L.Trainer], task: Callable[..., LanguageModel],
    tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / "poems").mkdir()
    for seed in range(20):
        (tmp_path / "poems" / f"{seed}.txt").write_text(sentences(seed), encoding="utf-8")
    data = OwnData(str(tmp_path / "poems"), block_size=32, batch_size=4, vocab_size=300, cache=str(tmp_path / "cache"))
    summary, checkpointing = RunSummary(), Checkpointing()
    summary.folder = checkpointing.folder = RunFolder.create(tmp_path / "runs", "own")
    with caplog.at_level(logging.INFO, logger="lit_gpt_scratch"):
        callbacks = [BaselineMetrics(), RunPlan(), DiagnosticsCallback(), summary, checkpointing]
        trainer(callbacks=callbacks, max_steps=2, enable_checkpointing=True).fit(task(), data)
    assert "1 poem with 2 k tokens for training, 3 poems with 50 tokens for spring" in caplog.text
    assert "few poems" in caplog.text
    assert "baselines" not in caplog.text
    assert f"python -m lit_gpt_scratch.doctor {summary.folder.path}" in caplog.text


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        (PackedText, "generate runs/x --prompt words"), (Conversations, "generate runs/x --chat"),
        (Prompts, "generate runs/x --chat"),
        (Preferences, "generate runs/x --chat"), (LabelledText, "evaluate runs/x --text words"),
    ],
)  # fmt: skip
def test_each_data_module_suggests_a_command(stage: type[BaseDataModule], command: str) -> None:
    assert stage.next_command.format("runs/x", text="words") == command
    assert LanguageModel.next_command is None
    assert Reward.next_command == "convert to-safetensors {} reward.safetensors"


class AfterOneStep(L.Callback):
    """End a run that was planned longer."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        trainer.should_stop = True


@pytest.mark.parametrize(
    ("changes", "flags", "warning"),
    [
        ({}, {}, "differences of a few percent are noise"),
        ({"validation_share": 0.0001, "block_size": 600, "batch_size": 1}, {}, "fewer than one window of 600"),
        ({}, {"max_steps": 100_000}, "epochs: the model will memorize the documents"),
        ({}, {"max_steps": 1}, "use a smaller model or more steps"),
        ({"validation_share": 0.8}, {"max_steps": 150}, "use a smaller model or more text"),
    ],
)
def test_likely_mistakes_are_warned_of(
    caplog: pytest.LogCaptureFixture,
    trainer: Callable[..., L.Trainer],
    task: Callable[..., LanguageModel],
    packed_text: Callable[..., PackedText],
    changes: dict[str, object],
    flags: dict[str, object],
    warning: str,
) -> None:
    with caplog.at_level(logging.INFO, logger="lit_gpt_scratch"):
        trainer(callbacks=[RunPlan(), AfterOneStep()], limit_val_batches=0, **flags).fit(task(), packed_text(**changes))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any(warning in line for line in warnings), warnings


def test_family_of_near_duplicates_is_reported_by_the_plan_and_prepare(
    tmp_path: Path, packed_text: Callable[..., PackedText], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [sentences(1, 50) + str(n) for n in range(20)] + [sentences(n) for n in range(2, 20)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    data = packed_text(source=str(path))
    remark = "20 documents are near-duplicates of each other and"
    assert sum(line.startswith(remark) for line in data.validation_warnings()) == 1
    print_report(data, n_shown=0)
    assert f"remark      {remark}" in capsys.readouterr().out


def test_a_healthy_run_has_no_warning(
    caplog: pytest.LogCaptureFixture,
    trainer: Callable[..., L.Trainer],
    task: Callable[..., LanguageModel],
    packed_text: Callable[..., PackedText],
    tmp_path: Path,
) -> None:
    for seed in range(100):
        (tmp_path / f"{seed}.txt").write_text(sentences(seed, 300), encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="lit_gpt_scratch"):
        runner = trainer(callbacks=[RunPlan(), AfterOneStep()], limit_val_batches=0, max_steps=2000)
        runner.fit(task(), packed_text(source=str(tmp_path)))
    assert not caplog.records
