"""What a run is going to learn from, and what looks like a mistake in it."""

import math
from collections.abc import Iterator
from typing import Any

import lightning as L

from lit_gpt_scratch.callbacks.wording import count, many
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.data.ordered import OrderedData
from lit_gpt_scratch.data.records import RecordData
from lit_gpt_scratch.data.windows import Windows
from lit_gpt_scratch.diagnosis.settings import CHINCHILLA, FAR, FEW_VALIDATION_TOKENS, MANY_EPOCHS
from lit_gpt_scratch.tasks.gpt_task import GPTTask

FEW_RECORDS = 100
AS_GOOD_AS_NEW = 4
"""Epochs over which repeated text teaches about as much as new text (https://arxiv.org/abs/2305.16264)."""


def data_lines(data: OrderedData) -> Iterator[tuple[str, str]]:
    """Lines of the plan, each with its name."""
    if isinstance(data, PackedText):
        yield "data", f"{data.origin}: {_documents(data)}"
    if isinstance(data, RecordData):
        yield "data", f"{data.origin}: {_records(data)}"
    windows = data.train_windows
    if isinstance(windows, Windows):
        yield "windows", _windows(windows, data.block_size, data.packing if isinstance(data, PackedText) else "packed")


def _documents(data: PackedText) -> str:
    sides = [
        f"{many(side.n_documents, 'document')} of {count(side.n_tokens)} tokens to {purpose}"
        for side, purpose in ((data.store.train, "learn from"), (data.store.validation, "validate on"))
    ]
    each = data.store.train.n_bytes / max(data.store.train.n_tokens, 1)
    return f"{', '.join(sides)}; {each:.2f} bytes a token"


def _records(data: RecordData[Any]) -> str:
    purposes = {"train": "learn from", "validation": "validate on", "test": "test on"}
    return ", ".join(
        f"{many(held.records, 'record')} of {count(held.tokens)} tokens to {purposes[side]}"
        for side, held in data.sides.items()
    )


def _windows(windows: Windows, block_size: int, packing: str) -> str:
    cost = [part.cost for part in windows.parts]
    crossing = sum(part.crossing for part in cost) / len(windows)
    return (
        f"{count(len(windows))} of {block_size} tokens, {packing}: "
        f"{min(part.used for part in cost):.1%} of their positions used, "
        f"{many(sum(part.cut for part in cost), 'document')} cut, {crossing:.0%} with several documents"
        f"{', which see nothing of each other' if windows.document_mask else ''}"
    )


def tokens_per_step(trainer: L.Trainer, data: OrderedData) -> int:
    """Tokens of an optimizer step over all ranks."""
    return data.tokens_per_batch * trainer.accumulate_grad_batches


def warnings(trainer: L.Trainer, task: GPTTask, data: OrderedData) -> Iterator[str]:
    """What looks like a mistake, though it can be done."""
    if isinstance(data, PackedText):
        yield from _short_validation(data)
    if isinstance(data, RecordData):
        yield from _few_records(data)
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps):
        return
    tokens = steps * tokens_per_step(trainer, data)
    epochs = tokens / (len(data.train_windows) * data.block_size)
    if epochs > MANY_EPOCHS:
        what = "the text" if isinstance(data, PackedText) else "the records"
        enough = max(1, int(steps * MANY_EPOCHS / 10 / epochs))
        yield (
            f"{count(epochs)} epochs: the model will learn {what} by heart; name more, or take fewer steps: "
            f"--trainer.max_steps {enough}"
        )
        return  # of a text this short nothing else is worth saying
    if task.init_from is not None:
        return  # it has seen others before
    each = tokens / sum(p.numel() for p in task.net.parameters())
    if not CHINCHILLA / FAR <= each <= CHINCHILLA * FAR:
        change = "a larger model or fewer steps"
        if each < CHINCHILLA:
            change = f"a smaller model or more {'text' if epochs > AS_GOOD_AS_NEW else 'steps'}"
        yield (
            f"{count(each)} tokens a parameter; about {CHINCHILLA} make the most of the computation "
            f"(https://arxiv.org/abs/2203.15556): take {change}"
        )


def _short_validation(data: PackedText) -> Iterator[str]:
    held_out = data.store.validation.n_tokens
    if held_out < data.block_size:
        yield (
            f"the validation text is {held_out:,} tokens, less than one window of {data.block_size}: its figures say "
            f"little; name more text, or raise --data.validation_share"
        )
    elif held_out < FEW_VALIDATION_TOKENS:
        yield (
            f"the validation text is only {held_out:,} tokens: differences of a few percent mean nothing; name more "
            f"text, or raise --data.validation_share"
        )


def _few_records(data: RecordData[Any]) -> Iterator[str]:
    held_out = data.sides["validation"].records
    if held_out < FEW_RECORDS:
        yield (
            f"there are only {many(held_out, 'record')} to validate on: one more that is right changes a share by "
            f"{1 / held_out:.1%}; name more, or raise --data.validation_share"
        )
