"""Base class for data modules whose records contain a prompt: preferences, and prompts for on-policy training."""

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
"""Number of prompts whose sampled replies are logged."""
DEFAULT_CHECKABLE: Final = "full_stop"
"""Default verifiable preference for synthetic records."""


class PromptedRecord(TextRecord, Protocol):
    """A record with a prompt."""

    @property
    def prompt(self) -> Sequence[Message]:
        """Messages of the prompt, ending with a user message."""


P = TypeVar("P", bound=PromptedRecord)


class PromptedDataModule(RecordDataModule[P], ABC):
    """Base class for data with prompts in the chat template (``text.chat_template``) and checks of generated replies.

    Args:
        checkable: Name of the verifiable preference (see ``text.verifiable_rewards``) that replies to held-out prompts
            are checked against. By default the one that the policy is trained on, if any;
            otherwise ``full_stop`` for synthetic records, and no check for other data.
        reply_tokens: Maximum tokens per generated reply, including end-of-text.
        **kwargs: See ``RecordDataModule``.

    Raises:
        UserError: The verifiable preference does not exist, or a number is out of range.
    """

    shares = (0.2, 0.2)
    special_tokens = ROLE_TOKENS
    next_command = "generate {} --chat"

    def __init__(self, checkable: str | None = None, reply_tokens: int = 64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        reject_null({"reply_tokens": reply_tokens})
        require_positive_ints({"reply_tokens": reply_tokens})
        self.reply_tokens = reply_tokens
        if checkable is not None:
            get_verifiable_preference(checkable)
        self.checkable_given = checkable
        self.rewarding: str | None = None
        """Name of the verifiable preference used as the reward; None if the reward is something else."""

    @property
    def checkable(self) -> str | None:
        """Name of the verifiable preference that replies are checked against; None if they are not checked."""
        return self.checkable_given or self.rewarding or (DEFAULT_CHECKABLE if self.source is None else None)

    @property
    def reply_check(self) -> Callable[[str], bool] | None:
        """Function that tests whether a reply satisfies the verifiable preference; None if replies are not checked."""
        return None if self.checkable is None else get_verifiable_preference(self.checkable).satisfied

    @cached_property
    def template(self) -> ChatTemplate:
        """Chat template for this tokenizer."""
        return ChatTemplate(self.tokenizer)

    def prompt_ids(self, split: RecordSplit) -> list[list[int]]:
        """Return the token ids of a split's prompts, omitting prompts that leave no token for a reply."""
        indices = self.split_indices.get(split, ())
        prompts = (self.template.render_prompt(self.records[index][1].prompt) for index in indices)
        return [prompt for prompt in prompts if len(prompt) < self.block_size]

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of the first validation prompts."""
        return list(islice(self.prompt_ids("validation"), SAMPLE_PROMPTS))
