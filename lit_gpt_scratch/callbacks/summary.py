"""Callbacks that record the baselines, provenance, loss trace and summary of a run."""

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lit_gpt_scratch.callbacks.checkpointing import RunDirCallback
from lit_gpt_scratch.callbacks.event_logger import tolerate_write_errors
from lit_gpt_scratch.callbacks.next_commands import next_commands
from lit_gpt_scratch.callbacks.progress import format_metrics
from lit_gpt_scratch.callbacks.samples import RewardEval, Samples
from lit_gpt_scratch.callbacks.spike_guard import guard_gave_up
from lit_gpt_scratch.callbacks.throughput import Throughput
from lit_gpt_scratch.checkpoint.environment import collect_environment
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.checkpoint.training_state import validate_callback_state
from lit_gpt_scratch.data.base_datamodule import BaseDataModule
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.evaluation.baselines import MAX_TRAINING_TOKENS, compute_token_baselines, measure_xz_bits_per_byte
from lit_gpt_scratch.evaluation.text_classifiers import LabelledTexts, word_baseline
from lit_gpt_scratch.lightning_compat import global_seed
from lit_gpt_scratch.schema import read_json
from lit_gpt_scratch.tasks.gpt_module import GPTModule
from lit_gpt_scratch.terminal_output import VERBATIM
from lit_gpt_scratch.text.atomic_files import atomic_file

log = logging.getLogger(__name__)

MAX_XZ_TOKENS = 4_000_000
"""Maximum number of validation tokens for the ``xz`` baseline, which would take over ten seconds for more tokens."""


class BaselineMetrics(Callback):
    """Callback that computes and logs baselines that require no training.

    The baselines are uniform, unigram and bigram models and ``xz -9`` for text, the majority class and a word-based
    classifier for classification, and the true reward (fraction of correct replies) of the initial model for RL and
    preference tuning. They are logged after every validation run as ``baselines/<name>``. TensorBoard's custom-scalars
    tab shows them in the same chart as the corresponding metric of the model.

    Text and class baselines are computed on the same validation batches as the metrics of the model.
    ``trainer.limit_val_batches`` can limit the number of these batches.

    Args:
        limit_val_batches: Value of ``trainer.limit_val_batches`` in the planned run, a number (int) or fraction (float)
            of batches, or None to use the trainer's value.
    """

    def __init__(self, limit_val_batches: float | None = None) -> None:
        self.limit_val_batches = limit_val_batches
        self.figures: dict[str, float] = {}
        """Baselines keyed by name, computed at the start of training; an empty dict on ranks other than 0."""
        self.metric = ""
        """Name of the validation metric with which the baselines are compared."""
        self.what = ""
        """Human-readable description of the metric."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute the baselines, which takes 0.5 s for 0.5 MB of text."""
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        if not trainer.is_global_zero:
            return
        rows = count_validated_rows(trainer, data, self.limit_val_batches) if isinstance(data, BaseDataModule) else 0
        if isinstance(data, BaseDataModule) and (figures := _text_baselines(data, rows or None)):
            self.metric, self.what = "val/bits_per_byte", "bits per byte of the validation text"
            self.figures = figures
        elif isinstance(data, BaseDataModule) and (figures := _class_baselines(data, rows or None)):
            self.metric, self.what = "val/accuracy", "accuracy on the validation records"
            self.figures = figures
        elif (start := _initial_true_reward(trainer)) is not None:
            self.metric, self.what = "val/true_reward", "true reward (fraction of correct replies)"
            self.figures = {"true_reward": start}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the baselines after every validation run, so that they appear as horizontal lines in a chart."""
        figures = {f"baselines/{name}": value for name, value in self.figures.items()}
        if figures and not trainer.sanity_checking:
            for logger in trainer.loggers:
                logger.log_metrics(figures, trainer.global_step - 1)  # step at which Lightning logs validation metrics


def _initial_true_reward(trainer: L.Trainer) -> float | None:
    """Return the true reward of the initial model from ``RewardEval``, or None if it was not measured."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
    return next((callback.start for callback in callbacks if isinstance(callback, RewardEval)), None)


