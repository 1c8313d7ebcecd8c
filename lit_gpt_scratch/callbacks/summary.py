"""The last word of a run."""

import json
import logging
import math
import time
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import lightning as L
from lightning.pytorch.callbacks import Callback

from lit_gpt_scratch.callbacks.baseline_metrics import BaselineMetrics
from lit_gpt_scratch.callbacks.formatting import format_metrics
from lit_gpt_scratch.callbacks.run_dir import RunDirCallback
from lit_gpt_scratch.callbacks.samples import Samples
from lit_gpt_scratch.callbacks.throughput import Throughput
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.data import Conversations, LabelledText
from lit_gpt_scratch.data.base_datamodule import BaseDataModule
from lit_gpt_scratch.data.prompt_base import PromptedDataModule
from lit_gpt_scratch.tasks import Reward
from lit_gpt_scratch.tasks.gpt_module import GPTModule

log = logging.getLogger(__name__)
CallbackT = TypeVar("CallbackT", bound=Callback)

GENERATE_COMMAND = 'generate {} --prompt "def "'
NEXT_COMMANDS: dict[type, str] = {
    Reward: "convert to-safetensors {} reward.safetensors",
    Conversations: "generate {} --chat",
    LabelledText: 'evaluate {} --text "..."',
    PromptedDataModule: "generate {} --chat",
}
"""What one does with a model, by what it is, or by the data that it has learned from."""


class RunSummary(RunDirCallback):
    """Write ``summary.json`` at the end: final metrics, baselines, tokens, seconds, tokens per second, and why.

    Beside it ``tokenizer.json`` from the start on; in the terminal the result, a sample, and what to do next.
    """

    STATE_KEY: ClassVar = "Summary"

    def __init__(self) -> None:
        self.seconds_before = 0.0
        """Seconds that earlier sessions of the run took."""
        self._began = time.perf_counter()
        self._first_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, and store the tokenizer."""
        self._began, self._first_step = time.perf_counter(), trainer.global_step
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        if trainer.is_global_zero and self.folder and isinstance(data, BaseDataModule):
            data.tokenizer.save(self.folder.path / "tokenizer.json")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the summary and say it, unless there is one and nothing was done."""
        if not trainer.is_global_zero or self.folder is None:
            return
        if trainer.global_step == self._first_step and (self.folder.path / "summary.json").exists():
            return
        throughput, baselines = _find_callback(trainer, Throughput), _find_callback(trainer, BaselineMetrics)
        learned = pl_module.trained_module if isinstance(pl_module, GPTModule) else pl_module  # without a reference
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if "/" in name}
        summary = {
            **{name: value if math.isfinite(value) else None for name, value in metrics.items()},
            "baselines": baselines.figures if baselines else {},
            "step": trainer.global_step,
            "tokens": throughput and throughput.tokens,
            "seconds": self._seconds(),
            "tokens_per_second": throughput and throughput.mean,
            "throughput": throughput and throughput.figures,
            "parameters": sum(p.numel() for p in learned.parameters()),
            "trained_parameters": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
        }
        self.folder.write_text("summary.json", json.dumps(summary, indent=2) + "\n")
        samples = _find_callback(trainer, Samples)
        self._say(summary, samples.latest if samples else "", self.folder, trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what the test measured, and add it to the summary."""
        if not trainer.is_global_zero or self.folder is None:
            return
        found = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
        measured = {name: value if math.isfinite(value) else None for name, value in found.items()}
        path = self.folder.path / "summary.json"
        before = json.loads(path.read_text("utf-8")) if path.exists() else {}
        self.folder.write_text("summary.json", json.dumps({**before, **measured}, indent=2) + "\n")
        log.info("\n%s", format_metrics(trainer.callback_metrics, "test"))

    @property
    def state_key(self) -> str:
        """Name of this callback's state in checkpoints, unchanged since 0.1 so that older checkpoints load."""
        return self.STATE_KEY

    def state_dict(self) -> dict[str, float]:
        """Time so far, so that a resumed run counts on."""
        return {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Count on."""
        self.seconds_before = state_dict["seconds"]

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self._began

    def _say(self, summary: Mapping[str, Any], sample: str, folder: RunFolder, trainer: L.Trainer) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        both = data, trainer.lightning_module
        doors = (door for kind, door in NEXT_COMMANDS.items() if any(isinstance(each, kind) for each in both))
        next_door = next(doors, GENERATE_COMMAND)
        baselines = _find_callback(trainer, BaselineMetrics)
        if baselines and isinstance(value := summary.get(baselines.metric), float):
            beside = "".join(f", {name} {value:.3f}" for name, value in baselines.figures.items())
            log.info("\n%s: this model %.3f%s", baselines.what, value, beside)
        if sample:
            log.info("\nA sample:\n\n%s", "\n".join("    " + line for line in sample.splitlines()))
        further = f"max_steps {2 * summary['step']}"
        if trainer.max_steps == -1 and trainer.max_epochs and trainer.max_epochs > 0:
            further = f"max_epochs {2 * trainer.max_epochs}"
        log.info(
            "\n%.0f s. Everything is in %s\n\nNext:\n"
            "  python -m lit_gpt_scratch.%s\n"
            "  python -m lit_gpt_scratch.fit --ckpt_path %s --trainer.%s\n"
            "  tensorboard --logdir %s",
            summary["seconds"],
            folder.path,
            next_door.format(folder.path),
            folder.path,
            further,
            folder.path.parent.parent,
        )


def _find_callback(trainer: L.Trainer, kind: type[CallbackT]) -> CallbackT | None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)
