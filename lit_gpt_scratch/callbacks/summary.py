"""The last word of a run."""

import json
import logging
import time
from collections.abc import Mapping
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.callbacks import Callback

from lit_gpt_scratch.callbacks.in_run_folder import InRunFolder
from lit_gpt_scratch.callbacks.samples import Samples
from lit_gpt_scratch.callbacks.throughput import Throughput
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.evaluation.baselines import xz_bits_per_byte

log = logging.getLogger(__name__)
Kind = TypeVar("Kind", bound=Callback)

LONGEST_FOR_XZ = 16 * 2**20
"""Tokens of validation text beyond which ``xz`` would keep the user waiting for minutes."""


class Summary(InRunFolder):
    """Write ``summary.json`` at the end: final metrics, baselines, tokens, seconds, tokens per second.

    Beside it ``tokenizer.json`` from the start on; in the terminal the result, a sample, and what to do next.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, and store the tokenizer."""
        self._began = time.perf_counter()
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.is_global_zero and self.folder and isinstance(data, PackedText):
            (self.folder.path / "tokenizer.json").write_text(data.tokenizer_json, encoding="utf-8")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the summary and say it."""
        if not trainer.is_global_zero or self.folder is None:
            return
        throughput = _one(trainer, Throughput)
        seconds = time.perf_counter() - self._began
        summary = {
            **{name: value.item() for name, value in trainer.callback_metrics.items() if "/" in name},
            "baselines": _baselines(trainer),
            "step": trainer.global_step,
            "tokens": throughput.tokens,
            "seconds": seconds,
            "tokens_per_second": throughput.timed_tokens / throughput.seconds if throughput.seconds else None,
            "parameters": sum(p.numel() for p in pl_module.parameters()),
        }
        (self.folder.path / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        self._say(summary, _one(trainer, Samples).latest, self.folder)

    def _say(self, summary: Mapping[str, Any], sample: str, folder: RunFolder) -> None:
        bits = summary.get("val/bits_per_byte")
        if isinstance(bits, float):
            beside = "".join(f", {name} {value:.3f}" for name, value in summary["baselines"].items())
            log.info("\nbits per byte of the validation text: this model %.3f%s", bits, beside)
        if sample:
            log.info("\nA sample:\n\n%s", "\n".join("    " + line for line in sample.splitlines()))
        log.info(
            "\n%.0f s. Everything is in %s\n\nNext:\n"
            '  python -m lit_gpt_scratch.generate %s --prompt "def "\n'
            "  python -m lit_gpt_scratch.fit --ckpt_path %s --trainer.max_steps %d\n"
            "  tensorboard --logdir %s",
            summary["seconds"],
            folder.path,
            folder.path,
            folder.path,
            2 * summary["step"],
            folder.path.parent.parent,
        )


def _baselines(trainer: L.Trainer) -> dict[str, float]:
    """Bits per byte of the validation text without a language model."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, PackedText) or data.store.validation.n_tokens > LONGEST_FOR_XZ:
        return {}
    ids = data.store.validation.open()
    text = data.tokenizer.decode(ids[ids != data.tokenizer.end_of_text].tolist())
    return {"xz": xz_bits_per_byte(text)}


def _one(trainer: L.Trainer, kind: type[Kind]) -> Kind:
    found: Kind = next(c for c in trainer.callbacks if isinstance(c, kind))  # type: ignore[attr-defined]
    return found
