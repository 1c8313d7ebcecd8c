"""The base of data modules whose records have a prompt to reply to: preferences, and prompts for on-policy training."""

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

SAMPLE_PROMPTS: Final = 3
"""Prompts whose sampled replies are logged."""
DEFAULT_CHECKABLE: Final = "full_stop"
"""The verifiable preference of generated records."""


class PromptedRecord(TextRecord, Protocol):
    """A record with a prompt."""

    @property
    def prompt(self) -> Sequence[Message]:
        """Messages that end with the user's."""


P = TypeVar("P", bound=PromptedRecord)


class PromptedDataModule(RecordDataModule[P], ABC):
    """Prompts in the chat template (``text.chat_template``), and the check of generated replies.

    Args:
        checkable: A verifiable preference, by its name in ``text.verifiable_rewards``, by which replies to held-out
            prompts are checked. By default it is the one that rewards the policy, if one does; otherwise ``full_stop``
            for generated records, and none for others.
        reply_tokens: The most tokens of a generated reply, its end of text included.
        **kwargs: See ``RecordDataModule``.

    Raises:
        UserError: There is no such preference, or a number is out of range.
    """

    shares = (0.2, 0.2)
    special_tokens = ROLE_TOKENS

    def __init__(self, checkable: str | None = None, reply_tokens: int = 64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        reject_null({"reply_tokens": reply_tokens})
        require_positive_ints({"reply_tokens": reply_tokens})
        self.reply_tokens = reply_tokens
        if checkable is not None:
            get_verifiable_preference(checkable)
        self.checkable_given = checkable
        self.rewarding: str | None = None
        """The verifiable preference that rewards the policy trained on this data, if one does."""

    @property
    def checkable(self) -> str | None:
        """The name of the verifiable preference by which replies are checked."""
        return self.checkable_given or self.rewarding or (DEFAULT_CHECKABLE if self.source is None else None)

    @property
    def reply_check(self) -> Callable[[str], bool] | None:
        """Whether a reply meets the verifiable preference; None if there is none."""
        return None if self.checkable is None else get_verifiable_preference(self.checkable).satisfied

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template in this data's tokens."""
        return ChatTemplate(self.tokenizer)

    def prompt_ids(self, split: RecordSplit) -> list[list[int]]:
        """The prompts of a split as token ids, without those that leave no token for a reply."""
        indices = self.split_indices.get(split, ())
        prompts = (self.template.render_prompt(self.records[index][1].prompt) for index in indices)
        return [prompt for prompt in prompts if len(prompt) < self.block_size]

    @property
    def prompts(self) -> list[list[int]]:
        """The first validation prompts."""
        return list(islice(self.prompt_ids("validation"), SAMPLE_PROMPTS))
