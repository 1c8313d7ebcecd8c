"""What the model writes, as it learns."""

from contextlib import nullcontext

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_gpt_scratch.data.ordered import OrderedData
from lit_gpt_scratch.decoding.sampling import Sampling
from lit_gpt_scratch.decoding.writing import write
from lit_gpt_scratch.tasks import LanguageModel


class Samples(Callback):
    """After each validation let the model write, into TensorBoard's text tab: a document, or replies to messages.

    Args:
        tokens: Length of a sample.
        sampling: How to choose tokens.
    """

    def __init__(self, tokens: int = 200, sampling: Sampling = Sampling()) -> None:  # noqa: B008 - frozen
        self.tokens = tokens
        self.sampling = sampling
        self.latest = ""
        """The newest sample, the first where there are several."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write samples; the seeds are fixed, so that those of different steps can be compared."""
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        if trainer.sanity_checking or not (isinstance(pl_module, LanguageModel) and isinstance(data, OrderedData)):
            return
        if not trainer.callback_metrics.get("val/loss", torch.tensor(0.0)).isfinite():
            return  # a diverged model has nothing to say
        prompts = data.prompts
        texts = [data.tokenizer.decode(prompt[1:]) for prompt in prompts]
        # Blocks that are put together in 16 bits need products in 16 bits.
        cut = pl_module.device_mesh is not None
        with trainer.precision_plugin.val_step_context() if cut else nullcontext():
            seeds = range(len(prompts))
            for row, piece in write(pl_module.net, data.tokenizer, prompts, self.tokens, self.sampling, seeds):
                texts[row] += piece
        self.latest = texts[0] if texts else ""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for row, text in enumerate(texts):
                    # Markdown: four spaces keep text as it is. The step is the last one's, as for metrics.
                    block = "\n".join("    " + line for line in text.splitlines())
                    name = "sample" if len(texts) == 1 else f"sample/{row + 1}"
                    logger.experiment.add_text(name, block, trainer.global_step - 1)
