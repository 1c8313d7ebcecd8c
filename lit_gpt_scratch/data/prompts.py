"""Data module for on-policy training. It provides only prompts; the policy generates the replies."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np

from lit_gpt_scratch.batch_types import IGNORE_INDEX, DataInfo, PromptSource
from lit_gpt_scratch.data.prompt_base import PromptedDataModule
from lit_gpt_scratch.data.record_split import RecordSplit
from lit_gpt_scratch.data.rollout_sampler import PromptIndexDataset, RolloutSampler
from lit_gpt_scratch.data.sampler import ShuffledOrder
from lit_gpt_scratch.data.tokenized_examples import EncodedSequence, TokenizedExample
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import chat_template, synthetic_data
from lit_gpt_scratch.text.chat_template import Message
from lit_gpt_scratch.text.document import TableRow
from lit_gpt_scratch.text.verifiable_rewards import VERIFIABLE_REWARDS, TextReward, load_text_reward


@dataclass(frozen=True)
class Prompt:
    """A list of messages that ends with a user message."""

    prompt: Sequence[Message]

    @property
    def texts(self) -> Sequence[str]:
        """Text of each message."""
        return [message.content for message in self.prompt]


class Prompts(PromptedDataModule[Prompt]):
    """Data module for prompts without replies, used for on-policy training.

    Prompts are read from the column ``prompt``, which contains a string or a list of messages, or from ``instruction``
    and ``input``; other columns are ignored. Batches contain indices (``PromptIndexBatch``); the policy looks up the
    prompts and generates the replies. A prompt has at most ``block_size - reply_tokens`` tokens.

    Args:
        **kwargs: See ``PromptedDataModule`` and ``RecordDataModule``; ``too_long`` must not be ``cut``.

    Raises:
        UserError: An argument is invalid, or ``reply_tokens`` leaves no tokens for a prompt.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.too_long == "cut":
            raise UserError(
                "data.too_long is 'cut', which would remove the end of a prompt; set it to 'refuse' or 'drop'"
            )
        if self.max_record_tokens < 1:
            raise UserError(
                f"data.reply_tokens is {self.reply_tokens}, which leaves no tokens for prompts if data.block_size "
                f"is {self.block_size}; lower data.reply_tokens, or raise data.block_size"
            )

    @property
    def max_record_tokens(self) -> int:
        """Maximum tokens per prompt."""
        return self.block_size - self.reply_tokens

    def default_rows(self) -> Iterator[TableRow]:
        """Generate synthetic prompts that request simple tasks about words."""
        return synthetic_data.prompts()

    def parse_row(self, fields: dict[str, Any]) -> Prompt:
        """Parse a row into the messages of its prompt."""
        return Prompt(chat_template.parse_prompt(fields))

    def encode_record(self, record: Prompt) -> tuple[EncodedSequence, ...]:
        """Render the prompt with the chat template, up to the start of the reply, and tokenize it without labels."""
        ids = np.array(self.template.render_prompt(record.prompt))
        return (EncodedSequence(ids, np.full(len(ids), IGNORE_INDEX)),)

    def build_dataset(self, examples: Sequence[TokenizedExample]) -> PromptIndexDataset:
        """Build a dataset of prompt indices."""
        return PromptIndexDataset(len(examples))

    @cached_property
    def source_of_prompts(self) -> PromptSource:
        """Interface through which a policy accesses the prompts and rewards."""
        return PromptSource(
            counts={split: len(examples) for split, examples in self.examples.items()},
            reply_tokens=self.reply_tokens,
            lookup=self.lookup_prompts,
            shuffled=self.shuffled_prompts,
            decode=self.tokenizer.decode,
            text_reward=self.find_text_reward,
            reply_check=lambda: self.reply_check,
        )

    @property
    def info(self) -> DataInfo:
        """Description of the data, including the source of prompts."""
        return replace(super().info, prompts=self.source_of_prompts)

    def lookup_prompts(self, split: RecordSplit, indices: Sequence[int]) -> tuple[list[list[int]], list[str]]:
        """Return the token ids and the text of the prompts with the given indices in a split.

        The text of a prompt consists of its messages, separated by newlines.
        """
        examples = [self.examples[split][index] for index in indices]
        ids = [example.sequences[0].ids.tolist() for example in examples]
        return ids, ["\n".join(self._records_by_origin[example.where].texts) for example in examples]

    @cached_property
    def _records_by_origin(self) -> dict[str, Prompt]:
        return dict(self.records)

    def shuffled_prompts(self, positions: Sequence[int]) -> list[int]:
        """Return the indices of the training prompts at the given positions in the shuffled order.

        Positions are counted from the start of the run; each pass over the data visits every prompt once.
        """
        return cast("list[int]", self._prompt_order.rows(0, np.asarray(positions, dtype=np.int64)).tolist())

    @property
    def _prompt_order(self) -> ShuffledOrder:
        return ShuffledOrder(self.train_dataset.sizes, self.order_seed)

    @property
    def train_sampler(self) -> RolloutSampler:
        """Sampler that yields this process's rollouts, from the trainer's current epoch and batch onward.

        Raises:
            UserError: The model does not generate replies, so there is nothing to train on.
        """
        phase = self.source_of_prompts.phase
        if phase is None:
            raise UserError(
                "the data module Prompts has no replies to train on; use --model PPO or GRPO, which generate replies"
            )
        return RolloutSampler(self._prompt_order, phase, self.order_seed, **self._sampler_arguments())

    def find_text_reward(self, name: str | None) -> TextReward:
        """Return the reward function with the given name.

        If ``name`` is None, the data module's verifiable reward (``checkable``) is used. If ``name`` refers to a
        verifiable reward, replies are also checked with it (see ``reply_check``), unless the argument ``checkable``
        already specifies one.

        Raises:
            UserError: No reward function has this name, or ``name`` is None and the data module has no verifiable
                reward.
        """
        self.rewarding = name if name in VERIFIABLE_REWARDS else None
        if (name := name or self.checkable) is None:
            raise UserError("no reward function is specified; set --model.reward or --data.checkable")
        return load_text_reward(name)
