"""Pairs of a preferred and a rejected reply: data for reward models and DPO."""

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
    """A prompt, the preferred reply, and the rejected reply."""

    prompt: Sequence[Message]
    chosen: str
    rejected: str

    @property
    def texts(self) -> Sequence[str]:
        """The contents of the prompt's messages and both replies."""
        return [*(message.content for message in self.prompt), self.chosen, self.rejected]


class Preferences(PromptedDataModule[PreferencePair]):
    """Rows with ``prompt`` (or ``instruction``), ``chosen`` and ``rejected``, each a text or messages.

    Args:
        ties: How to handle a pair with equal replies: ``refuse`` (an error that names it) or ``drop`` it.
        **kwargs: See ``PromptedDataModule`` and ``RecordDataModule``.
    """

    def __init__(self, ties: TiePolicy = "refuse", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if ties not in TIE_POLICIES:
            raise UserError(f"data.ties is {ties}; it must be one of {', '.join(TIE_POLICIES)}")
        self.ties = ties

    def default_rows(self) -> Iterator[TableRow]:
        """Synthetic tasks about words, with a reply that satisfies the verifiable preference and one that does not."""
        return synthetic_data.preferences(self.checkable or DEFAULT_CHECKABLE)

    def parse_row(self, fields: dict[str, Any]) -> PreferencePair:
        """Parse a prompt and two replies."""
        chosen, rejected = (chat_template.parse_reply(fields, column) for column in ("chosen", "rejected"))
        found = PreferencePair(chat_template.parse_prompt(fields), chosen, rejected)
        if found.chosen == found.rejected and self.ties == "refuse":
            raise UserError(
                "'chosen' and 'rejected' are the same: nothing is preferred; leave out such pairs: --data.ties drop"
            )
        return found

    def select_records(self, records: list[tuple[str, PreferencePair]]) -> list[tuple[str, PreferencePair]]:
        """All records except ties."""
        return [(where, record) for where, record in records if record.chosen != record.rejected]

    def encode_record(self, record: PreferencePair) -> tuple[EncodedSequence, ...]:
        """The conversation with each reply, the preferred one first."""
        return tuple(
            self._encode_conversation([*record.prompt, Message(ASSISTANT, each)])
            for each in (record.chosen, record.rejected)
        )

    @property
    def info(self) -> DataInfo:
        """Adds that batches are pairs, and whether they are truncated."""
        return replace(super().info, has_pairs=True, truncates=self.too_long == "cut")

    def _encode_conversation(self, messages: Sequence[Message]) -> EncodedSequence:
        """All tokens of a conversation, with labels on the last reply."""
        ids = np.array(self.template.render(messages).ids)
        labels = np.full(len(ids), IGNORE_INDEX)
        begin = len(self.template.render_prompt(messages[:-1]))
        labels[begin - 1 : -1] = ids[begin:]
        return EncodedSequence(ids, labels)

    def build_dataset(self, examples: Sequence[TokenizedExample]) -> "PreferencePairDataset":
        """One pair per row."""
        return PreferencePairDataset(
            [example.sequences for example in examples], self.block_size, self.tokenizer.end_of_text
        )


class PreferencePairDataset(PaddedDataset[tuple[EncodedSequence, ...], PairBatch]):
    """Right-padded pairs of a preferred and a rejected sequence."""

    def make_batch(self, rows: Sequence[int]) -> PairBatch:
        """A batch of some pairs; the index ``len(self)`` stands for a padding pair."""
        padding = (EncodedSequence(EMPTY_ROW, EMPTY_ROW),) * 2
        pairs = [self.items[row] if row < len(self) else padding for row in rows]
        sequences = [pair[side] for side in (0, 1) for pair in pairs]  # the preferred ones, then the rejected ones
        return PairBatch(
            input_ids=pad_rows([sequence.ids for sequence in sequences], self.fill, self.block_size),
            labels=pad_rows([sequence.labels for sequence in sequences], IGNORE_INDEX, self.block_size),
            lengths=torch.tensor([len(sequence.ids) for sequence in sequences]),
        )

    def count_labels(self, rows: RowIndices) -> dict[str, Tensor]:
        """``step_labels``: the number of pairs."""
        return {"step_labels": torch.tensor(len(rows))}
