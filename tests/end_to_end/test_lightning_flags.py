"""Every flag of Lightning's Trainer, and every callback of Lightning, either works or is refused in one line.

The table holds values of each flag with the words of the refusal; an empty text means that the run succeeds. Other
flags that a value requires follow it.
"""

import json
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry

from lit_gpt_scratch.cli.config_files import FitParser
from lit_gpt_scratch.distributed.strategies import TENSOR_PARALLEL_SIZES
from lit_gpt_scratch.lightning_compat import UnobservedLauncher
from lit_gpt_scratch.text.atomic_files import is_unfinished
from tests.end_to_end.conftest import Command

UNSUPPORTED = ("fsdp", "deepspeed", "xla", "single_xla", "single_tpu")
"""Beginnings of the names of strategies that are refused."""
EPOCHS = "--trainer.max_steps=-1 --trainer.max_epochs=2 --trainer.limit_train_batches=4"
FLAGS: dict[str, dict[str, str]] = {
    "accelerator": {"auto": "", "cpu": "", "tpu": "--trainer.accelerator tpu", "hpu": "hpu", "abacus": "abacus"},
    "strategy": {
        "auto": "", "ddp": "", "single_device": "", "tp": "",
        "teleport": "--trainer.strategy teleport",
        "fsdp": "use --trainer.strategy fsdp2", "deepspeed": "use --trainer.strategy fsdp2",
        "lightning.pytorch.strategies.DDPStrategy": "", "SingleDeviceStrategy": "",
        "FSDPStrategy": "use --trainer.strategy fsdp2",
        "DeepSpeedStrategy": "strategy", "nope.Mine": "--trainer.strategy",
    },
    "devices": {"1": "", "auto": "", "[0]": "devices", "0": "devices", "abc": "abc", "1.5": "1.5"},
    "num_nodes": {"1": "", "0": "must be positive", "-1": "must be positive"},
    "precision": {
        "32-true": "", "32": "", "bf16-mixed": "", "bf16-true": "", "64-true": "", "16-mixed": "bf16-mixed",
        "16-true": "bf16-mixed", "transformer-engine": "bf16-mixed", "8": "--trainer.precision",
    },
    "logger": {
        "true": "", "false": "", "null": "", "CSVLogger --trainer.logger.save_dir=logs": "",
        "TensorBoardLogger --trainer.logger.save_dir=logs": "", "nope.Mine": "--trainer.logger",
        **({} if find_spec("wandb") else {"WandbLogger": "--trainer.logger WandbLogger"}),
        "Nope": "--trainer.logger",
    },
    "fast_dev_run": {"true": "", "2": "", "false": "", "-1": "must be 0 or more"},
    "max_epochs": {
        f"1 {EPOCHS.replace('epochs=2', 'epochs=1')}": "", "-1": "", "null": "", "0": "no training steps",
        "-2": "must be -1 or more",
    },
    "min_epochs": {f"2 {EPOCHS}": "", "-1": "must be 0 or more"},
    "max_steps": {"3": "", "0": "no training steps", "-2": "must be -1 or more", "many": "--trainer.max_steps"},
    "min_steps": {"3": "", "100": "", "-1": "must be 0 or more"},
    "max_time": {
        "00:00:00:05": "", "{minutes: 1}": "", "soon": "DD:HH:MM:SS", "{parsecs: 1}": "units",
        "{seconds: 0}": "positive",
    },
    "limit_train_batches": {
        "1": "", "1.0": "", "0.5": "", "100000": "", "0": "no training steps", "0.0": "no training steps",
        "1.5": "fraction", "-1": "fraction", "nan": "got nan", ".nan": "fraction",
        "0.0001": "--trainer.limit_train_batches",
    },
    "limit_val_batches": {
        "1": "", "1.0": "", "0": "", "0.5": "", "100000": "", "1.5": "fraction", "-1": "fraction",
        "0.0001": "--trainer.limit_val_batches",
    },
    "limit_test_batches": {"1": "", "0": "", "0.5": "", "1.5": "fraction", "-0.5": "fraction"},
    "limit_predict_batches": {"1": "", "0.5": "", "1.5": "fraction", "-0.5": "fraction"},
    "overfit_batches": {"1": "", "0.5": "", "0": "", "1.5": "fraction", "-1": "fraction"},
    "val_check_interval": {
        "2": "", "0.25": "", "1.0": "", "null": "", "00:00:00:01": "", "{seconds: 1}": "", "100000": "",
        "0": "must be positive", "0.0": "must be positive", "-1": "fraction", "1.5": "fraction", "soon": "DD:HH:MM:SS",
        "800 --trainer.check_val_every_n_epoch=1": "--trainer.val_check_interval",
    },
    "check_val_every_n_epoch": {
        f"2 {EPOCHS}": "", f"1 {EPOCHS}": "", f"1 --trainer.val_check_interval=2 {EPOCHS}": "",
        f"2 --trainer.val_check_interval=0.5 {EPOCHS}": "", "null": "", "0": "must be positive", "1.5": "1.5",
    },
    "num_sanity_val_steps": {"0": "", "1": "", "-1": "", "-2": "must be -1 or more"},
    "log_every_n_steps": {"1": "", "0": "", "null": "", "-1": "must be 0 or more"},
    "enable_checkpointing": {"true": "", "false": "", "null": ""},
    "enable_progress_bar": {"true": "", "false": "", "null": ""},
    "enable_model_summary": {"true": "", "false": "", "null": ""},
    "accumulate_grad_batches": {"2": "", "0": "must be positive", "-1": "must be positive", "1.5": "1.5"},
    "gradient_clip_val": {
        "0": "", "1": "", "0.5": "", "null": "", "-1": "must be 0 or more", "nan": "got nan",
        ".nan": "must be 0 or more",
    },
    "gradient_clip_algorithm": {"norm": "", "value": "", "null": "", "median": "norm or value"},
    "deterministic": {"true": "", "false": "", "warn": "", "maybe": "--trainer.deterministic"},
    "benchmark": {"true": "", "false": "", "maybe": "--trainer.benchmark"},
    "inference_mode": {"true": "", "false": ""},
    "use_distributed_sampler": {"true": "", "false": ""},
    "profiler": {
        "simple": "", "advanced": "", "pytorch": "", "SimpleProfiler": "", "null": "", "xla": "--trainer.profiler xla",
        "stopwatch": "--trainer.profiler stopwatch", "nope.Mine": "--trainer.profiler",
    },
    "detect_anomaly": {"true": "", "false": ""},
    "barebones": {
        "true": "", "false": "", "true --trainer.enable_progress_bar=true": "--trainer.enable_progress_bar",
        "true --trainer.profiler=simple": "--trainer.profiler",
        "true --trainer.log_every_n_steps=5": "--trainer.log_every_n_steps",
    },
    "plugins": {
        "LightningEnvironment": "", "TorchCheckpointIO": "", "AsyncCheckpointIO": "", "nope.Mine": "--trainer.plugins",
    },
    "sync_batchnorm": {"true": "", "false": ""},
    "reload_dataloaders_every_n_epochs": {f"1 {EPOCHS}": "", "0": "", "-1": "must be 0 or more"},
    "default_root_dir": {"elsewhere": "", "null": ""},
    "enable_autolog_hparams": {"true": "", "false": ""},
    "model_registry": {"name": "", "null": ""},
}  # fmt: skip
WORKING_CALLBACKS = (
    "Callback",
    "Checkpoint",
    "DeviceStatsMonitor",
    "LambdaCallback",
    "ProgressBar",
    "RichModelSummary",
    "RichProgressBar",
    "SpikeDetection",
    "TQDMProgressBar",
    "EMAWeightAveraging",
    "WeightAveraging",
)
"""Callbacks that work without arguments."""
CALLBACKS: dict[str, dict[str, str]] = {
    **{name: {"": ""} for name in WORKING_CALLBACKS},
    "BackboneFinetuning": {"": "--model.train_layers"},
    "BaseFinetuning": {"": "BaseFinetuning"},
    "BasePredictionWriter": {"": "generate or evaluate"},
    "BatchSizeFinder": {"": "--data.batch_size"},
    "EarlyStopping": {
        "": "monitor",
        "monitor=nope": "nope",
        "monitor=val/loss": "",
        "monitor=val/loss patience=1": "",
    },
    "GradientAccumulationScheduler": {
        "": "scheduling",
        "scheduling={0: 2}": "",
        "scheduling={0: 2, 1: 1}": "",
        "scheduling={0: 0}": "greater than 0",
    },
    "LearningRateFinder": {"": "sweep"},
    "LearningRateMonitor": {"": "", "logging_interval=step": "", "logging_interval=year": "year"},
    "ModelCheckpoint": {"": "", "monitor=val/loss": "", "monitor=nope": "nope", "every_n_train_steps=2": ""},
    "ModelPruning": {"": "pruning_fn", "pruning_fn=l1_unstructured": "prune the trained model"},
    "ModelSummary": {"": "", "max_depth=2": ""},
    "OnExceptionCheckpoint": {"": "dirpath", "dirpath=x": ""},
    "StochasticWeightAveraging": {
        "": "swa_lrs",
        "swa_lrs=0.01": "swa_epoch_start",
        "swa_lrs=0.01 swa_epoch_start=1": "",
    },
    "ThroughputMonitor": {"": "batch_size_fn"},
    "Timer": {"": "", "duration=00:00:00:05": "", "duration={seconds: 5}": "", "duration=soon": "DD:HH:MM:SS"},
    "TQDMProgressBar": {"": ""},
    "EMAWeightAveraging": {"": ""},
    "WeightAveraging": {"": ""},
    "nope.Mine": {"": "nope.Mine"},
    "Nope": {"": "Nope"},
}


