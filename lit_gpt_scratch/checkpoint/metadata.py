"""What a checkpoint holds beside Lightning's own state."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Final

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.output_heads import ClassificationHead, OutputHead, ScalarHead, TokenHead

METADATA_KEY: Final = "lit_gpt_scratch"


@dataclass(frozen=True)
class CheckpointMetadata:
    """Shape and tokenizer, as plain data: enough to use the weights anywhere.

    Attributes:
        gpt: The fields of a ``GPTConfig``.
        vocab_size: Number of token ids.
        block_size: The longest window.
        tokenizer: The text of a ``tokenizer.json``.
        start_of_text: The token before every document, where it is not the end of text.
        lora: The fields of a ``LoRA``, if there are adapters beside the weights.
        base: A hash of the weights that they are for, without the head if that is new.
        new_head: Whether the head was trained beside the adapters.
        classes: The names of the classes that the head tells apart; None for a head that reads tokens.
        pooling: Where a classifier reads a text, a name in ``model.heads.POOLINGS``.
        rewards: Whether the head reads the reward of a conversation.
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
        """What the network's head reads."""
        if self.classes is not None:
            return ClassificationHead(len(self.classes), tuple(self.classes))
        return ScalarHead() if self.rewards else TokenHead()

    @property
    def non_lm_task(self) -> str | None:
        """What it does that is no language model, in words."""
        if self.classes is not None:
            return f"tells apart {', '.join(self.classes)}"
        return "rewards replies" if self.rewards else None

    @property
    def fields(self) -> dict[str, Any]:
        """All but the tokenizer, by the names of the flags."""
        apart = {"vocab_size": self.vocab_size, "block_size": self.block_size, "classes": self.classes}
        adapters = {f"lora.{name}": value for name, value in (self.lora or {}).items()}
        # A checkpoint from before a switch existed has what is now the switch's default.
        read = {"pooling": self.pooling, "rewards": self.rewards}
        return {**asdict(GPTConfig()), **self.gpt, **adapters, **apart, **read}

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any]) -> "CheckpointMetadata":
        """The part of a loaded checkpoint that this package wrote.

        Raises:
            UserError: Something else wrote the checkpoint.
        """
        try:
            return cls(**checkpoint[METADATA_KEY])
        except (KeyError, TypeError) as error:
            raise UserError("the checkpoint was not written by lit_gpt_scratch") from error


def require_same_model(there: CheckpointMetadata, here: CheckpointMetadata, free: Collection[str] = ()) -> None:
    """Compare all but the tokenizer, before weights are loaded.

    Args:
        there: Of the checkpoint.
        here: Of the network that its weights are for.
        free: Fields in which the two may differ.

    Raises:
        UserError: They differ; every field that does is named.
    """
    different = [
        f"{name} {there.fields.get(name)} there, {here.fields.get(name)} here"
        for name in sorted(there.fields.keys() | here.fields.keys())
        if there.fields.get(name) != here.fields.get(name) and name not in free
    ]
    if different:
        raise UserError(f"the checkpoint holds another model: {'; '.join(different)}")


def require_same_tokenizer(contents: CheckpointMetadata, tokenizer_json: str) -> None:
    """A model of one vocabulary makes gibberish of another's ids.

    Raises:
        UserError: The tokenizers differ.
    """
    if contents.tokenizer != tokenizer_json:
        raise UserError(
            "the checkpoint was trained with another tokenizer: its text has changed, or data.tokenizer names "
            "another one; give data.tokenizer the tokenizer.json of that run"
        )
