"""Metadata that this package adds to a Lightning checkpoint: model config, tokenizer and adapter settings."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Final

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.output_heads import ClassificationHead, OutputHead, ScalarHead, TokenHead

METADATA_KEY: Final = "lit_gpt_scratch"


@dataclass(frozen=True)
class CheckpointMetadata:
    """Model config and tokenizer as plain data, so that the weights can be used without the run's other files.

    Attributes:
        gpt: The fields of a ``GPTConfig``.
        vocab_size: Number of token ids.
        block_size: Context length in tokens.
        tokenizer: The text of a ``tokenizer.json``.
        start_of_text: Id of the token that precedes every document; None if it is the end-of-text token.
        lora: The fields of a ``LoRA``; None if the state dict contains no adapters.
        base: Hash of the base model weights that the adapters were trained on; excludes the head if ``new_head``.
        new_head: Whether the head was trained together with the adapters.
        classes: Class names of a classification head; None for other heads.
        pooling: Pooling of a classifier, a name in ``model.output_heads.POOLINGS``.
        rewards: Whether the head predicts the reward of a conversation.
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

    @property
    def head(self) -> OutputHead:
        """The network's output head."""
        if self.classes is not None:
            return ClassificationHead(len(self.classes), tuple(self.classes))
        return ScalarHead() if self.rewards else TokenHead()

    @property
    def non_lm_task(self) -> str | None:
        """Verb phrase that describes the model's task, for error messages; None for a language model."""
        if self.classes is not None:
            return f"classifies texts as {', '.join(self.classes)}"
        return "predicts rewards" if self.rewards else None

    @property
    def fields(self) -> dict[str, Any]:
        """All settings except the tokenizer, keyed by flag name."""
        sizes = {"vocab_size": self.vocab_size, "block_size": self.block_size, "classes": self.classes}
        adapters = {f"lora.{name}": value for name, value in (self.lora or {}).items()}
        head = {"pooling": self.pooling, "rewards": self.rewards}
        # Fields of GPTConfig that are newer than the checkpoint get their defaults.
        return {**asdict(GPTConfig()), **self.gpt, **adapters, **sizes, **head}

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any]) -> "CheckpointMetadata":
        """Read the metadata of a loaded checkpoint.

        Raises:
            UserError: The checkpoint was written by another program.
        """
        try:
            return cls(**checkpoint[METADATA_KEY])
        except (KeyError, TypeError) as error:
            raise UserError("the checkpoint was not written by lit_gpt_scratch") from error


def require_same_model(
    checkpoint: CheckpointMetadata, network: CheckpointMetadata, may_differ: Collection[str] = ()
) -> None:
    """Check that a checkpoint and a network have the same settings, before weights are loaded; tokenizers may differ.

    Args:
        checkpoint: Metadata of the checkpoint.
        network: Metadata of the network that will load the weights.
        may_differ: Names of fields that are not compared.

    Raises:
        UserError: Some fields differ; the message lists all of them.
    """
    there, here = checkpoint.fields, network.fields
    different = [
        f"{name} is {there.get(name)} in the checkpoint, {here.get(name)} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name) and name not in may_differ
    ]
    if different:
        raise UserError(f"the checkpoint contains another model: {'; '.join(different)}")


def require_same_tokenizer(metadata: CheckpointMetadata, tokenizer_json: str) -> None:
    """Check that a checkpoint was trained with this tokenizer; with another one, token ids would have other meanings.

    Raises:
        UserError: The tokenizers differ.
    """
    if metadata.tokenizer != tokenizer_json:
        raise UserError(
            "the checkpoint was trained with another tokenizer: the training text has changed, or --data.tokenizer "
            "names another one; set --data.tokenizer to the tokenizer.json of that run"
        )
