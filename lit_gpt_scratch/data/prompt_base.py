"""Base class for ``Preferences`` and ``Prompts``, the data modules whose records contain a prompt."""

from abc import ABC
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, Final, Protocol, TypeVar

from lit_gpt_scratch.data.base_datamodule import reject_null, require_positive_ints
from lit_gpt_scratch.data.record_datamodule import RecordDataModule
from lit_gpt_scratch.data.record_split import RecordSplit
from lit_gpt_scratch.data.tokenized_examples import TextRecord
from lit_gpt_scratch.text.chat_template import ROLE_TOKENS, ChatTemplate, Message, load_chat_template
from lit_gpt_scratch.text.verifiable_rewards import get_verifiable_reward

SAMPLE_PROMPTS: Final = 3
"""Number of prompts for which sample replies are logged."""
DEFAULT_CHECKABLE: Final = "full_stop"
"""Verifiable reward used by default for synthetic records: the reply must end with exactly one period."""


class PromptedRecord(TextRecord, Protocol):
    """A record with a prompt."""

    @property
    def prompt(self) -> Sequence[Message]:
        """Messages of the prompt, ending with a user message."""


P = TypeVar("P", bound=PromptedRecord)


class PromptedDataModule(RecordDataModule[P], ABC):
    """Base class for data modules that render prompts with a chat template and check generated replies.

    Args:
        checkable: Name of the verifiable reward (see ``text.verifiable_rewards``) that evaluates replies to
            held-out prompts. Defaults to the verifiable reward used in training, if any; otherwise to ``full_stop`` for
            synthetic records. For other data, replies are not evaluated by default.
        reply_tokens: Maximum number of tokens per generated reply, including the end-of-text token.
        **kwargs: See ``RecordDataModule``.

    Raises:
        UserError: No verifiable reward has the given name, or another argument is invalid.
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
            get_verifiable_reward(checkable)
        self.checkable_given = checkable
        self.rewarding: str | None = None
        """Name of the verifiable reward used to train the policy, or None if training uses no verifiable reward."""

    @property
    def checkable(self) -> str | None:
        """Name of the verifiable reward used to check replies, or None if replies are not checked."""
        return self.checkable_given or self.rewarding or (DEFAULT_CHECKABLE if self.source is None else None)

    @property
    def reply_check(self) -> Callable[[str], bool] | None:
        """Function that returns whether a reply satisfies ``checkable``, or None if replies are not checked."""
        return None if self.checkable is None else get_verifiable_reward(self.checkable).satisfied

    @cached_property
    def template(self) -> ChatTemplate:
        """Chat template of the model to fine-tune, or this package's template if the model has none."""
        return load_chat_template(self.tokenizer)

    def prompt_ids(self, split: RecordSplit) -> list[list[int]]:
        """Return the token ids of each prompt in a split, omitting prompts of ``block_size`` tokens or more."""
        indices = self.split_indices.get(split, ())
        prompts = (self.template.render_prompt(self.records[index][1].prompt) for index in indices)
        return [prompt for prompt in prompts if len(prompt) < self.block_size]

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of the validation prompts for which sample replies are logged."""
        return list(islice(self.prompt_ids("validation"), SAMPLE_PROMPTS))
