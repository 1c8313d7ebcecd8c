"""What the run is measured against."""

import logging

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_gpt_scratch.callbacks.throughput import SHARES
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.evaluation.baselines import TOKENS_FOR_COUNTS, token_baselines, xz_bits_per_byte

log = logging.getLogger(__name__)

LONGEST_FOR_XZ = 4_000_000
"""Tokens of validation text beyond which ``xz`` would keep the user waiting for more than some ten seconds."""


class Baselines(Callback):
    """Score the validation text without a model: uniform, unigram and bigram of tokens, and ``xz -9``.

    Beside every validation they are logged as ``baselines/<name>``; TensorBoard's tab of custom scalars draws them
    and the model's ``val/bits_per_byte`` into one chart.
    """

    def __init__(self) -> None:
        self.bits_per_byte: dict[str, float] = {}
        """By name, from the start of training on; only on the first rank."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count and compress; half a second for half a megabyte."""
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        if not trainer.is_global_zero or not isinstance(data, PackedText):
            return
        validation = data.store.validation
        ids = validation.read(0, validation.n_tokens)
        counted = data.some_tokens(TOKENS_FOR_COUNTS)
        self.bits_per_byte = token_baselines(counted, ids, data.vocab_size, validation.n_bytes)
        if len(ids) <= LONGEST_FOR_XZ:
            text = data.tokenizer.decode(ids[ids != data.tokenizer.end_of_text].tolist())
            self.bits_per_byte["xz"] = xz_bits_per_byte(text)
        else:
            log.info("no figure of xz -9 to compare with: the validation text is longer than it takes in a few seconds")
        curves = ["val/bits_per_byte", *(f"baselines/{name}" for name in self.bits_per_byte)]
        charts = {  # of a run TensorBoard reads one layout only: here are all of them
            "the model and its baselines": {"bits per byte": ["Multiline", curves]},
            "throughput": {"shares of a step's time": ["Multiline", list(SHARES)]},
        }
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(charts)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the same figures again, so that they are lines in a chart."""
        figures = {f"baselines/{name}": value for name, value in self.bits_per_byte.items()}
        if figures and not trainer.sanity_checking:
            for logger in trainer.loggers:
                logger.log_metrics(figures, trainer.global_step - 1)  # as Lightning numbers a validation