def cases(group: str) -> Iterator[tuple[list[str], str]]:
    """Yield flags with the words of the refusal, empty if the run succeeds; groups: flags, callbacks, strategies."""
    for name, values in FLAGS.items() if group == "flags" else ():
        for value, refusal in values.items():
            first, *others = value.split(" --")
            yield [f"--trainer.{name}={first}", *(f"--{other}" for other in others)], refusal
    for name, values in CALLBACKS.items() if group == "callbacks" else ():
        for arguments, refusal in values.items():
            parts = arguments.split(" ") if "{" not in arguments else [arguments]
            flags = [f"--trainer.callbacks.{part}" for part in parts if part]
            yield [f"--trainer.callbacks={name}", *flags, "--trainer.val_check_interval=2"], refusal
    for name in StrategyRegistry.available_strategies() if group == "strategies" else ():
        unsupported = name.startswith(UNSUPPORTED) and name not in TENSOR_PARALLEL_SIZES
        yield [f"--trainer.strategy={name}", "--trainer.devices=2", "--data.batch_size=2"], name if unsupported else ""


def test_the_table_has_every_flag_and_every_callback() -> None:
    parser = FitParser(exit_on_error=False)
    parser.add_class_arguments(Trainer, "trainer")
    names = {action.dest.removeprefix("trainer.") for action in parser._actions}
    names = {name for name in names if "." not in name} - {"help", "print_config", "trainer", "callbacks"}
    assert names == FLAGS.keys()
    assert set(lightning.pytorch.callbacks.__all__) <= CALLBACKS.keys()


