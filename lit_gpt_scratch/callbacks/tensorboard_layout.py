"""What a run is, in TensorBoard: its plan, its text, its tokens, and the charts to begin with."""

from collections.abc import Iterator
from typing import Any, Final

import lightning as L
from lightning.pytorch.callbacks import Callback

from lit_gpt_scratch.callbacks.baseline_metrics import BaselineMetrics
from lit_gpt_scratch.callbacks.introspection import PARAMETER_PARTS, markdown_code, printable_token
from lit_gpt_scratch.callbacks.metric_names import tensorboard_writers
from lit_gpt_scratch.callbacks.run_plan import RunPlan
from lit_gpt_scratch.callbacks.throughput import TIME_SHARE_TAGS
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.data.base_datamodule import BaseDataModule
from lit_gpt_scratch.text.cleaning_report import format_markdown_table

N_LONGEST_TOKENS: Final = 30
"""Tokens that are shown for being the longest; rubbish in a text shows there first."""
CHART_GROUPS: Final[dict[str, dict[str, list[Any]]]] = {
    "dynamics": {
        "gradient norm by part": ["Multiline", [f"dynamics/gradient_norm/({'|'.join(PARAMETER_PARTS)})"]],
        "update by weight, by part": ["Multiline", ["dynamics/update_ratio/.*"]],
        "gradient norm by layer": ["Multiline", ["dynamics/gradient_norm/layer_.*"]],
    },
    "attention": {
        "share on the first token": ["Multiline", ["attention/sink/.*"]],
        "entropy": ["Multiline", ["attention/entropy/.*"]],
        "distance": ["Multiline", ["attention/distance/.*"]],
    },
    "where it loses": {
        "loss by place in the window": ["Multiline", ["loss_by_position/.*"]],
        "loss by frequency of the token": ["Multiline", ["loss_by_frequency/.*"]],
    },
    "throughput": {"shares of a step's time": ["Multiline", list(TIME_SHARE_TAGS)]},
}
"""Of TensorBoard's custom scalars, behind the losses: charts by group, their curves named or as patterns."""


class TensorBoardLayout(Callback):
    """Write down the plan, the audit of the text and the longest tokens, and lay out the charts.

    To be called after what makes the plan and the baselines. A run that goes on has the texts already.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write all of it."""
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        for board in tensorboard_writers(trainer):
            board.add_custom_scalars(chart_layout(trainer))  # of a run TensorBoard reads one layout only
            if trainer.global_step == 0:
                for name, text in _run_texts(trainer, data):
                    board.add_text(f"run/{name}", text, 0)


def chart_layout(trainer: L.Trainer) -> dict[str, dict[str, list[Any]]]:
    """The layout: losses first, and what they are to be compared with."""
    first: dict[str, list[Any]] = {"loss": ["Multiline", ["train/loss", "val/loss"]]}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # the trainer sets it late
        if isinstance(callback, BaselineMetrics) and callback.figures:
            curves = [callback.metric, *(f"baselines/{name}" for name in callback.figures)]
            first[callback.metric] = ["Multiline", curves]
    return {"the model and its baselines": first, **CHART_GROUPS}


def _run_texts(trainer: L.Trainer, data: Any) -> Iterator[tuple[str, str]]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # the trainer sets it late
        if isinstance(callback, RunPlan) and callback.lines:
            rows = [[name, text.replace("|", "¦")] for name, text in callback.lines if name != "folder"]
            yield "plan", format_markdown_table([["what", "how"], *rows], "<<")
    if isinstance(data, PackedText):
        audits = [store.folder / "audit.md" for store in data.stores]
        told = [audit.read_text(encoding="utf-8") for audit in audits if audit.is_file()]
        if told:
            yield "audit", "\n\n".join(told)
    if isinstance(data, BaseDataModule):
        sizes = data.token_bytes
        longest = sorted(range(len(sizes)), key=lambda id_: (-sizes[id_], id_))[:N_LONGEST_TOKENS]
        rows = [[str(sizes[id_]), markdown_code(printable_token(data.tokenizer, id_))] for id_ in longest]
        yield "longest_tokens", format_markdown_table([["bytes", "token"], *rows], "><")
