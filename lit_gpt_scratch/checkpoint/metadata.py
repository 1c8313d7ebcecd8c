"""Metadata that this package adds to a Lightning checkpoint: model config, tokenizer and adapter settings."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.config import custom_classes
from lit_gpt_scratch.model.lora import LoRA
from lit_gpt_scratch.model.output_heads import POOLINGS, ClassificationHead, OutputHead, ScalarHead, TokenHead
from lit_gpt_scratch.schema import UnknownFieldError, validate, validate_fields
from lit_gpt_scratch.text.published_settings import PublishedSettings
from lit_gpt_scratch.text.tokenizer import Tokenizer
from lit_gpt_scratch.text.windows import MAX_WINDOWS, Windows
from lit_gpt_scratch.trust import Trusted, require_trusted

METADATA_KEY: Final = "lit_gpt_scratch"
TRAINING_SETTINGS: Final = ("dropout", "attention_backend", "initialisation", "load_balance_loss", "router_z_loss")
"""Fields of ``GPTConfig`` that do not change the weights' names and shapes, or the function of a trained model."""


@dataclass(frozen=True)
class MergeSource:
    """One of the checkpoints whose weights were averaged.

    Attributes:
        sha256: SHA-256 digest of its weights, with merged adapters, converted to float32.
        weight: Its weight in the average; the weights of all checkpoints sum to 1.
    """

    sha256: str
    weight: float


