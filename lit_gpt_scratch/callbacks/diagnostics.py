"""Live diagnostics: evaluate the diagnostic rules on a run's metrics, and report the problems that they find."""

import json
import logging
import math
from typing import Any, Final

import lightning as L
import torch
from torch import Tensor

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.callbacks.checkpointing import BetweenSteps, RunDirCallback
from lit_gpt_scratch.callbacks.event_logger import tolerate_write_errors
from lit_gpt_scratch.callbacks.metric_logging import MetricTap, log_text
from lit_gpt_scratch.callbacks.run_plan import distinct_train_tokens, tokens_per_step
from lit_gpt_scratch.callbacks.samples import Samples
from lit_gpt_scratch.callbacks.spike_guard import GUARD_MODES, SpikeGuard
from lit_gpt_scratch.data.base_datamodule import BaseDataModule
from lit_gpt_scratch.diagnostics.repetition import repeated_passage_share, repeated_phrase_share
from lit_gpt_scratch.diagnostics.rule_engine import Diagnosis, RuleEngine
from lit_gpt_scratch.diagnostics.rules import REPORTED_BY_PLAN, RULES
from lit_gpt_scratch.diagnostics.tensorboard_reader import DIAGNOSES_NAME, replay_events
from lit_gpt_scratch.lightning_compat import planned_steps
from lit_gpt_scratch.tasks.gpt_module import GPTModule
from lit_gpt_scratch.text.markdown import format_compact_table, markdown_code

log = logging.getLogger(__name__)

MAX_SEARCHED_TOKENS: Final = 250_000
"""Maximum number of training tokens searched for repeated passages; the search takes 0.1 s."""
FILE_NAME: Final = "doctor.json"
FIRST_BATCH_FACTS: Final = "run/labels_next", "run/labels_own"
"""Names of the metrics that are measured only on the first batch of a run."""


