"""What the model writes, as it learns."""

from collections.abc import Sequence
from contextlib import nullcontext

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lit_gpt_scratch.callbacks.measured import boards
from lit_gpt_scratch.data.ordered import OrderedData
from lit_gpt_scratch.data.prompted import PromptedData
from lit_gpt_scratch.decoding.sampling import Sampling
from lit_gpt_scratch.decoding.writing import write
from lit_gpt_scratch.model.heads import Tokens
from lit_gpt_scratch.tasks.gpt_task import GPTTask


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
        if trainer.sanity_checking or not (isinstance(pl_module, GPTTask) and isinstance(data, OrderedData)):
            return
        if not isinstance(pl_module.reads, Tokens):
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
            tokens = data.reply_tokens if isinstance(data, PromptedData) else self.tokens
            texts = _written(pl_module, data, prompts, tokens, self.sampling)
            surest = _written(pl_module, data, prompts, min(tokens, self.greedy_tokens), Sampling(temperature=0))
        self.latest = texts[0] if texts else ""
        chance = f"temperature {self.sampling.temperature:g}, top_k {self.sampling.top_k}"
        for board in boards(trainer):
            for row, pair in enumerate(zip(texts, surest, strict=True)):
                both = zip((chance, "the likeliest"), pair, strict=True)
                told = "\n\n".join(f"**{how}**\n\n{_kept(text)}" for how, text in both)
                name = "sample" if len(texts) == 1 else f"sample/{row + 1}"
                board.add_text(name, told, trainer.global_step - 1)  # the step is the last one's, as for metrics


def _written(
    task: GPTTask, data: OrderedData, prompts: Sequence[list[int]], tokens: int, sampling: Sampling
) -> list[str]:
    """The prompts, each with what the model writes behind it."""
    texts = [data.tokenizer.decode(prompt[1:]) for prompt in prompts]
    for row, piece in write(task.net, data.tokenizer, prompts, tokens, sampling, range(len(prompts))):
        texts[row] += piece
    return texts


def _kept(text: str) -> str:
    """As Markdown that keeps it as it is: behind four spaces."""
    return "\n".join("    " + line for line in text.splitlines())
