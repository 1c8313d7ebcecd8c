"""What the model writes, as it learns."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lit_gpt_scratch.callbacks.metric_logging import tensorboard_writers
from lit_gpt_scratch.data.base_datamodule import BaseDataModule
from lit_gpt_scratch.data.prompt_base import PromptedDataModule
from lit_gpt_scratch.data.record_split import RecordSplit
from lit_gpt_scratch.evaluation.chat_eval import ChatReply, generate_replies
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.generation.streaming import stream_text
from lit_gpt_scratch.model.output_heads import TokenHead
from lit_gpt_scratch.tasks.gpt_module import GPTModule


class Samples(Callback):
    """After each validation let the model write, in TensorBoard's text tab: one scrolls from noise to language.

    Each prompt is continued twice: by chance, and by always taking the likeliest token, which shows what the model is
    surest of, and where it begins to repeat itself.

    Args:
        prompts: Texts to continue; by default those of the data: a document, the beginnings of documents, or
            conversations that wait for a reply.
        tokens: Length of a sample, where the data does not say how long a reply may be.
        greedy_tokens: Length of one without chance, which needs less room to show what it has to show.
        sampling: How to choose by chance.
    """

    def __init__(
        self,
        prompts: Sequence[str] | None = None,
        tokens: int = 32,
        greedy_tokens: int = 10,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    ) -> None:
        self.prompts = prompts
        self.tokens = tokens
        self.greedy_tokens = greedy_tokens
        self.sampling = sampling
        self.latest = ""
        """The newest sample, the first where there are several."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write samples; the seeds are fixed, so that those of different steps can be compared."""
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        if trainer.sanity_checking or not (isinstance(pl_module, GPTModule) and isinstance(data, BaseDataModule)):
            return
        if not isinstance(pl_module.output_head, TokenHead):
            return  # it writes nothing
        if not trainer.callback_metrics.get("val/loss", torch.tensor(0.0)).isfinite():
            return  # a diverged model has nothing to say
        prompts = data.prompts
        if self.prompts is not None:
            prompts = [[data.tokenizer.start_of_text, *data.tokenizer.encode(prompt)] for prompt in self.prompts]
            # One that is longer than the context is continued from its end.
            prompts = [prompt[-pl_module.net.block_size :] for prompt in prompts]
        # Blocks that are put together in 16 bits need products in 16 bits.
        cut = pl_module.device_mesh is not None
        with trainer.precision_plugin.val_step_context() if cut else nullcontext():
            tokens = data.reply_tokens if isinstance(data, PromptedDataModule) else self.tokens
            texts = _generate_texts(pl_module, data, prompts, tokens, self.sampling)
            surest = _generate_texts(pl_module, data, prompts, min(tokens, self.greedy_tokens), Sampling(temperature=0))
        self.latest = texts[0] if texts else ""
        chance = f"temperature {self.sampling.temperature:g}, top_k {self.sampling.top_k}"
        for board in tensorboard_writers(trainer):
            for row, pair in enumerate(zip(texts, surest, strict=True)):
                both = zip((chance, "the likeliest"), pair, strict=True)
                told = "\n\n".join(f"**{how}**\n\n{_as_code_block(text)}" for how, text in both)
                name = "sample" if len(texts) == 1 else f"sample/{row + 1}"
                board.add_text(name, told, trainer.global_step - 1)  # the step is the last one's, as for metrics


def _generate_texts(
    task: GPTModule, data: BaseDataModule, prompts: Sequence[list[int]], tokens: int, sampling: Sampling
) -> list[str]:
    """The prompts, each with what the model writes behind it."""
    texts = [data.tokenizer.decode(prompt[1:]) for prompt in prompts]
    for row, piece in stream_text(task.net, data.tokenizer, prompts, tokens, sampling, range(len(prompts))):
        texts[row] += piece
    return texts


def _as_code_block(text: str) -> str:
    """As Markdown that keeps it as it is: behind four spaces."""
    return "\n".join("    " + line for line in text.splitlines())


class RewardEval(Callback):
    """Let the model reply to prompts that are held out, and judge the replies, at each validation and in the test.

    ``true_reward`` is the share of replies that are as they should be; one that the model did not end is not. The
    replies are drawn as the model's probabilities are, always with the same random numbers, so that a figure changes
    by what was learned alone.

    Args:
        prompts: The most prompts of a side that are replied to, the first of them.
    """

    STATE_KEY: ClassVar = "TrueReward"

    def __init__(self, prompts: int = 256) -> None:
        self.prompts = prompts
        self.sampling = Sampling(temperature=1.0, top_k=None)
        self.start: float | None = None
        """That of the model before its training, on what the test has; on what is validated on where there is none."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the start, unless this run has done so before."""
        if self.start is None and (data := _data_with_reward_check(trainer, pl_module)):
            written = self._replies(trainer, pl_module, "test" if "test" in data.split_indices else "validation")
            self.start = _true_reward(data, written)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Of the prompts that are validated on."""
        if not trainer.sanity_checking:
            self._measure(trainer, pl_module, "validation", "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Of those of the test."""
        self._measure(trainer, pl_module, "test", "test")

    @property
    def state_key(self) -> str:
        """Name of this callback's state in checkpoints, unchanged since 0.1 so that older checkpoints load."""
        return self.STATE_KEY

    def state_dict(self) -> dict[str, float | None]:
        """What the run began with; when it goes on, it can no longer be measured."""
        return {"start": self.start}

    def load_state_dict(self, state_dict: dict[str, float | None]) -> None:
        """Take it over."""
        self.start = state_dict["start"]

    def _measure(self, trainer: L.Trainer, task: L.LightningModule, side: RecordSplit, name: str) -> None:
        if (data := _data_with_reward_check(trainer, task)) is None:
            return
        written = self._replies(trainer, task, side)
        if written:
            task.log(f"{name}/true_reward", _true_reward(data, written), sync_dist=True)
            task.log(f"{name}/reply_tokens", sum(reply.n_tokens for reply in written) / len(written), sync_dist=True)

    def _replies(self, trainer: L.Trainer, task: Any, side: RecordSplit) -> list[ChatReply]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        prompts = data.prompt_ids(side)[: self.prompts]
        training = task.net.training
        # Blocks that are put together in 16 bits need products in 16 bits.
        with trainer.precision_plugin.val_step_context() if task.device_mesh is not None else nullcontext():
            written = generate_replies(task.net.eval(), data.tokenizer, prompts, data.reply_tokens, self.sampling)
        task.net.train(training)
        return written


def _data_with_reward_check(trainer: L.Trainer, task: L.LightningModule) -> PromptedDataModule[Any] | None:
    """The data, if the task writes replies that can be judged by it."""
    data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
    writes = isinstance(task, GPTModule) and isinstance(task.output_head, TokenHead)
    return data if writes and isinstance(data, PromptedDataModule) and data.reply_check is not None else None


def _true_reward(data: PromptedDataModule[Any], written: list[ChatReply]) -> float:
    assert data.reply_check is not None
    return sum(reply.ended and data.reply_check(reply.text) for reply in written) / max(len(written), 1)
