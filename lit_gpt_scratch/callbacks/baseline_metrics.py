"""What the run is measured against."""

import logging
from concurrent.futures import ThreadPoolExecutor

import lightning as L
from lightning.pytorch.callbacks import Callback

from lit_gpt_scratch.callbacks.samples import RewardEval
from lit_gpt_scratch.data import LabelledText, PackedText
from lit_gpt_scratch.evaluation.baselines import MAX_TRAINING_TOKENS, compute_token_baselines, measure_xz_bits_per_byte

log = logging.getLogger(__name__)

MAX_XZ_TOKENS = 4_000_000
"""Tokens of validation text beyond which ``xz`` would keep the user waiting for more than some ten seconds."""


class BaselineMetrics(Callback):
    """Score what is measured without the training: text by counts of tokens and ``xz -9``, classes by the commonest.

    Replies are scored by the model that an alignment begins with.

    Beside every validation they are logged as ``baselines/<name>``; TensorBoard's tab of custom scalars draws them
    and the model's own figure into one chart.
    """

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        """By name, from the start of training on; only on the first rank."""
        self.metric = ""
        """The model's own figure that they are to be compared with."""
        self.what = ""
        """In words, what they are."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count and compress; half a second for half a megabyte."""
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        if not trainer.is_global_zero:
            return
        if isinstance(data, PackedText):
            self.metric, self.what = "val/bits_per_byte", "bits per byte of the validation text"
            self.figures = _text_baselines(data)
        elif isinstance(data, LabelledText):
            self.metric, self.what = "val/accuracy", "accuracy on the validation records"
            self.figures = {"commonest class": _majority_class_accuracy(data)}
        elif (start := _initial_true_reward(trainer)) is not None:
            self.metric, self.what = "val/true_reward", "share of replies as they should be"
            self.figures = {"true_reward": start}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the same figures again, so that they are lines in a chart."""
        figures = {f"baselines/{name}": value for name, value in self.figures.items()}
        if figures and not trainer.sanity_checking:
            for logger in trainer.loggers:
                logger.log_metrics(figures, trainer.global_step - 1)  # as Lightning numbers a validation


def _initial_true_reward(trainer: L.Trainer) -> float | None:
    """What ``RewardEval`` measured of the model before its training."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
    return next((callback.start for callback in callbacks if isinstance(callback, RewardEval)), None)


def _text_baselines(data: PackedText) -> dict[str, float]:
    validation = data.store.validation
    ids = validation.read(0, validation.n_tokens)
    counted = data.sample_train_tokens(MAX_TRAINING_TOKENS), ids, data.vocab_size, validation.n_bytes
    if len(ids) > MAX_XZ_TOKENS:
        log.info("no figure of xz -9 to compare with: the validation text is longer than it takes in a few seconds")
        return compute_token_baselines(*counted)
    text = data.tokenizer.decode(ids[ids != data.tokenizer.end_of_text].tolist())
    with ThreadPoolExecutor(1) as beside:
        xz = beside.submit(measure_xz_bits_per_byte, text)
        return {**compute_token_baselines(*counted), "xz": xz.result()}


def _majority_class_accuracy(data: LabelledText) -> float:
    """The accuracy of whoever always says the class that is commonest in training."""
    commonest = max(range(len(data.class_names)), key=lambda place: data.class_counts[place])
    labels = [int(example.sequences[0].labels[0]) for example in data.examples["validation"]]
    return labels.count(commonest) / len(labels)