@dataclass(frozen=True)
class CheckpointMetadata:
    """Model config and tokenizer as plain data, so that the weights can be used without the run's other files.

    Attributes:
        gpt: Fields of the ``GPTConfig``.
        vocab_size: Number of token ids.
        block_size: Context length in tokens.
        tokenizer: The ``tokenizer.json`` as a string, which is empty in an adapter file.
        start_of_text: Id of the token that precedes every document, or None if it is the end-of-text token.
        lora: Fields of the ``LoRA`` settings, or None if the state dict contains no adapters.
        base: SHA-256 digest of the base model weights that the adapters were trained on, without the head if
            ``new_head`` is True, or None if there is no base model.
        new_head: Whether the head was trained together with the adapters.
        classes: Class names of a classification head, or None for other heads.
        pooling: Pooling method of a classifier, a key of ``model.output_heads.POOLINGS``, or None for other heads.
        rewards: Whether the head predicts the reward of a conversation.
        window_size: Maximum number of tokens per window of a classifier, or None if it is ``block_size``.
        max_windows: Maximum number of windows into which a classifier splits a text.
        published: Fields of the ``PublishedSettings`` if this model was imported from a published model or fine-tuned
            from an imported model; otherwise None.
        merged_from: The checkpoints of which these weights are the average, or None if they are not an average.
    """

    gpt: dict[str, Any]
    vocab_size: int
    block_size: int
    tokenizer: str
    start_of_text: int | None = None
    lora: dict[str, Any] | None = None
    base: str | None = None
    new_head: bool = False
    classes: list[str] | None = None
    pooling: str | None = None
    rewards: bool = False
    window_size: int | None = None
    max_windows: int = 1
    published: dict[str, Any] | None = None
    merged_from: list[MergeSource] | None = None

    @property
    def windows(self) -> Windows:
        """Size and maximum number of the windows into which a classifier splits a text."""
        return Windows(self.block_size if self.window_size is None else self.window_size, self.max_windows)

    @property
    def head(self) -> OutputHead:
        """The network's output head."""
        if self.classes is not None:
            return ClassificationHead(len(self.classes), tuple(self.classes))
        return ScalarHead() if self.rewards else TokenHead()

    @property
    def non_lm_task(self) -> str | None:
        """Verb phrase that describes the model's task, for error messages, or None for a language model."""
        if self.classes is not None:
            return f"classifies documents as {', '.join(self.classes)}"
        return "predicts rewards" if self.rewards else None

    @property
    def fields(self) -> dict[str, Any]:
        """All settings except the tokenizer, keyed by name."""
        sizes = {"vocab_size": self.vocab_size, "block_size": self.block_size, "classes": self.classes}
        adapters = {f"lora.{name}": value for name, value in (self.lora or {}).items()}
        head = {"pooling": self.pooling, "rewards": self.rewards}
        # Fields that were added to GPTConfig after the checkpoint was written have their default values.
        return {**asdict(GPTConfig()), **self.gpt, **adapters, **sizes, **head}

    def build_configs(self, path: Path, trusted: Trusted) -> tuple[GPTConfig, LoRA | None]:
        """Build the model config and, if there are adapters, the LoRA settings; no other code builds them from a file.

        Args:
            path: Path to the file that contains the metadata, used in error messages.
            trusted: Import paths that the file may import; building the network runs the imported code.

        Raises:
            UserError: The file refers to code that is not trusted, or a setting is out of range.
        """
        for field, name in custom_classes(self.gpt).items():
            require_trusted(name, trusted, path, f"model.gpt.{field}")
        try:
            return GPTConfig(**self.gpt), None if self.lora is None else LoRA(**self.lora)
        except UserError as error:
            raise UserError(f"{path} contains an invalid config: {error}") from error

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any]) -> "CheckpointMetadata":
        """Read the metadata of a loaded checkpoint and validate its types, without importing any custom class.

        Raises:
            UserError: The metadata is corrupted, or was written by another program or by a newer version.
        """
        if METADATA_KEY not in checkpoint:
            raise UserError("the checkpoint was not written by lit_gpt_scratch; use a checkpoint written by fit")
        try:
            metadata = validate(checkpoint[METADATA_KEY], cls, "metadata")
            metadata = replace(metadata, gpt=validate_fields(metadata.gpt, GPTConfig, "metadata.gpt"))
            if metadata.lora is not None:
                validate_fields(metadata.lora, LoRA, "metadata.lora")
            if metadata.published is not None:
                validate_fields(metadata.published, PublishedSettings, "metadata.published")
            metadata._require_valid()
        except UnknownFieldError as error:
            raise UserError(
                f"the checkpoint was written by a newer version of lit_gpt_scratch ({error}); update lit_gpt_scratch"
            ) from error
        except ValueError as error:
            raise UserError(f"the checkpoint is corrupted ({error}); use a checkpoint written by fit") from error
        return metadata

    def load_tokenizer(self, path: Path) -> Tokenizer:
        """Load the tokenizer.

        Args:
            path: Path to the checkpoint, used in error messages.

        Raises:
            UserError: The tokenizer is invalid, or has more tokens than the network.
        """
        try:
            published = None if self.published is None else PublishedSettings(**self.published)
            tokenizer = Tokenizer.from_json(self.tokenizer, self.start_of_text, published)
        except UserError as error:
            raise UserError(f"the tokenizer in {path} cannot be used: {error}") from error
        if tokenizer.vocab_size > self.vocab_size:
            raise UserError(
                f"{path} is corrupted: its tokenizer has {tokenizer.vocab_size} tokens, but its vocab_size is "
                f"{self.vocab_size}; use another file"
            )
        return tokenizer

    def _require_valid(self) -> None:
        """Check that all values are within their valid ranges.

        Raises:
            ValueError: A value is out of range.
        """
        for name, size in (("vocab_size", self.vocab_size), ("block_size", self.block_size)):
            if size < 1:
                raise ValueError(f"metadata.{name} is {size}; it must be positive")
        for name, value, most in (
            ("window_size", self.windows.size, self.block_size),
            ("max_windows", self.max_windows, MAX_WINDOWS),
        ):
            if not 0 < value <= most:
                raise ValueError(f"metadata.{name} is {value}; it must be from 1 to {most}")
        if self.start_of_text is not None and not 0 <= self.start_of_text < self.vocab_size:
            raise ValueError(f"metadata.start_of_text is {self.start_of_text}; it must be below {self.vocab_size}")
        if self.classes == []:
            raise ValueError("metadata.classes is empty")
        if self.pooling not in (None, *POOLINGS):
            raise ValueError(f"metadata.pooling must be one of {', '.join(POOLINGS)}")


def require_same_model(
    checkpoint: CheckpointMetadata, network: CheckpointMetadata, may_differ: Collection[str] = ()
) -> None:
    """Check that a checkpoint and a network have the same settings. The tokenizers may differ.

    Args:
        checkpoint: Metadata of the checkpoint.
        network: Metadata of the network that will load the weights.
        may_differ: Names of fields that are not compared.

    Raises:
        UserError: Some fields differ; the message lists all differences.
    """
    there, here = checkpoint.fields, network.fields
    different = [
        f"{name} is {there.get(name)} in the checkpoint, but {here.get(name)} in this run"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name) and name not in may_differ
    ]
    if different:
        raise UserError(
            f"the checkpoint contains a different model: {'; '.join(different)}; use the settings of the checkpoint"
        )


def require_same_tokenizer(metadata: CheckpointMetadata, tokenizer_json: str) -> None:
    """Check that a checkpoint was trained with the given tokenizer, because token ids depend on the tokenizer.

    Raises:
        UserError: The tokenizers differ.
    """
    if metadata.tokenizer != tokenizer_json:
        raise UserError(
            "the checkpoint was trained with a different tokenizer: the training data or --data.tokenizer has changed; "
            "set --data.tokenizer to the tokenizer.json in the run folder of the checkpoint"
        )