def count_validated_rows(trainer: L.Trainer, data: BaseDataModule, limit: float | None = None) -> int:
    """Return the number of rows that a validation run reads across all ranks.

    Args:
        trainer: Trainer of the run.
        data: Data module of the run.
        limit: Maximum number (int) or fraction (float) of validation batches, or None for the trainer's limit.
    """
    limit = trainer.limit_val_batches if limit is None else limit
    rows, rows_per_batch = len(data.validation_dataset), data.batch_size * data.shard["num_replicas"]
    batches = -(-rows // rows_per_batch)
    return min(rows, rows_per_batch * (min(limit, batches) if isinstance(limit, int) else int(batches * limit)))


def _text_baselines(data: BaseDataModule, rows: int | None) -> dict[str, float]:
    """Return the bits per byte of each baseline, or an empty dict if the data is not contiguous text.

    Args:
        data: Data module of the run.
        rows: Number of validation rows to evaluate, or None for all.
    """
    train, validation = data.sample_train_tokens(MAX_TRAINING_TOKENS), data.validation_text(rows)
    if train is None or validation is None:
        return {}
    ids, n_bytes = validation
    counted = train, ids, data.vocab_size, n_bytes
    if len(ids) > MAX_XZ_TOKENS:
        log.info("no xz baseline: the validation text is too long to compress in a few seconds")
        return compute_token_baselines(*counted)
    text = data.tokenizer.decode(ids[ids != data.tokenizer.end_of_text].tolist())
    with ThreadPoolExecutor(1) as pool:
        xz = pool.submit(measure_xz_bits_per_byte, text, n_bytes)
        return {**compute_token_baselines(*counted), "xz": xz.result()}


def _class_baselines(data: BaseDataModule, rows: int | None) -> dict[str, float]:
    """Return the accuracy of each baseline, or an empty dict if the data has no classes.

    Args:
        data: Data module of the run.
        rows: Number of validation rows to evaluate, or None for all.
    """
    train, validation = data.labelled_texts("train"), data.labelled_texts("validation", rows)
    if train is None or validation is None:
        return {}
    majority, _ = Counter(train[1]).most_common(1)[0]
    share = validation[1].count(majority) / len(validation[1])
    return {"majority class": share, **word_baseline(LabelledTexts(*train), LabelledTexts(*validation))}


class RunMetadata(RunDirCallback):
    """Callback that adds the command, code, versions, hardware, seed and data hash of a session to ``provenance.json``.

    The file also names the Hub datasets. The code, versions, hardware, seed and data hash are saved in each
    checkpoint, too.

    Args:
        changed: Flags and environment changes since the run started, as (old, new) pairs keyed by name.
    """

    state_key = "Provenance"  # key in checkpoints; unchanged since 0.1

    def __init__(self, changed: dict[str, tuple[Any, Any]] | None = None) -> None:
        self.changed = changed or {}
        self.origin: dict[str, Any] = {}
        """Code version, library versions, hardware, seed and data fingerprint of this session."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that all ranks have found the same checkpoint and the same data.

        Each rank searches for them independently.

        Raises:
            UserError: If the checkpoint or the data differs between ranks.
        """
        super().setup(trainer, pl_module, stage)
        first, own = trainer.strategy.broadcast(str(trainer.ckpt_path)), str(trainer.ckpt_path)
        if first != own:
            raise UserError(
                f"rank 0 would resume from {first}, but this rank would resume from {own}; pass --ckpt_path {first}"
            )
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        own = data.fingerprint if isinstance(data, BaseDataModule) else ""
        if trainer.strategy.broadcast(own) != own:
            raise UserError(
                f"{data.origin} on this machine differs from the copy on the machine that runs rank 0; copy it from "
                "that machine"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add this session to ``provenance.json``, after all checks have passed."""
        self.origin = collect_environment()
        session = {"started": self.origin.pop("started"), "command": self.origin.pop("command")}
        self.origin["hardware"] |= {"processes": trainer.world_size, "precision": str(trainer.precision)}
        self.origin["seed"] = global_seed()
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        if isinstance(data, BaseDataModule):
            self.origin["data"] = data.fingerprint
            session["hub_datasets"] = data.hub_datasets
        if self.folder and trainer.is_global_zero:
            session = {"from_step": trainer.global_step, **session, **self.origin, "changed": self.changed}
            sessions = [*self.folder.read_sessions(), session]
            self.folder.write_text("provenance.json", json.dumps({"sessions": sessions}, indent=2, default=str) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """Return the provenance of this session, so that it can be compared even without ``provenance.json``."""
        return self.origin


class LossTrace(RunDirCallback):
    """Callback that saves the loss of every step and the full gradient of the first step to ``trace.pt``.

    The gradient is saved as the optimizer receives it, that is, after clipping. The loss must be logged at every
    step (``--trainer.log_every_n_steps 1``). TensorBoard stores values in float32, which is not precise enough to
    compare two runs.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: dict[str, Tensor] = {}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self.losses.append(trainer.callback_metrics["train/loss"].item())
        if not self.gradients:
            self.gradients = {n: _full_tensor(p.grad) for n, p in pl_module.named_parameters() if p.grad is not None}

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.folder and trainer.is_global_zero:
            losses = torch.tensor(self.losses, dtype=torch.float64)
            with atomic_file(self.folder.path / "trace.pt") as file:
                torch.save({"losses": losses, "gradients": self.gradients}, file)


def _full_tensor(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


CallbackT = TypeVar("CallbackT", bound=Callback)


class RunSummary(RunDirCallback):
    """Callback that writes the final metrics, baselines, token count, duration and throughput to ``summary.json``.

    It also saves ``tokenizer.json`` at the start, and prints the result, a sample and suggested next commands at the
    end of training.

    Args:
        max_time_is_a_flag: Whether the time limit of the run is set by ``--trainer.max_time``, not a custom ``Timer``.
    """

    state_key = "Summary"  # key in checkpoints; unchanged since 0.1

    def __init__(self, max_time_is_a_flag: bool = False) -> None:
        self.max_time_is_a_flag = max_time_is_a_flag
        self.seconds_before = 0.0
        """Total duration of earlier sessions of the run in seconds."""
        self._started = time.perf_counter()
        self._first_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start timing the run, and save the tokenizer."""
        self._started, self._first_step = time.perf_counter(), trainer.global_step
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        if trainer.is_global_zero and self.folder and isinstance(data, BaseDataModule):
            path = self.folder.path / "tokenizer.json"
            try:
                data.tokenizer.save(path)
            except OSError as error:
                raise UserError(
                    f"cannot write {path}: {error.strerror}; check the permissions and the free disk space"
                ) from error

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write and print the summary, unless this session ran no steps and a summary already exists."""
        if not trainer.is_global_zero or self.folder is None:
            return
        if trainer.global_step == self._first_step and (self.folder.path / "summary.json").exists():
            return
        throughput, baselines = _find_callback(trainer, Throughput), _find_callback(trainer, BaselineMetrics)
        # Excludes the reference model.
        learned = pl_module.trained_module if isinstance(pl_module, GPTModule) else pl_module
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if "/" in name}
        summary = {
            **{name: value if math.isfinite(value) else None for name, value in metrics.items()},
            "baselines": baselines.figures if baselines else {},
            **({"stopped": "guard"} if guard_gave_up(trainer) else {}),
            "step": trainer.global_step,
            "tokens": throughput and throughput.tokens,
            "seconds": self._seconds(),
            "tokens_per_second": throughput and throughput.mean,
            "throughput": throughput and throughput.figures,
            **({"flops_per_token": throughput.flops_per_token} if throughput and throughput.flops_per_token else {}),
            "parameters": sum(p.numel() for p in learned.parameters()),
            "trained_parameters": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
        }
        self._write(summary, self.folder)
        samples = _find_callback(trainer, Samples)
        self._print(summary, samples.latest if samples else "", self.folder, trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the test metrics, and add them to the summary."""
        if not trainer.is_global_zero or self.folder is None:
            return
        found = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
        measured = {name: value if math.isfinite(value) else None for name, value in found.items()}
        path = self.folder.path / "summary.json"
        try:
            before = read_json(path, dict[str, Any])
        except (OSError, ValueError):  # the run was stopped before it wrote a summary, or the file is corrupted
            before = {}
        self._write({**before, **measured}, self.folder)
        log.info("\n%s", format_metrics(trainer.callback_metrics, "test"))

    @staticmethod
    def _write(summary: Mapping[str, Any], folder: RunFolder) -> None:
        with tolerate_write_errors("summary.json"):
            folder.write_text("summary.json", json.dumps(summary, indent=2) + "\n")

    def state_dict(self) -> dict[str, float]:
        """Return the duration of the run so far in seconds; a resumed run adds its own duration."""
        return {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Restore the total duration of earlier sessions."""
        self.seconds_before = validate_callback_state(state_dict, dict[str, float], self.state_key).get("seconds", 0.0)

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self._started

    def _print(self, summary: Mapping[str, Any], sample: str, folder: RunFolder, trainer: L.Trainer) -> None:
        baselines = _find_callback(trainer, BaselineMetrics)
        if baselines and isinstance(value := summary.get(baselines.metric), float):
            others = "".join(f", {name} {value:.3f}" for name, value in baselines.figures.items())
            log.info("\n%s: this model %.3f%s", baselines.what, value, others)
        if sample:
            log.info("\nA sample:\n\n" + "\n".join("    " + line for line in sample.split("\n")), extra=VERBATIM)
        losses = [value.item() for name, value in trainer.callback_metrics.items() if name.endswith("/loss")]
        diverged = not all(map(math.isfinite, losses)) or guard_gave_up(trainer)
        commands = list(next_commands(trainer, folder, diverged, self.max_time_is_a_flag))
        log.info("\n%.0f s. Run directory: %s", summary["seconds"], folder.path)
        if commands:
            log.info("\nNext:")
        for command in commands:
            log.info("  %s", command)


def _find_callback(trainer: L.Trainer, kind: type[CallbackT]) -> CallbackT | None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)
