"""What a preference that can be checked says of the model's replies."""

from contextlib import nullcontext
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lit_gpt_scratch.data.prompted import PromptedData
from lit_gpt_scratch.data.record_split import Side
from lit_gpt_scratch.decoding.sampling import Sampling
from lit_gpt_scratch.evaluation.replies import Reply, replies
from lit_gpt_scratch.model.heads import Tokens
from lit_gpt_scratch.tasks.gpt_task import GPTTask


class TrueReward(Callback):
    """Let the model reply to prompts that are held out, and judge the replies, at each validation and in the test.

    ``true_reward`` is the share of replies that are as they should be; one that the model did not end is not. The
    replies are drawn as the model's probabilities are, always with the same random numbers, so that a figure changes
    by what was learned alone.

    Args:
        prompts: The most prompts of a side that are replied to, the first of them.
    """

    def __init__(self, prompts: int = 256) -> None:
        self.prompts = prompts
        self.sampling = Sampling(temperature=1.0, top_k=None)
        self.start: float | None = None
        """That of the model before its training, on what the test has; on what is validated on where there is none."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the start, unless this run has done so before."""
        if self.start is None and (data := _judged(trainer, pl_module)):
            written = self._replies(trainer, pl_module, "test" if "test" in data.places else "validation")
            self.start = _share(data, written)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Of the prompts that are validated on."""
        if not trainer.sanity_checking:
            self._measure(trainer, pl_module, "validation", "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Of those of the test."""
        self._measure(trainer, pl_module, "test", "test")

    def state_dict(self) -> dict[str, float | None]:
        """What the run began with; when it goes on, it can no longer be measured."""
        return {"start": self.start}

    def load_state_dict(self, state_dict: dict[str, float | None]) -> None:
        """Take it over."""
        self.start = state_dict["start"]

    def _measure(self, trainer: L.Trainer, task: L.LightningModule, side: Side, name: str) -> None:
        if (data := _judged(trainer, task)) is None:
            return
        written = self._replies(trainer, task, side)
        if written:
            task.log(f"{name}/true_reward", _share(data, written), sync_dist=True)
            task.log(f"{name}/reply_tokens", sum(reply.n_tokens for reply in written) / len(written), sync_dist=True)

    def _replies(self, trainer: L.Trainer, task: Any, side: Side) -> list[Reply]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        prompts = data.prompt_ids(side)[: self.prompts]
        training = task.net.training
        # Blocks that are put together in 16 bits need products in 16 bits.
        with trainer.precision_plugin.val_step_context() if task.device_mesh is not None else nullcontext():
            written = replies(task.net.eval(), data.tokenizer, prompts, data.reply_tokens, self.sampling)
        task.net.train(training)
        return written


def _judged(trainer: L.Trainer, task: L.LightningModule) -> PromptedData[Any] | None:
    """The data, if the task writes replies that can be judged by it."""
    data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
    writes = isinstance(task, GPTTask) and isinstance(task.reads, Tokens)
    return data if writes and isinstance(data, PromptedData) and data.judge is not None else None


def _share(data: PromptedData[Any], written: list[Reply]) -> float:
    assert data.judge is not None
    return sum(reply.ended and data.judge(reply.text) for reply in written) / max(len(written), 1)