class LaunchedError(Exception):
    """Raised instead of starting other processes: all flags were accepted."""


def launch(self: object, *args: Any, **kwargs: Any) -> None:
    raise LaunchedError


def outcome_of(command: Command, flags: list[str], refusal: str) -> str:
    """Return ``works``, ``refused``, or a description of another outcome."""
    try:
        outcome = command("fit", *flags)
    except LaunchedError:
        return "works" if not refusal else "accepted, but should be refused"
    except Exception as error:
        return f"a traceback: {error!r}"
    if outcome.code == 0 and not refusal:
        return "works"
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    if outcome.code != 2 or len(lines) != 1 or not refusal or refusal not in lines[0]:
        return f"exit code {outcome.code}: {lines or outcome.err[-300:]}"
    return "refused"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("group", ["flags", "callbacks", "strategies"])
def test_every_trainer_flag_works_or_is_refused_in_one_line(
    command: Command, small: list[str], monkeypatch: pytest.MonkeyPatch, group: str
) -> None:
    monkeypatch.setattr(UnobservedLauncher, "launch", launch)
    counts: Counter[str] = Counter()
    wrong = []
    shorter = ["--trainer.max_steps=6", "--trainer.val_check_interval=4", "--inspect.every_n_steps=0"]
    for flags, refusal in cases(group):
        given = [flag for flag in (*small, *shorter) if not flag.startswith("--trainer.val_check_interval=8")]
        if any(flag.startswith("--trainer.check_val_every_n_epoch=") for flag in flags):
            given.remove("--trainer.val_check_interval=4")
        if any(flag.startswith("--trainer.barebones=true") for flag in flags):  # it logs nothing
            given.remove("--trainer.log_every_n_steps=4")
        outcome = outcome_of(command, [*given, *flags], refusal)
        counts[outcome if outcome in ("works", "refused") else "fails otherwise"] += 1
        if outcome not in ("works", "refused"):
            wrong.append(f"{' '.join(flags)}: {outcome}")
    print(json.dumps(counts))
    assert not wrong, "\n".join(wrong)
    written = list(Path("runs").rglob("*"))
    assert written
    assert not [path for path in written if is_unfinished(path)]
