"""Callbacks that generate text samples after each validation run and measure the fraction of correct replies."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lit_gpt_scratch.callbacks.metric_logging import tensorboard_writers
from lit_gpt_scratch.checkpoint.training_state import validate_callback_state
from lit_gpt_scratch.data.base_datamodule import BaseDataModule
from lit_gpt_scratch.data.record_split import RecordSplit
from lit_gpt_scratch.evaluation.chat_eval import ChatReply, generate_replies
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.generation.streaming import stream_text
from lit_gpt_scratch.model.output_heads import TokenHead
from lit_gpt_scratch.tasks.gpt_module import GPTModule
from lit_gpt_scratch.text.markdown import markdown_code_block


class Samples(Callback):
    """Callback that generates text samples after each validation run and logs them to TensorBoard's text tab.

    Each prompt is continued twice: once by sampling and once by greedy decoding. The greedy continuation shows the
    model's most probable output and where it starts to repeat itself.

    Args:
        prompts: Strings to continue. If None, the prompts of the data module are used: for text, a short prompt and the
            beginnings of validation documents; for chat data, the prompts of validation conversations.
        tokens: Maximum number of tokens per sample. If the data module has the attribute ``reply_tokens``, that value
            is used instead.
        greedy_tokens: Maximum number of tokens per greedy continuation, capped at the sample length.
        sampling: Sampling parameters, such as the temperature.
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
        """Most recent sample for the first prompt, or an empty string before the first validation run."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Generate and log samples with fixed seeds, so that samples from different steps are comparable."""
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        if trainer.sanity_checking or not (isinstance(pl_module, GPTModule) and isinstance(data, BaseDataModule)):
            return
        if not isinstance(pl_module.output_head, TokenHead):
            return  # the model does not generate text
        if not trainer.callback_metrics.get("val/loss", torch.tensor(0.0)).isfinite():
            return  # a diverged model has no probabilities to sample from
        prompts = data.prompts
        if self.prompts is not None:
            prompts = [[data.tokenizer.start_of_text, *data.tokenizer.encode(prompt)] for prompt in self.prompts]
            # A prompt longer than the context is truncated from the left.
            prompts = [prompt[-pl_module.net.block_size :] for prompt in prompts]
        with _precision_context(trainer, pl_module):
            tokens = getattr(data, "reply_tokens", self.tokens)
            sampled = _generate_texts(pl_module, data, prompts, tokens, self.sampling)
            greedy = _generate_texts(pl_module, data, prompts, min(tokens, self.greedy_tokens), Sampling(temperature=0))
        self.latest = sampled[0] if sampled else ""
        how_sampled = f"temperature {self.sampling.temperature:g}, top_k {self.sampling.top_k}"
        for board in tensorboard_writers(trainer):
            for row, pair in enumerate(zip(sampled, greedy, strict=True)):
                both = zip((how_sampled, "greedy"), pair, strict=True)
                text = "\n\n".join(f"**{how}**\n\n{markdown_code_block(sample)}" for how, sample in both)
                name = "sample" if len(sampled) == 1 else f"sample/{row + 1}"
                board.add_text(name, text, trainer.global_step - 1)  # step at which Lightning logs validation metrics


def _precision_context(trainer: L.Trainer, task: L.LightningModule) -> Any:
    """Return the trainer's precision context if the network is sharded, otherwise a null context.

    The blocks of a sharded network may be gathered in 16-bit precision and therefore require autocast.
    """
    return trainer.precision_plugin.val_step_context() if task.device_mesh is not None else nullcontext()


def _generate_texts(
    task: GPTModule, data: BaseDataModule, prompts: Sequence[list[int]], tokens: int, sampling: Sampling
) -> list[str]:
    """Return each prompt followed by the model's continuation."""
    texts = [data.tokenizer.decode(prompt[1:]) for prompt in prompts]
    for row, piece in stream_text(task.net, data.tokenizer, prompts, tokens, sampling, range(len(prompts))):
        texts[row] += piece
    return texts


class RewardEval(Callback):
    """Callback that generates replies to held-out prompts and logs the fraction of correct replies.

    At the end of each validation or test run, it logs ``true_reward``, the fraction of replies that pass the data
    module's ``reply_check``, and ``reply_tokens``, the mean reply length in tokens. A reply that reaches the token
    limit without an end-of-text token counts as incorrect. Replies are sampled from the model's unmodified
    distribution, always with the same seeds, so that the metrics change only if the model does.

    Args:
        prompts: Maximum number of prompts per split; the first prompts of the split are used.
    """

    state_key = "TrueReward"  # key in checkpoints; unchanged since 0.1

    def __init__(self, prompts: int = 256) -> None:
        self.prompts = prompts
        self.sampling = Sampling(temperature=1.0, top_k=None)
        self.start: float | None = None
        """True reward of the initial model on the test prompts, or on the validation prompts without a test split."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the true reward of the initial model, unless an earlier session has already measured it."""
        if self.start is None and (data := _data_with_reply_check(trainer, pl_module)):
            replies = self._replies(trainer, pl_module, "test" if "test" in data.split_indices else "validation")
            self.start = _true_reward(data, replies)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the true reward on the validation prompts."""
        if not trainer.sanity_checking:
            self._evaluate(trainer, pl_module, "validation", "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the true reward on the test prompts."""
        self._evaluate(trainer, pl_module, "test", "test")

    def state_dict(self) -> dict[str, float | None]:
        """Return the true reward of the initial model, which cannot be measured again after resuming."""
        return {"start": self.start}

    def load_state_dict(self, state_dict: dict[str, float | None]) -> None:
        """Restore the true reward of the initial model."""
        self.start = validate_callback_state(state_dict, dict[str, float | None], self.state_key).get("start")

    def _evaluate(self, trainer: L.Trainer, task: L.LightningModule, split: RecordSplit, name: str) -> None:
        if (data := _data_with_reply_check(trainer, task)) is None:
            return
        replies = self._replies(trainer, task, split)
        if replies:
            task.log(f"{name}/true_reward", _true_reward(data, replies), sync_dist=True)
            task.log(f"{name}/reply_tokens", sum(reply.n_tokens for reply in replies) / len(replies), sync_dist=True)

    def _replies(self, trainer: L.Trainer, task: Any, split: RecordSplit) -> list[ChatReply]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        prompts = data.prompt_ids(split)[: self.prompts]
        training = task.net.training
        with _precision_context(trainer, task):
            replies = generate_replies(task.net.eval(), data.tokenizer, prompts, data.reply_tokens, self.sampling)
        task.net.train(training)
        return replies


def _data_with_reply_check(trainer: L.Trainer, task: L.LightningModule) -> Any:
    """Return the data module if the task generates text and the data module can check replies, otherwise None."""
    data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
    generates = isinstance(task, GPTModule) and isinstance(task.output_head, TokenHead)
    return data if generates and getattr(data, "reply_check", None) is not None else None


def _true_reward(data: Any, replies: list[ChatReply]) -> float:
    passed = sum(bool(reply.ended and data.reply_check(reply.text)) for reply in replies)
    return passed / max(len(replies), 1)
