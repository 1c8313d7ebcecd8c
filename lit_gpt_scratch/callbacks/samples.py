"""What the model writes, as it learns."""

from contextlib import nullcontext

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.decoding.sampling import Sampling
from lit_gpt_scratch.decoding.writing import write
from lit_gpt_scratch.tasks import LanguageModel


class Samples(Callback):
    """After each validation let the model write a document from its beginning, into TensorBoard's text tab.

    Args:
        tokens: Length of a sample.
        sampling: How to choose tokens.
    """

    def __init__(self, tokens: int = 200, sampling: Sampling = Sampling()) -> None:  # noqa: B008 - frozen
        self.tokens = tokens
        self.sampling = sampling
        self.latest = ""
        """The newest sample."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write a sample; the seed is fixed, so that samples of different steps can be compared."""
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        if trainer.sanity_checking or not (isinstance(pl_module, LanguageModel) and isinstance(data, PackedText)):
            return
        if not trainer.callback_metrics.get("val/loss", torch.tensor(0.0)).isfinite():
            return  # a diverged model has nothing to say
        # Blocks that are put together in 16 bits need products in 16 bits.
        cut = pl_module.device_mesh is not None
        with trainer.precision_plugin.val_step_context() if cut else nullcontext():
            pieces = write(pl_module.net, data.tokenizer, [""], self.tokens, self.sampling, seeds=[0])
            self.latest = "".join(piece for _, piece in pieces)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # Markdown: four spaces keep text as it is. The step is the last one's, as for metrics.
                block = "\n".join("    " + line for line in self.latest.splitlines())
                logger.experiment.add_text("sample", block, trainer.global_step - 1)
