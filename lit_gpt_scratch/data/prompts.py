"""Prompts alone: the data of a policy that writes the replies itself."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np

from lit_gpt_scratch.batch_types import IGNORE_INDEX, RolloutPhase
from lit_gpt_scratch.data.prompt_base import PromptedDataModule
from lit_gpt_scratch.data.record_split import RecordSplit
from lit_gpt_scratch.data.rollout_sampler import PromptIndexDataset, RolloutSampler, rank_rows
from lit_gpt_scratch.data.sampler import ShuffledOrder
from lit_gpt_scratch.data.tokenized_examples import EncodedSequence, TokenizedExample
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import chat_template, synthetic_data, verifiable_rewards
from lit_gpt_scratch.text.chat_template import Message
from lit_gpt_scratch.text.document import TableRow
from lit_gpt_scratch.text.verifiable_rewards import TextReward, load_text_reward


@dataclass(frozen=True)
class Prompt:
    """Messages, the last of them the user's."""

    prompt: Sequence[Message]

    @property
    def texts(self) -> Sequence[str]:
        """Of every message."""
        return [message.content for message in self.prompt]


class Prompts(PromptedDataModule[Prompt]):
    """Rows of a ``prompt``, a text or messages, or of an ``instruction``; what else they have is left unread.

    A row of a batch is a number: the task asks for its prompt and writes the reply. A prompt may have as many tokens as
    leave ``reply_tokens`` of ``block_size``.

    Args:
        **others: See ``PromptedDataModule`` and ``RecordDataModule``; ``too_long`` cannot be ``cut``.

    Raises:
        UserError: Also, no token is left for a prompt.
    """

    def __init__(self, **others: Any) -> None:
        super().__init__(**others)
        if self.too_long == "cut":
            raise UserError("data.too_long is cut, but a reply answers the end of its prompt; refuse or drop")
        if self.max_record_tokens < 1:
            raise UserError(
                f"data.reply_tokens is {self.reply_tokens}, which leaves nothing of a data.block_size of "
                f"{self.block_size} to prompts"
            )

    @property
    def max_record_tokens(self) -> int:
        """The most tokens of a prompt."""
        return self.block_size - self.reply_tokens

    @property
    def uneven(self) -> bool:
        """Replies are as long as they are."""
        return True

    def default_rows(self) -> Iterator[TableRow]:
        """Small tasks about words."""
        return synthetic_data.prompts()

    def parse_row(self, fields: dict[str, Any]) -> Prompt:
        """Its messages."""
        return Prompt(chat_template.parse_prompt(fields))

    def encode_record(self, record: Prompt) -> tuple[EncodedSequence, ...]:
        """Up to where the reply begins; there is nothing to be learned of it."""
        ids = np.array(self.template.render_prompt(record.prompt))
        return (EncodedSequence(ids, np.full(len(ids), IGNORE_INDEX)),)

    def build_dataset(self, examples: Sequence[TokenizedExample]) -> PromptIndexDataset:
        """Their numbers."""
        return PromptIndexDataset(len(examples))

    def prompt_count(self, side: RecordSplit) -> int:
        """How many a side has."""
        return len(self.examples[side])

    def asked(self, side: RecordSplit, numbers: Sequence[int]) -> tuple[list[list[int]], list[str]]:
        """Prompts of a side, by their numbers: ids, and what the messages say, each on a line of its own."""
        examples = [self.examples[side][number] for number in numbers]
        ids = [example.sequences[0].ids.tolist() for example in examples]
        return ids, ["\n".join(self._by_place[example.where].texts) for example in examples]

    @cached_property
    def _by_place(self) -> dict[str, Prompt]:
        return dict(self.records)

    def drawn(self, numbers: Sequence[int]) -> list[int]:
        """Which training prompts come as the run's first, second and so on: each once, then each again."""
        return cast("list[int]", self._shuffle.windows(0, np.asarray(numbers, dtype=np.int64)).tolist())

    @property
    def _shuffle(self) -> ShuffledOrder:
        return ShuffledOrder(self.train_dataset.sizes, self._seed)

    @property
    def _seed(self) -> int:
        return self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))

    @property
    def order(self) -> RolloutSampler:
        """The rows of this process, in phases, from where the trainer stands.

        Raises:
            UserError: The task is no policy that learns in phases.
        """
        task = self.trainer.lightning_module if self.trainer is not None else None
        if not isinstance(phase := getattr(task, "phase", None), RolloutPhase):
            raise UserError(f"{type(task).__name__} learns nothing from prompts alone; --model PPO or GRPO does")
        batch_size, replicas, accumulate = self.layout
        place = self.shard["rank"], replicas, self._position(), accumulate
        return RolloutSampler(self._shuffle, phase, self._seed, batch_size, *place)

    @property
    def rank_rows(self) -> list[int]:
        """Which rows of a phase this process writes: those that it sees first."""
        order = self.order
        return cast("list[int]", rank_rows(order.batch_size, order.rank, order.world_size, order.rows).tolist())

    def scoring(self, name: str | None) -> TextReward:
        """What says how good a reply is; by default the checkable preference that replies are judged by.

        If it is such a preference, replies are judged by it as well, unless another was asked for.

        Raises:
            UserError: There is none of that name, or nothing to be judged by.
        """
        self.rewarding = name if name in verifiable_rewards.VERIFIABLE_PREFERENCES else None
        if (name := name or self.checkable) is None:
            raise UserError("nothing says how good a reply is; name it: --model.reward, or --data.checkable")
        return load_text_reward(name)
