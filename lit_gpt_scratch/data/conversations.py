"""Data module for instruction tuning on conversations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Final

import numpy as np

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.data.packed_dataset import PackedDataset
from lit_gpt_scratch.data.packing import InMemoryPlan, RecordTokenStream
from lit_gpt_scratch.data.record_datamodule import RecordDataModule
from lit_gpt_scratch.data.tokenized_examples import EncodedSequence, TokenizedExample
from lit_gpt_scratch.text import synthetic_data
from lit_gpt_scratch.text.chat_template import (
    ASSISTANT,
    ROLE_TOKENS,
    ChatTemplate,
    Message,
    load_chat_template,
    parse_conversation,
)
from lit_gpt_scratch.text.document import TableRow

N_SAMPLE_CONVERSATIONS: Final = 3
"""Number of conversations for which sample replies are logged."""


@dataclass(frozen=True)
class ConversationExample:
    """A conversation whose last message is a reply."""

    messages: Sequence[Message]

    @property
    def texts(self) -> Sequence[str]:
        """Text of each message."""
        return [message.content for message in self.messages]


class Conversations(RecordDataModule[ConversationExample]):
    """Data module for conversations, rendered with a chat template; the loss is computed on the replies only.

    Records are packed with ``best_fit`` into windows of ``block_size`` tokens, and tokens attend only to their own
    record. See ``text.chat_template`` for the template, and ``RecordDataModule`` for the arguments.
    """

    shares = (0.05, 0.1)
    special_tokens = ROLE_TOKENS
    packing = "best_fit"
    next_command = "generate {} --chat"

    def default_rows(self) -> Iterator[TableRow]:
        """Generate synthetic conversations about words."""
        return synthetic_data.conversations()

    def parse_row(self, fields: dict[str, Any]) -> ConversationExample:
        """Parse the messages of a row; see ``parse_conversation`` for the supported formats."""
        return ConversationExample(parse_conversation(fields))

    @cached_property
    def template(self) -> ChatTemplate:
        """Chat template of the model to fine-tune, or this package's template if the model has none."""
        return load_chat_template(self.tokenizer)

    def encode_record(self, record: ConversationExample) -> tuple[EncodedSequence, ...]:
        """Render and tokenize a conversation; only positions whose next token belongs to a reply have a label."""
        ids, learned = map(np.array, self.template.render(record.messages))
        token_bytes = np.zeros(len(ids), dtype=np.int64)
        # Start and stop of each reply, including its end token.
        bounds = np.flatnonzero(np.diff(learned, prepend=False, append=False))
        replies = (message.content for message in record.messages if message.role == ASSISTANT)
        for start, stop, reply in zip(bounds[::2], bounds[1::2] - 1, replies, strict=True):
            token_bytes[start:stop] = self.tokenizer.distribute_bytes(ids[start:stop], len(reply.encode()))
        return (EncodedSequence(ids[:-1], np.where(learned[1:], ids[1:], IGNORE_INDEX), token_bytes[1:]),)

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of the prompts for sample replies: validation conversations without their last reply."""
        prompts = (
            self.template.render_prompt(self.records[place][1].messages[:-1])
            for place in self.split_indices["validation"]
        )
        return list(islice((prompt for prompt in prompts if len(prompt) < self.block_size), N_SAMPLE_CONVERSATIONS))

    def build_dataset(self, examples: Sequence[TokenizedExample]) -> PackedDataset:
        """Build a dataset that packs the examples into windows."""
        records = RecordTokenStream(
            [example.where for example in examples],
            [example.sequences[0].ids for example in examples],
            [example.sequences[0].labels for example in examples],
            [example.sequences[0].label_bytes for example in examples],
        )
        packing = InMemoryPlan(records, self.block_size, self.packing)
        return PackedDataset(
            [packing], self.block_size, self.vocab_size, self.tokenizer.end_of_text, True, [records.count_bytes]
        )
