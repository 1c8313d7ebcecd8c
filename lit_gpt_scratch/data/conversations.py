"""Conversations: the data of instruction tuning."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Final

import numpy as np

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.data.packed_dataset import PackedDataset
from lit_gpt_scratch.data.packing import InMemoryPlan
from lit_gpt_scratch.data.record_datamodule import RecordDataModule
from lit_gpt_scratch.data.token_stream import RecordTokenStream
from lit_gpt_scratch.data.tokenized_examples import EncodedSequence, TokenizedExample
from lit_gpt_scratch.text import synthetic_data
from lit_gpt_scratch.text.chat_template import ROLE_TOKENS, ChatTemplate, Message, parse_conversation
from lit_gpt_scratch.text.document import TableRow

N_SAMPLE_CONVERSATIONS: Final = 3
"""Conversations that a model's replies are shown of."""


@dataclass(frozen=True)
class ConversationExample:
    """Messages that end with a reply."""

    messages: Sequence[Message]

    @property
    def texts(self) -> Sequence[str]:
        """Of every message."""
        return [message.content for message in self.messages]


class Conversations(RecordDataModule[ConversationExample]):
    """Instructions and messages with replies, in the one template (``text.chat``); only replies are learned.

    Records are packed by best fit into windows of ``block_size`` tokens, in which they see nothing of each other. For
    the arguments see ``RecordDataModule``.
    """

    shares = (0.05, 0.1)
    special_tokens = ROLE_TOKENS

    def default_rows(self) -> Iterator[TableRow]:
        """Small tasks about words."""
        return synthetic_data.conversations()

    def parse_row(self, fields: dict[str, Any]) -> ConversationExample:
        """Its messages, in whichever form."""
        return ConversationExample(parse_conversation(fields))

    @cached_property
    def template(self) -> ChatTemplate:
        """In the tokens of this data."""
        return ChatTemplate(self.tokenizer)

    def encode_record(self, record: ConversationExample) -> tuple[EncodedSequence, ...]:
        """The tokens of the template, each with the one that follows it, where that is of a reply."""
        ids, learned = map(np.array, self.template.render(record.messages))
        return (EncodedSequence(ids[:-1], np.where(learned[1:], ids[1:], IGNORE_INDEX)),)

    @property
    def uneven(self) -> bool:
        """Windows have as many labels as their replies are long."""
        return True

    @property
    def prompts(self) -> list[list[int]]:
        """Of the first conversations that are validated on and have room, up to their last reply."""
        prompts = (
            self.template.prompt(self.records[place][1].messages[:-1]) for place in self.split_indices["validation"]
        )
        return list(islice((prompt for prompt in prompts if len(prompt) < self.block_size), N_SAMPLE_CONVERSATIONS))

    def build_dataset(self, examples: Sequence[TokenizedExample]) -> PackedDataset:
        """Packed windows."""
        records = RecordTokenStream(
            [example.where for example in examples],
            [example.sequences[0].ids for example in examples],
            [example.sequences[0].labels for example in examples],
        )
        packing = InMemoryPlan(records, self.block_size, "best_fit")
        return PackedDataset(
            [packing], self.block_size, self.vocab_size, self.tokenizer.end_of_text, document_mask=True
        )
