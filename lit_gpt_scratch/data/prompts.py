"""Prompts only: the data of on-policy training, in which the policy generates the replies itself."""

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
from lit_gpt_scratch.text.verifiable_rewards import VERIFIABLE_PREFERENCES, TextReward, load_text_reward


@dataclass(frozen=True)
class Prompt:
    """Messages that end with the user's."""

    prompt: Sequence[Message]

    @property
    def texts(self) -> Sequence[str]:
        """The text of every message."""
        return [message.content for message in self.prompt]


class Prompts(PromptedDataModule[Prompt]):
    """Rows with a ``prompt``, a text or messages, or with an ``instruction``; other columns are ignored.

    Batches carry indices (``PromptIndexBatch``); the policy looks the prompts up and generates the replies. A prompt
    has at most ``block_size - reply_tokens`` tokens.

    Args:
        **kwargs: See ``PromptedDataModule`` and ``RecordDataModule``; ``too_long`` cannot be ``cut``.

    Raises:
        UserError: Also, ``reply_tokens`` leaves no token for a prompt.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.too_long == "cut":
            raise UserError("data.too_long is cut, but a reply answers the end of its prompt; set it to refuse or drop")
        if self.max_record_tokens < 1:
            raise UserError(
                f"data.reply_tokens is {self.reply_tokens}, which leaves nothing of a data.block_size of "
                f"{self.block_size} to prompts"
            )

    @property
    def max_record_tokens(self) -> int:
        """The most tokens of a prompt."""
        return self.block_size - self.reply_tokens

    def default_rows(self) -> Iterator[TableRow]:
        """Small generated tasks about words."""
        return synthetic_data.prompts()

    def parse_row(self, fields: dict[str, Any]) -> Prompt:
        """The messages of a row."""
        return Prompt(chat_template.parse_prompt(fields))

    def encode_record(self, record: Prompt) -> tuple[EncodedSequence, ...]:
        """The template up to where the reply begins, without labels."""
        ids = np.array(self.template.render_prompt(record.prompt))
        return (EncodedSequence(ids, np.full(len(ids), IGNORE_INDEX)),)

    def build_dataset(self, examples: Sequence[TokenizedExample]) -> PromptIndexDataset:
        """The indices of the prompts."""
        return PromptIndexDataset(len(examples))

    @cached_property
    def source_of_prompts(self) -> PromptSource:
        """The prompts, as a policy accesses them."""
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
        """Adds the prompts."""
        return replace(super().info, prompts=self.source_of_prompts)

    def lookup_prompts(self, split: RecordSplit, indices: Sequence[int]) -> tuple[list[list[int]], list[str]]:
        """Some prompts of a split: their token ids, and the texts of their messages, a line each."""
        examples = [self.examples[split][index] for index in indices]
        ids = [example.sequences[0].ids.tolist() for example in examples]
        return ids, ["\n".join(self._records_by_origin[example.where].texts) for example in examples]

    @cached_property
    def _records_by_origin(self) -> dict[str, Prompt]:
        return dict(self.records)

    def shuffled_prompts(self, positions: Sequence[int]) -> list[int]:
        """The training prompts at some positions in the run: every prompt comes once, then every prompt again."""
        return cast("list[int]", self._prompt_order.rows(0, np.asarray(positions, dtype=np.int64)).tolist())

    @property
    def _prompt_order(self) -> ShuffledOrder:
        return ShuffledOrder(self.train_dataset.sizes, self.order_seed)

    @property
    def train_sampler(self) -> RolloutSampler:
        """The rollouts of this process, phase by phase, starting where the trainer does.

        Raises:
            UserError: The model does no on-policy training.
        """
        phase = self.source_of_prompts.phase
        if phase is None:
            raise UserError("Prompts have no replies to train on; a policy generates them: --model PPO or GRPO")
        return RolloutSampler(self._prompt_order, phase, self.order_seed, **self._sampler_arguments())

    def find_text_reward(self, name: str | None) -> TextReward:
        """The reward function of a name; by default the verifiable preference by which replies are checked.

        If the name is a verifiable preference, replies are also checked by it, unless ``checkable`` names another one.

        Raises:
            UserError: There is no such reward function, or no default.
        """
        self.rewarding = name if name in VERIFIABLE_PREFERENCES else None
        if (name := name or self.checkable) is None:
            raise UserError("nothing says how good a reply is; name it: --model.reward, or --data.checkable")
        return load_text_reward(name)
