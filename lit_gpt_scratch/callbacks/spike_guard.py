"""Report or skip steps with loss or gradient spikes or non-finite values, and rewind the run if they persist."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

import lightning as L
import torch
from torch import Tensor
from typing_extensions import TypedDict

from lit_gpt_scratch.callbacks.checkpointing import HostReducer, RunDirCallback
from lit_gpt_scratch.callbacks.metric_logging import log_text
from lit_gpt_scratch.checkpoint.sharded_checkpoint import is_checkpoint
from lit_gpt_scratch.checkpoint.training_state import validate_callback_state
from lit_gpt_scratch.data.base_datamodule import BaseDataModule
from lit_gpt_scratch.diagnostics.spike_detector import PATIENCE, SpikeDetector, SpikeDetectorState
from lit_gpt_scratch.lightning_compat import (
    collective_timeout,
    is_validating_between_steps,
    restore_weights_and_optimizers,
)
from lit_gpt_scratch.model.activation_hooks import eager_eval_mode
from lit_gpt_scratch.tasks.gpt_module import GPTModule
from lit_gpt_scratch.text.markdown import escape_markdown, markdown_code

log = logging.getLogger(__name__)

GuardMode = Literal["off", "warn", "act"]
GUARD_MODES: Final[tuple[GuardMode, ...]] = get_args(GuardMode)
MAX_REWINDS: Final = 3
"""Maximum number of rewinds to the same checkpoint; if they do not help, the new loss level is accepted as normal."""
MAX_SKIPPED_IN_A_ROW: Final = 200
"""Maximum number of consecutive skipped steps; after that, the run stops, because the model no longer learns."""
GAVE_UP_EXIT_CODE: Final = 3
"""Exit code of ``fit`` if ``SpikeGuard`` has stopped the run."""
STEP_KINDS: Final = (None, "spike", "non_finite")
"""Step classifications in order of severity; all ranks use the most severe classification of any rank."""


class SpikeGuardState(TypedDict):
    """State of ``SpikeGuard`` in a checkpoint."""

    watch: SpikeDetectorState
    refused: int
    good: int | None
    rewinds: int


class SpikeGuard(RunDirCallback):
    """Callback that checks the loss and the gradient norm of every step before the optimizer updates the weights.

    A step is an outlier if its loss or gradient norm is non-finite or a spike (see ``diagnostics/spike_detector.py``).
    In ``warn`` mode, the guard reports outliers, but does not affect training. In ``act`` mode, it also skips them: a
    skipped step is counted, but weights, moving averages and optimizer states stay unchanged, and training continues
    with the next batch. If ``PATIENCE`` consecutive steps are outliers, their batches are probably not the cause. The
    guard then rewinds the run: it restores the weights and optimizer states of the last good checkpoint, and training
    continues with the next batch. If rewinding does not help either, a new loss level is accepted if it is finite;
    otherwise, the run ends after ``MAX_SKIPPED_IN_A_ROW`` consecutive skipped steps, and ``fit`` exits with
    ``GAVE_UP_EXIT_CODE``. In ``act`` mode, all ranks make the same decision.

    A good checkpoint is one saved after a normal step. In ``act`` mode, good checkpoints are saved as ``good-N.ckpt``
    next to ``last.ckpt``, every ``every_n_steps`` steps and before each validation run. They are not saved at time
    intervals or on signals, so that a run that was killed and resumed rewinds to the same step as an uninterrupted run.

    ``act`` mode reads the loss and the gradient norm at every step, which synchronizes the device. ``warn`` mode does
    so only on a CPU, where it costs nothing; on other devices, it reads them every ``trainer.log_every_n_steps`` steps.
    If they are read at every step, reports also name the module in which non-finite values first appear, and the
    documents with the highest loss.

    Args:
        mode: Reaction to outliers: ``off`` disables the guard, ``warn`` only reports outliers, and ``act`` also skips
            them and rewinds the run.
        every_n_steps: Number of optimizer steps between good checkpoints. If None, they are saved only before
            validation runs.
    """

    state_key = "Guard"  # key in checkpoints; unchanged since 0.1

    def __init__(self, mode: GuardMode = "warn", every_n_steps: int | None = None) -> None:
        self.mode = mode
        self.every_n_steps = every_n_steps
        self.detector = SpikeDetector()
        self.n_skipped = 0
        """Number of skipped steps in the whole run."""
        self.good: int | None = None
        """Step of the last good checkpoint, or None if there is none."""
        self._rewinds = 0
        self._rewind_due = False
        self._outdated: Path | None = None
        self._unread: list[tuple[int, Tensor]] = []
        self._batches: dict[int, Any] = {}

    @property
    def gave_up(self) -> bool:
        """Whether the guard has stopped the run, because neither skipping steps nor rewinding has helped."""
        return self.mode == "act" and self.detector.in_a_row >= MAX_SKIPPED_IN_A_ROW

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Register this callback as the task's step filter, which decides whether the optimizer applies a step."""
        if self.mode == "off" or not isinstance(pl_module, GPTModule):
            return
        self._trainer, self._task = trainer, pl_module
        self._ranks = HostReducer(collective_timeout(trainer))
        self._reads_at_once = self.mode == "act" or pl_module.device.type == "cpu"
        # A gradient scaler causes overflows to find the largest scale, and skips those steps itself.
        self._scales = getattr(trainer.precision_plugin, "scaler", None) is not None
        pl_module.step_filter = self._filter_step
        if self.mode == "act" and self.folder is not None:
            self._tidy(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the steps that have not been checked yet, and unregister the step filter."""
        if isinstance(pl_module, GPTModule) and pl_module.step_filter == self._filter_step:
            self._read()
            pl_module.step_filter = None
        self._drop_outdated(trainer)
        self._batches.clear()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batches of the step for reports, and save a good checkpoint if the step interval has elapsed."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._batches.clear()
            if self.every_n_steps and trainer.global_step and trainer.global_step % self.every_n_steps == 0:
                self._keep_good(trainer)
        self._batches[batch_idx] = batch

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save a good checkpoint before validation."""
        if is_validating_between_steps(trainer):
            self._keep_good(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Rewind the run if necessary, and check the recorded steps every ``trainer.log_every_n_steps`` steps."""
        self._drop_outdated(trainer)
        if self._rewind_due:
            self._rewind_due = False
            self._rewind(trainer, pl_module)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # the trainer sets it late
        if self._unread and (len(self._unread) >= (every or 50)):
            self._read()

    def _filter_step(self, loss: Tensor, norm: Tensor) -> bool:
        """Return whether the optimizer may apply the step."""
        values = torch.stack((loss.to(norm.device).float(), norm.float())).detach()
        self._unread.append((self._trainer.global_step, values))
        return self._read() if self._reads_at_once else True

    def _read(self) -> bool:
        """Classify the steps recorded since the last call, and return whether the optimizer may apply the last step."""
        kind = None
        if self._unread:
            steps, figures = zip(*self._unread, strict=True)
            self._unread = []
            for step, (loss, norm) in zip(steps, torch.stack(figures).tolist(), strict=True):
                scaled = self._scales and not math.isfinite(norm)
                kind = self.detector.classify_step(loss, 1.0 if scaled else norm)
                if self._reads_at_once:
                    kind = STEP_KINDS[self._ranks.max(STEP_KINDS.index(kind))]
                if kind is not None:
                    self._handle_outlier(kind, step, loss, norm)
        return kind is None or self.mode != "act"

    def _handle_outlier(self, kind: str, step: int, loss: float, norm: float) -> None:
        acts, row = self.mode == "act", self.detector.in_a_row
        self.n_skipped += acts
        values = {"guard/refused": float(self.n_skipped)} if acts else {}
        if row <= PATIENCE:  # limit the reports of a run that does not recover
            what = f"loss {loss:.4g}, gradient norm {norm:.4g}"
            if kind == "spike":
                what += f", usually {self.detector.median_loss:.4g} and {self.detector.median_norm:.4g}"
            self._report(kind, step, f"{what}; {'skipped' if acts else 'applied'}")
            values[f"guard/{kind}"] = loss if kind == "non_finite" else self.detector.deviations
        for logger in self._trainer.loggers if values else ():
            logger.log_metrics(values, step)
        if row >= PATIENCE and acts and self.good is not None and self._rewinds < MAX_REWINDS:
            self._rewind_due = True
        elif row >= PATIENCE and kind == "spike":
            self.detector.reset()
        elif row >= MAX_SKIPPED_IN_A_ROW and acts:
            tried = f" after {self._rewinds} rewinds" if self._rewinds else ""
            log.warning("guard: %d consecutive steps were skipped%s; stopping the run", row, tried)
            self._trainer.should_stop = True

    def _report(self, kind: str, step: int, what: str) -> None:
        """Log a report about an outlier; must be called on every rank.

        The source of the outlier can be located only if the loss and gradient norm are read at every step.
        """
        lines = [what]
        if self._reads_at_once:
            batches = list(self._batches.values())
            if kind == "non_finite":
                lines.append(locate_non_finite(self._trainer, self._task, batches))
            try:
                found = describe_hardest_rows(self._trainer, self._task, self._batches)
            except Exception:  # a custom task may not support partial batches; a failed report must not end the run
                log.warning("the hardest windows of step %d cannot be determined", step, exc_info=True)
                found = ""
            if found:
                lines.append(f"hardest windows:\n\n{found}")
        log_text(self._trainer, f"guard/{kind}/where", "\n\n".join(lines), step)

    def _keep_good(self, trainer: L.Trainer) -> None:
        """Save a good checkpoint if the last step was normal, and mark the previous good checkpoint for removal."""
        step, calm = trainer.global_step, self.detector.is_calm
        if self.mode != "act" or self.folder is None or step == self.good or not calm:
            return
        before, self.good, self._rewinds = self.good, step, 0
        trainer.save_checkpoint(self._path(step))
        # Until ``last.ckpt`` is saved, right after this, it still refers to the previous good checkpoint.
        self._outdated = None if before is None else self._path(before)

    def _tidy(self, trainer: L.Trainer) -> None:
        """Set ``good`` to None if its checkpoint is missing, and remove all other good checkpoints."""
        own = None if self.good is None else self._path(self.good)
        if self._ranks.max(own is not None and not is_checkpoint(own)):
            log.warning("guard: %s is missing; the run cannot be rewound until the next good checkpoint is saved", own)
            own = self.good = None
        assert self.folder is not None
        for path in sorted(self.folder.checkpoints.glob("good-*.ckpt")):
            if path != own:
                trainer.strategy.remove_checkpoint(path)

    def _drop_outdated(self, trainer: L.Trainer) -> None:
        if self._outdated is not None:
            trainer.strategy.remove_checkpoint(self._outdated)
            self._outdated = None

    def _rewind(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = None if self.good is None else self._path(self.good)
        if path is None or self._ranks.max(not is_checkpoint(path)):
            log.warning("guard: the run cannot be rewound, because %s is missing on at least one machine", path)
            self.detector.reset()
            return
        self._rewinds += 1
        self.detector.in_a_row = 0
        restore_weights_and_optimizers(trainer, path)
        pl_module.on_train_start()  # sets the learning rate of the next step, as after a resume
        step = trainer.global_step - 1
        log.warning(
            "guard: step %d: %d consecutive outliers; rewinding to the weights of step %d", step, PATIENCE, self.good
        )
        for logger in trainer.loggers:
            logger.log_metrics({"guard/rewound_to": float(self.good or 0)}, step)

    def _path(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder.checkpoints / f"good-{step}.ckpt"

    def state_dict(self) -> dict[str, Any]:
        """Return the detector's state, the numbers of skips and rewinds, and the step of the last good checkpoint."""
        self._read()
        return {
            "watch": self.detector.state_dict(),
            "refused": self.n_skipped,
            "good": self.good,
            "rewinds": self._rewinds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the detector's state, the numbers of skips and rewinds, and the step of the last good checkpoint."""
        state = validate_callback_state(state_dict, SpikeGuardState, self.state_key)
        self.detector.load_state_dict(dict(state["watch"]))
        self.n_skipped, self.good, self._rewinds = state["refused"], state["good"], state["rewinds"]


def guard_gave_up(trainer: L.Trainer) -> bool:
    """Return whether ``SpikeGuard`` has stopped the training; the result is the same on every rank."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
    return any(isinstance(callback, SpikeGuard) and callback.gave_up for callback in callbacks)


EXCERPT_LENGTH = 160
"""Maximum number of characters of text quoted from a window in a report."""
N_HARDEST_ROWS = 3
"""Maximum number of highest-loss windows reported per step."""


def locate_non_finite(trainer: L.Trainer, task: L.LightningModule, batches: Sequence[Any]) -> str:
    """Describe where NaN or infinity first appears: in the weights, the forward pass of a batch, or the gradient.

    Must be called on every rank, because weights may be sharded. If the optimizer has applied a non-finite step, the
    weights are already non-finite.
    """
    named = [(name.removeprefix("net."), p) for name, p in task.named_parameters() if p.grad is not None]
    weights = [name for name, p in named if not p.detach().isfinite().all()]
    if weights:
        return f"already in {len(weights)} of {len(named)} weights, first in {weights[0]}"
    if isinstance(task, GPTModule):
        for batch in batches:
            part = _first_non_finite_module(trainer, task, batch)
            if part is not None:
                return f"forward pass, first in the output of {part}"
    gradients = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
    if not gradients:
        return "in the loss only, not in its gradient"
    if len(gradients) == len(named):
        return "in the loss or at the start of the backward pass: in all gradients, but not in the forward pass"
    return f"backward pass, first at {gradients[-1]}, in {len(gradients)} of {len(named)} gradients"


def _first_non_finite_module(trainer: L.Trainer, task: GPTModule, batch: Any) -> str | None:
    """Return the name of the first module whose output is not finite, or None if all outputs are finite."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if not found and isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
            found.append(name)

    with eager_eval_mode(task), torch.no_grad(), trainer.precision_plugin.train_step_context():
        hooks = [
            part.register_forward_hook(lambda _, __, output, name=name: look(name, output))
            for name, part in task.net.named_modules()
            if name
        ]
        try:
            loss_sum, _ = task.loss_and_count(batch)
        finally:
            for hook in hooks:
                hook.remove()
    look("the loss", loss_sum)
    return found[0] if found else None


def describe_hardest_rows(trainer: L.Trainer, task: L.LightningModule, batches: Mapping[int, Any]) -> str:
    """Describe the rows with the highest loss in a step: the loss, source and first characters of each row.

    Args:
        trainer: The trainer of the run.
        task: The task, which splits a batch into rows (``split_batch``) and computes the loss of each row.
        batches: Micro-batches of this rank, keyed by their index in the epoch.

    Returns:
        A Markdown list, or an empty string if the batches cannot be split into rows of the data module.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
    has_rows = all(isinstance(batch, Mapping) and "input_ids" in batch for batch in batches.values())
    if not (isinstance(task, GPTModule) and isinstance(data, BaseDataModule) and has_rows):
        return ""
    windows = []
    with eager_eval_mode(task), torch.no_grad(), trainer.precision_plugin.train_step_context():
        for number, batch in batches.items():
            for place, one in enumerate(task.split_batch(batch)):
                loss_sum, count = task.loss_and_count(one)
                if count > 0:  # not a padding row
                    windows.append(((loss_sum / count).item(), number, place, one))
    # NaN sorts first.
    windows.sort(key=lambda window: -window[0] if window[0] == window[0] else float("-inf"))
    lines = []
    for loss, number, place, one in windows[:N_HARDEST_ROWS]:
        ids = one["input_ids"][0][: int(one["lengths"][0]) if "lengths" in one else None]
        text = " ".join(data.tokenizer.decode(ids.tolist()).split())
        described = escape_markdown(data.describe_row(trainer.current_epoch, number, place))
        lines.append(f"- loss {loss:.2f}, {described}: {markdown_code(text[:EXCERPT_LENGTH])}")
    return "\n".join(lines)
