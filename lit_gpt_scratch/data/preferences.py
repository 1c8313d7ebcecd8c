"""Data module for reward modeling and DPO on pairs of a preferred and a rejected reply."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lit_gpt_scratch.batch_types import IGNORE_INDEX, DataInfo, PairBatch
from lit_gpt_scratch.data.padding import EMPTY_ROW, PaddedDataset, pad_rows
from lit_gpt_scratch.data.prompt_base import DEFAULT_CHECKABLE, PromptedDataModule
from lit_gpt_scratch.data.sampler import RowIndices
from lit_gpt_scratch.data.tokenized_examples import EncodedSequence, TokenizedExample
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import chat_template, synthetic_data
from lit_gpt_scratch.text.chat_template import ASSISTANT, Message
from lit_gpt_scratch.text.document import TableRow

TiePolicy = Literal["refuse", "drop"]
TIE_POLICIES: Final[tuple[TiePolicy, ...]] = get_args(TiePolicy)


@dataclass(frozen=True)
class PreferencePair:
    """A prompt with a preferred and a rejected reply."""

    prompt: Sequence[Message]
    chosen: str
    rejected: str

    @property
    def texts(self) -> Sequence[str]:
        """Text of each prompt message, followed by both replies."""
        return [*(message.content for message in self.prompt), self.chosen, self.rejected]


class Preferences(PromptedDataModule[PreferencePair]):
    """Data module for preference pairs, used for reward modeling and DPO.

    The data has the columns ``prompt`` (or ``instruction``), ``chosen`` and ``rejected``. Each of these columns
    contains a string or a list of messages.

    Args:
        ties: How to handle a pair whose two replies are equal: ``refuse`` raises an error that names the pair; ``drop``
            skips the pair.
        **kwargs: See ``PromptedDataModule`` and ``RecordDataModule``.
    """

    def __init__(self, ties: TiePolicy = "refuse", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if ties not in TIE_POLICIES:
            raise UserError(f"data.ties is {ties}; it must be one of {', '.join(TIE_POLICIES)}")
        self.ties = ties

    def default_rows(self) -> Iterator[TableRow]:
        """Generate synthetic tasks with one reply that satisfies the reward ``checkable`` and one that does not."""
        return synthetic_data.preferences(self.checkable or DEFAULT_CHECKABLE)

    def parse_row(self, fields: dict[str, Any]) -> PreferencePair:
        """Parse the prompt, the preferred reply and the rejected reply of a row."""
        chosen, rejected = (chat_template.parse_reply(fields, column) for column in ("chosen", "rejected"))
        found = PreferencePair(chat_template.parse_prompt(fields), chosen, rejected)
        if found.chosen == found.rejected and self.ties == "refuse":
            raise UserError(
                "'chosen' and 'rejected' are equal, so no reply is preferred; to skip such pairs, set --data.ties drop"
            )
        return found

    def select_records(self, records: list[tuple[str, PreferencePair]]) -> list[tuple[str, PreferencePair]]:
        """Return all records whose replies differ."""
        return [(where, record) for where, record in records if record.chosen != record.rejected]

    def encode_record(self, record: PreferencePair) -> tuple[EncodedSequence, ...]:
        """Tokenize the conversation once with each reply, the preferred reply first."""
        return tuple(
            self._encode_conversation([*record.prompt, Message(ASSISTANT, each)])
            for each in (record.chosen, record.rejected)
        )

    @property
    def info(self) -> DataInfo:
        """Description of the data, with ``has_pairs`` set to True and ``truncates`` set if long pairs are truncated."""
        return replace(super().info, has_pairs=True, truncates=self.too_long == "cut")

    def _encode_conversation(self, messages: Sequence[Message]) -> EncodedSequence:
        """Tokenize a whole conversation, with labels only for its last reply."""
        ids, learned = map(np.array, self.template.render(messages))
        labels = np.full(len(ids), IGNORE_INDEX)
        begin = np.flatnonzero(~learned)[-1] + 1  # start of the last reply, which ends the conversation
        labels[begin - 1 : -1] = ids[begin:]
        return EncodedSequence(ids, labels)

    def build_dataset(self, examples: Sequence[TokenizedExample]) -> "PreferencePairDataset":
        """Build a dataset with one pair per row."""
        return PreferencePairDataset(
            [example.sequences for example in examples], self.block_size, self.tokenizer.end_of_text
        )


class PreferencePairDataset(PaddedDataset[tuple[EncodedSequence, ...], PairBatch]):
    """Dataset of pairs of a preferred and a rejected sequence, right-padded to a common length per batch."""

    def make_batch(self, rows: Sequence[int]) -> PairBatch:
        """Build the batch for the given pair indices; the index ``len(self)`` denotes a padding pair."""
        padding = (EncodedSequence(EMPTY_ROW, EMPTY_ROW),) * 2
        pairs = [self.items[row] if row < len(self) else padding for row in rows]
        sequences = [pair[side] for side in (0, 1) for pair in pairs]  # all preferred, then all rejected
        return PairBatch(
            input_ids=pad_rows([sequence.ids for sequence in sequences], self.fill, self.block_size),
            labels=pad_rows([sequence.labels for sequence in sequences], IGNORE_INDEX, self.block_size),
            lengths=torch.tensor([len(sequence.ids) for sequence in sequences]),
        )

    def count_labels(self, rows: RowIndices) -> dict[str, Tensor]:
        """Return the batch entry ``step_labels``: the number of pairs in the optimizer step, ``len(rows)``."""
        return {"step_labels": torch.tensor(len(rows))}
