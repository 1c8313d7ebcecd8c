"""What a checkpoint holds beside Lightning's own state."""

from dataclasses import asdict, dataclass
from typing import Any, Final

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPTConfig

KEY: Final = "lit_gpt_scratch"


@dataclass(frozen=True)
class Contents:
    """Shape and tokenizer, as plain data: enough to use the weights anywhere.

    Attributes:
        gpt: The fields of a ``GPTConfig``.
        vocab_size: Number of token ids.
        block_size: The longest window.
        tokenizer: The text of a ``tokenizer.json``.
        start_of_text: The token before every document, where it is not the end of text.
    """

    gpt: dict[str, Any]
    vocab_size: int
    block_size: int
    tokenizer: str
    start_of_text: int | None = None

    @classmethod
    def of(cls, checkpoint: dict[str, Any]) -> "Contents":
        """The part of a loaded checkpoint that this package wrote.

        Raises:
            UserError: Something else wrote the checkpoint.
        """
        try:
            return cls(**checkpoint[KEY])
        except (KeyError, TypeError) as error:
            raise UserError("the checkpoint was not written by lit_gpt_scratch") from error


def refuse_other_model(contents: Contents, gpt: dict[str, Any], vocab_size: int, block_size: int) -> None:
    """Compare shapes before weights are loaded.

    Raises:
        UserError: They differ; every field that does is named.
    """
    # A checkpoint from before a switch existed has what is now the switch's default.
    default = asdict(GPTConfig())
    here = {**default, **gpt, "vocab_size": vocab_size, "block_size": block_size}
    there = {**default, **contents.gpt, "vocab_size": contents.vocab_size, "block_size": contents.block_size}
    different = [
        f"{name} {there.get(name)} there, {here.get(name)} here"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]
    if different:
        raise UserError(f"the checkpoint holds another model: {'; '.join(different)}")


def refuse_other_tokenizer(contents: Contents, tokenizer_json: str) -> None:
    """A model of one vocabulary makes gibberish of another's ids.

    Raises:
        UserError: The tokenizers differ.
    """
    if contents.tokenizer != tokenizer_json:
        raise UserError(
            "the checkpoint was trained with another tokenizer: its text has changed, or data.tokenizer names "
            "another one; give data.tokenizer the tokenizer.json of that run"
        )