class DiagnosticsCallback(BetweenSteps, RunDirCallback):
    """Callback that evaluates the diagnostic rules during training and reports each problem as soon as it is found.

    A diagnosis names the symptom, its likely cause and a flag to try. Diagnoses are printed, logged to TensorBoard's
    text tab, and written to ``doctor.json`` as a list of ``{symptom, cause, flag, step}`` objects, which is empty if no
    problem was found. The metrics are received from a ``MetricTap``, which ``setup`` adds to the loggers. Properties of
    the run, such as its number of parameters, are logged at the start of training as metrics named ``run/...``, so that
    ``python -m lit_gpt_scratch.doctor RUN`` finds the same problems in the TensorBoard events of the run. The rules are
    defined in ``diagnostics/rules.py``.
    """

    def __init__(self) -> None:
        self.engine = RuleEngine(RULES)
        self._n_reported = 0
        self._facts_due = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Add a ``MetricTap`` to the loggers."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.engine, self._n_reported = RuleEngine(RULES), 0
            trainer.loggers = [*trainer.loggers, MetricTap(self.engine, self._set_due)]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove the ``MetricTap`` from the loggers."""
        trainer.loggers = [logger for logger in trainer.loggers if not isinstance(logger, MetricTap)]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replay the TensorBoard events of earlier sessions if the run was resumed."""
        if trainer.global_step and self.folder and trainer.is_global_zero and any(self.folder.path.glob("*tfevents*")):
            replay_events(self.folder.path, self.engine)
            self.engine.drop_from(trainer.global_step)
            self._n_reported = len(self.engine.diagnoses)
        self.due = self._facts_due = True

    def _set_due(self) -> None:
        self.due = True

    def between_steps(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Evaluate the rules on the previous step's metrics, all of which have been logged."""
        if self._facts_due:
            self._facts_due = False
            self._log_facts(trainer, pl_module, batch)
        if self.engine.pending:
            self.engine.evaluate()
            self._report(trainer)
        self.due = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the fraction of repeated phrases in the most recent sample."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
        written = next((callback.latest for callback in callbacks if isinstance(callback, Samples)), "")
        if written and not trainer.sanity_checking:
            for logger in trainer.loggers:
                logger.log_metrics({"samples/repetition": repeated_phrase_share(written)}, trainer.global_step - 1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the rules on the finished run, and write the diagnoses."""
        self.engine.finish()
        self._report(trainer, last=True)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Report new diagnoses before the exception ends the run, unless the run folder was deleted."""
        if self.folder and not self.folder.path.is_dir():
            return
        self.engine.evaluate()
        self._report(trainer)

    def _report(self, trainer: L.Trainer, last: bool = False) -> None:
        found, told = self.engine.diagnoses, self._n_reported
        if len(found) == told and not last:
            return
        self._n_reported = len(found)
        if not trainer.is_global_zero:
            return
        known = {diagnosis.name for diagnosis in found[:told]}
        for diagnosis in found[told:]:
            if diagnosis.name not in known and diagnosis.name not in REPORTED_BY_PLAN:  # the run plan has printed these
                log.warning("%-11s step %d: %s", "doctor", diagnosis.step, diagnosis)
            known.add(diagnosis.name)
        if found:
            log_text(trainer, DIAGNOSES_NAME, format_table(found), found[-1].step)
        if self.folder:
            with tolerate_write_errors(FILE_NAME):
                self.folder.write_text(FILE_NAME, json.dumps([each.to_dict() for each in found], indent=2) + "\n")

    def _log_facts(self, trainer: L.Trainer, task: L.LightningModule, batch: Any) -> None:
        """Log the properties of the run that are new or have changed since earlier sessions, e.g. the step count."""
        known = self.engine.history
        facts = {name: value for name, value in _run_facts(trainer, task, batch).items() if known.latest(name) != value}
        if math.isfinite(known.latest(FIRST_BATCH_FACTS[0])):  # measured on the first batch only
            facts = {name: value for name, value in facts.items() if name not in FIRST_BATCH_FACTS}
        if facts:
            for logger in trainer.loggers:
                logger.log_metrics(facts, max(trainer.global_step - 1, 0))


def format_table(found: list[Diagnosis]) -> str:
    """Format diagnoses as a Markdown table."""
    rows = [(str(d.step), " ".join(d.symptom.split()), d.cause, markdown_code(d.flag)) for d in found]
    return format_compact_table([("step", "symptom", "likely cause", "try"), *rows])


def _run_facts(trainer: L.Trainer, task: L.LightningModule, batch: Any) -> dict[str, float]:
    """Return the properties of the run that the rules use, rounded to float32 like the values in TensorBoard events."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
    data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
    guard = next((callback.mode for callback in callbacks if isinstance(callback, SpikeGuard)), "off")
    facts: dict[str, float] = {"run/guard": GUARD_MODES.index(guard), "run/steps": planned_steps(trainer)}
    if isinstance(data, BaseDataModule) and isinstance(task, GPTModule):
        classes = task.data_info.class_names
        facts |= {
            "run/parameters": sum(p.numel() for p in task.net.parameters()),
            "run/begins_trained": task.init_from is not None,
            "run/post_norm": task.gpt.norm_placement == "post",
            "run/warmup_steps": task.schedule.warmup_steps,
            "run/tokens_per_step": tokens_per_step(trainer, data),
            "run/train_tokens": distinct_train_tokens(trainer, data),
            "run/loader_processes": data.num_workers,
            "run/chance_loss": math.log(data.vocab_size if classes is None else len(classes)),
        }
        if isinstance(batch, dict) and "input_ids" in batch:
            facts |= _label_facts(batch["input_ids"], batch["labels"])
    if getattr(task, "kl_target", None) is not None:
        facts["run/kl_target"] = float(task.kl_target)  # type: ignore[arg-type]  # only RL tasks have it
    if isinstance(data, BaseDataModule) and (passages := data.sample_train_tokens(MAX_SEARCHED_TOKENS)) is not None:
        facts["run/repeated_passages"] = repeated_passage_share(passages)
        if validation := data.split_counts.get("validation"):
            batches = trainer.num_val_batches[0] if trainer.num_val_batches else math.inf
            facts["run/validation_tokens"] = min(validation.tokens, batches * data.tokens_per_batch)
    in_single = torch.tensor([float(value) for value in facts.values()], dtype=torch.float32).tolist()
    return {name: value for name, value in zip(facts, in_single, strict=True) if math.isfinite(value)}


def _label_facts(ids: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the fractions of labels equal to the next input token and to the input token at the same position."""
    if ids.shape != labels.shape:
        return {}
    inner, scored = labels[:, :-1], labels[:, :-1] != IGNORE_INDEX
    if not scored.any():
        return {}
    shares = [(inner == ids[:, shift : shift + inner.size(1)])[scored].float().mean().item() for shift in (1, 0)]
    return dict(zip(FIRST_BATCH_FACTS, shares, strict=True))
