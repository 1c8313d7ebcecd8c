"""Records with a prompt to reply to: what all data of alignment has in common."""

from abc import ABC
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, Final, Protocol, TypeVar

from lit_gpt_scratch.data.base_datamodule import reject_null, require_positive_ints
from lit_gpt_scratch.data.record_datamodule import RecordDataModule
from lit_gpt_scratch.data.record_split import RecordSplit
from lit_gpt_scratch.data.tokenized_examples import TextRecord
from lit_gpt_scratch.text.chat_template import ROLE_TOKENS, ChatTemplate, Message
from lit_gpt_scratch.text.verifiable_rewards import get_verifiable_preference

SAMPLES: Final = 3
"""Prompts that a model's replies are shown of."""
OF_GENERATED: Final = "full_stop"
"""What is preferred where the records are generated, and nothing else is asked for."""


class PromptedRecord(TextRecord, Protocol):
    """A record whose prompt is written replies to."""

    @property
    def prompt(self) -> Sequence[Message]:
        """Messages, the last of them the user's."""


P = TypeVar("P", bound=PromptedRecord)


class PromptedDataModule(RecordDataModule[P], ABC):
    """Prompts in the one template (``text.chat``), and by what replies to them are judged.

    Args:
        checkable: A preference in ``text.verifiable_rewards``: replies to prompts that are
            held out are judged by it. By default it is the one that rewards a policy, if one does; else ``full_stop``
            of records that are generated, and none of others.
        reply_tokens: The most tokens of a reply that is written, its end among them.
        **others: See ``RecordDataModule``.

    Raises:
        UserError: There is no such preference, or a number is out of range.
    """

    shares = (0.2, 0.2)
    special_tokens = ROLE_TOKENS

    def __init__(self, checkable: str | None = None, reply_tokens: int = 64, **others: Any) -> None:
        super().__init__(**others)
        reject_null({"reply_tokens": reply_tokens})
        require_positive_ints({"reply_tokens": reply_tokens})
        self.reply_tokens = reply_tokens
        if checkable is not None:
            get_verifiable_preference(checkable)
        self.checkable_asked = checkable
        self.rewarding: str | None = None
        """The name of the checkable preference that rewards the policy which learns from this data, if one does."""

    @property
    def checkable(self) -> str | None:
        """The name of the preference that replies are judged by."""
        return self.checkable_asked or self.rewarding or (OF_GENERATED if self.source is None else None)

    @property
    def reply_check(self) -> Callable[[str], bool] | None:
        """Whether a reply is as it should be; None where only a person could say."""
        return None if self.checkable is None else get_verifiable_preference(self.checkable).satisfied

    @cached_property
    def template(self) -> ChatTemplate:
        """In the tokens of this data."""
        return ChatTemplate(self.tokenizer)

    @property
    def uneven(self) -> bool:
        """Every record of the training counts once."""
        return False

    def prompt_ids(self, side: RecordSplit) -> list[list[int]]:
        """What replies are written after, of the records of a side; those that leave no room for one are left out."""
        places = self.split_indices.get(side, ())
        prompts = (self.template.render_prompt(self.records[place][1].prompt) for place in places)
        return [prompt for prompt in prompts if len(prompt) < self.block_size]

    @property
    def prompts(self) -> list[list[int]]:
        """The first that are validated on."""
        return list(islice(self.prompt_ids("validation"), SAMPLES))
