"""Keeping out of the weights what would spoil them."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, get_args

import lightning as L
import torch
from torch import Tensor

from lit_gpt_scratch.callbacks.checkpointing import RunDirCallback
from lit_gpt_scratch.callbacks.metric_logging import log_text
from lit_gpt_scratch.data.base_datamodule import BaseDataModule
from lit_gpt_scratch.diagnostics.spike_detector import PATIENCE, SpikeDetector
from lit_gpt_scratch.distributed.collectives import HostReducer
from lit_gpt_scratch.lightning_compat import is_validating_between_steps, restore_weights_and_optimizers
from lit_gpt_scratch.model.activation_hooks import eager_eval_mode
from lit_gpt_scratch.tasks.gpt_module import GPTModule

log = logging.getLogger(__name__)

GuardMode = Literal["off", "warn", "act"]
GUARD_MODES: Final[tuple[GuardMode, ...]] = get_args(GuardMode)
MAX_REWINDS: Final = 3
"""Times to rewind without a calm stretch between, after which the new level is accepted."""
MAX_SKIPPED_IN_A_ROW: Final = 200
"""Steps in a row without a finite gradient, after which the run is stopped: nothing is learned any more."""
STEP_KINDS: Final = (None, "spike", "non_finite")


class SpikeGuard(RunDirCallback):
    """Look at the loss and the gradient of every step before it is done.

    ``warn`` says which steps are not finite or stand out (``diagnosis/spikes.py``), where, and with which documents,
    and changes nothing. ``act`` leaves such a step out: it counts, but weights, averages and the optimizer stay as they
    were, and the next batch comes. When ``PATIENCE`` steps in a row stand out, it is no batch's doing, and the run goes
    back to weights and optimizer of the last good checkpoint, and on with the next batch. Where that does not help
    either, a level is accepted that is finite, and ``MAX_SKIPPED_IN_A_ROW`` steps that are not end the run. All
    ranks decide alike.
    ``off`` does not look.

    A good checkpoint, ``good-N.ckpt``, is written beside ``last.ckpt``, at the intervals of steps and validations
    alone, not when time or a signal wants one, so that a run that was killed rewinds to where it would have.

    ``act`` waits for the device once a step; ``warn`` does where that costs nothing, on a CPU, and elsewhere reads
    what has happened at log points.

    Args:
        mode: ``off``, ``warn`` or ``act``.
        every_n_steps: Optimizer steps between good checkpoints; None writes them at validations alone.
    """

    STATE_KEY: ClassVar = "Guard"

    def __init__(self, mode: GuardMode = "warn", every_n_steps: int | None = None) -> None:
        self.mode = mode
        self.every_n_steps = every_n_steps
        self.detector = SpikeDetector()
        self.refused = 0
        """Steps that were left out, in the whole run."""
        self.good: int | None = None
        """The step of the good checkpoint."""
        self._rewinds = 0
        self._rewind_due = False
        self._outdated: Path | None = None
        self._unread: list[tuple[int, Tensor]] = []
        self._batches: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the seat of the task's judge."""
        if self.mode == "off" or not isinstance(pl_module, GPTModule):
            return
        self._trainer, self._task = trainer, pl_module
        self._ranks = HostReducer()
        self._reads_at_once = self.mode == "act" or pl_module.device.type == "cpu"
        # A scaler looks for the largest factor that 16 bits bear, by stepping over it; that is its business.
        self._scales = getattr(trainer.precision_plugin, "scaler", None) is not None
        pl_module.step_filter = self._judge
        if self.mode == "act" and self.folder is not None:
            self._tidy(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave it, and say what is not said yet."""
        if isinstance(pl_module, GPTModule) and pl_module.step_filter == self._judge:
            self._read()
            pl_module.step_filter = None
        self._drop_outdated(trainer)
        self._batches.clear()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the step's batches at hand, and a good checkpoint at the interval."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._batches.clear()
            if self.every_n_steps and trainer.global_step and trainer.global_step % self.every_n_steps == 0:
                self._keep_good(trainer)
        self._batches[batch_idx] = batch

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep a good checkpoint."""
        if is_validating_between_steps(trainer):
            self._keep_good(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Rewind, when the step is over; and read at log points what is not read at once."""
        self._drop_outdated(trainer)
        if self._rewind_due:
            self._rewind_due = False
            self._rewind(trainer, pl_module)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # the trainer sets it late
        if self._unread and (len(self._unread) >= (every or 50)):
            self._read()

    def _judge(self, loss: Tensor | None, norm: Tensor) -> bool:
        """What the task asks before each step."""
        known = norm.new_zeros(()) if loss is None else loss.to(norm.device)
        self._unread.append((self._trainer.global_step, torch.stack((known.float(), norm.float())).detach()))
        return self._read() if self._reads_at_once else True

    def _read(self) -> bool:
        """Judge what was measured since the last time; whether the last step may be done."""
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
                    self._stands_out(kind, step, loss, norm)
        return kind is None or self.mode != "act"

    def _stands_out(self, kind: str, step: int, loss: float, norm: float) -> None:
        acts, row = self.mode == "act", self.detector.in_a_row
        self.refused += acts
        values = {"guard/refused": float(self.refused)} if acts else {}
        if row <= PATIENCE:  # of a run that has gone wrong for good enough is said
            what = f"loss {loss:.4g}, gradient norm {norm:.4g}"
            if kind == "spike":
                what += f", usually {self.detector.median_loss:.4g} and {self.detector.median_norm:.4g}"
            self._tell(kind, step, f"{what}; {'left out' if acts else 'done'}")
            values[f"guard/{kind}"] = loss if kind == "non_finite" else self.detector.deviations
        for logger in self._trainer.loggers if values else ():
            logger.log_metrics(values, step)
        if row >= PATIENCE and acts and self.good is not None and self._rewinds < MAX_REWINDS:
            self._rewind_due = True
        elif row >= PATIENCE and kind == "spike":
            self.detector.reset()
        elif row >= MAX_SKIPPED_IN_A_ROW and acts:
            tried = f" after {self._rewinds} rewinds" if self._rewinds else ""
            log.warning("guard: %d steps in a row were left out%s: nothing is learned, and the run ends", row, tried)
            self._trainer.should_stop = True

    def _tell(self, kind: str, step: int, what: str) -> None:
        """Where it comes from; every rank has to ask. A step that is past cannot be looked at any more."""
        lines = [what]
        if self._reads_at_once:
            batches = list(self._batches.values())
            if kind == "non_finite":
                lines.append(locate_non_finite(self._trainer, self._task, batches))
            try:
                found = describe_hardest_rows(self._trainer, self._task, self._batches)
            except Exception:  # a task of one's own may not be asked for less than a batch, and looking ends no run
                log.warning("the hardest windows of step %d cannot be told apart", step, exc_info=True)
                found = ""
            if found:
                lines.append(f"hardest windows:\n\n{found}")
        log_text(self._trainer, f"guard/{kind}/where", "\n\n".join(lines), step)

    def _keep_good(self, trainer: L.Trainer) -> None:
        """Write one, if what the weights are is known to be good, and drop the one before."""
        step, calm = trainer.global_step, self.detector.is_calm
        if self.mode != "act" or self.folder is None or step == self.good or not calm:
            return
        before, self.good, self._rewinds = self.good, step, 0
        trainer.save_checkpoint(self._path(step))
        # ``last.ckpt`` still names the one before. It is written next, in the same moment, and then names this one.
        self._outdated = None if before is None else self._path(before)

    def _tidy(self, trainer: L.Trainer) -> None:
        """Know no good checkpoint that is gone, and drop those that nothing names: a kill can leave one."""
        own = None if self.good is None else self._path(self.good)
        if self._ranks.max(own is not None and not own.is_file()):
            log.warning("guard: %s is gone; the run can rewind once the next one is written", own)
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
        if path is None or self._ranks.max(not path.is_file()):
            log.warning("cannot rewind: %s is not there on every machine", path)
            self.detector.reset()
            return
        self._rewinds += 1
        self.detector.in_a_row = 0
        restore_weights_and_optimizers(trainer, path)
        pl_module.on_train_start()  # as a run begins that goes on from there, at the rate of the step that comes next
        step = trainer.global_step - 1
        log.warning("guard: step %d: %d in a row stood out; back to the weights of step %d", step, PATIENCE, self.good)
        for logger in trainer.loggers:
            logger.log_metrics({"guard/rewound_to": float(self.good or 0)}, step)

    def _path(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder.checkpoints / f"good-{step}.ckpt"

    @property
    def state_key(self) -> str:
        """Name of this callback's state in checkpoints, unchanged since 0.1 so that older checkpoints load."""
        return self.STATE_KEY

    def state_dict(self) -> dict[str, Any]:
        """What later steps are judged by, and where to rewind to."""
        self._read()
        return {
            "watch": self.detector.state_dict(),
            "refused": self.refused,
            "good": self.good,
            "rewinds": self._rewinds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.detector.load_state_dict(state_dict["watch"])
        self.refused, self.good = state_dict["refused"], state_dict["good"]
        self._rewinds = state_dict["rewinds"]


EXCERPT_LENGTH = 160
"""Characters of a text that is shown."""
N_HARDEST_ROWS = 3
"""Windows of a step that are shown."""


def locate_non_finite(trainer: L.Trainer, task: L.LightningModule, batches: Sequence[Any]) -> str:
    """Where a step's numbers stopped being finite: forward again through its batches, then by its gradient.

    Every rank has to ask, because weights may be cut among them. A step that was done has left it in the weights.
    """
    named = [(name.removeprefix("net."), p) for name, p in task.named_parameters() if p.grad is not None]
    weights = [name for name, p in named if not p.detach().isfinite().all()]
    if weights:
        return f"already in {len(weights)} of {len(named)} weights, {weights[0]} the first of them"
    if isinstance(task, GPTModule):
        for batch in batches:
            part = _first_non_finite_module(trainer, task, batch)
            if part is not None:
                return f"forward, first out of {part}"
    gradients = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
    if not gradients:
        return "in the loss alone, not in its gradient"
    if len(gradients) == len(named):
        return "not in a forward pass, but in the whole gradient: in the loss itself, or on the way back from it"
    return f"backward, first at {gradients[-1]}, in {len(gradients)} of {len(named)} gradients"


def _first_non_finite_module(trainer: L.Trainer, task: GPTModule, batch: Any) -> str | None:
    """The first part of a network whose output is not finite, or None."""
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
            lost, _ = task.loss_and_count(batch)
        finally:
            for hook in hooks:
                hook.remove()
    look("the loss", lost)
    return found[0] if found else None


def describe_hardest_rows(trainer: L.Trainer, task: L.LightningModule, batches: Mapping[int, Any]) -> str:
    """The windows, texts or pairs of a step that the model finds hardest, whence they are, and how they begin.

    Args:
        trainer: Of the run.
        task: Asked for the loss of each alone, as ``GPTModule.split_batch`` gives them.
        batches: This rank's, by their number in the epoch.

    Returns:
        Markdown; nothing of a task or data that know no windows.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
    knows_rows = all(isinstance(batch, Mapping) and "input_ids" in batch for batch in batches.values())
    if not (isinstance(task, GPTModule) and isinstance(data, BaseDataModule) and knows_rows):
        return ""
    windows = []
    with eager_eval_mode(task), torch.no_grad(), trainer.precision_plugin.train_step_context():
        for number, batch in batches.items():
            for place, one in enumerate(task.split_batch(batch)):
                lost, counted = task.loss_and_count(one)
                if counted > 0:  # others only fill a batch up
                    windows.append(((lost / counted).item(), number, place, one))
    # Of NaN none is greater: what is not finite comes first.
    windows.sort(key=lambda window: -window[0] if window[0] == window[0] else float("-inf"))
    lines = []
    for loss, number, place, one in windows[:N_HARDEST_ROWS]:
        ids = one["input_ids"][0][: int(one["lengths"][0]) if "lengths" in one else None]
        text = " ".join(data.tokenizer.decode(ids.tolist()).split())
        lines.append(
            f"- loss {loss:.2f}, {data.describe_row(trainer.current_epoch, number, place)}: `{text[:EXCERPT_LENGTH]}`"
        )
    return "\n".join(lines)
