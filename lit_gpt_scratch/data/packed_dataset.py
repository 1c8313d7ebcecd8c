"""Dataset that reads packed rows from token streams and returns them as a ``Batch``."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from lit_gpt_scratch.batch_types import IGNORE_INDEX, Batch
from lit_gpt_scratch.data.packing import PackingPlan
from lit_gpt_scratch.data.sampler import RowDataset, RowIndices
from lit_gpt_scratch.errors import UserError


class PackedDataset(RowDataset[Batch]):
    """Dataset whose rows are packed documents from one token stream, or from several concatenated streams.

    Args:
        parts: Packing plan of each token stream.
        block_size: Number of tokens per row.
        vocab_size: Vocabulary size.
        end_of_text: End-of-text token id, which is also used for padding.
        document_mask: Whether to add ``document_ids`` to the batches, so that tokens attend only to their own document.
        count_bytes: Function for each token stream that maps the start and length of a span to the number of text bytes
            that its labels represent. If set, ``text_bytes`` is added to the batches.
    """

    def __init__(
        self,
        parts: Sequence[PackingPlan],
        block_size: int,
        vocab_size: int,
        end_of_text: int,
        document_mask: bool = False,
        count_bytes: Sequence[Callable[[int, int], int]] | None = None,
    ) -> None:
        self.parts = parts
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.end_of_text = end_of_text
        self.document_mask = document_mask
        self.count_bytes = count_bytes
        self._ends = list(accumulate(len(part) for part in parts))

    @property
    def sizes(self) -> list[int]:
        """Number of rows from each token stream."""
        return [len(part) for part in self.parts]

    def __len__(self) -> int:
        return self._ends[-1]

    def make_batch(self, rows: Sequence[int]) -> Batch:
        """Build the batch for the given row indices.

        Raises:
            UserError: A token id is not in the vocabulary.
        """
        shape = len(rows), self.block_size
        ids = np.full(shape, self.end_of_text, dtype=np.int64)
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        begins = np.zeros(shape, dtype=bool)  # True where a document, or the part of a document in this row, begins
        for b, row in enumerate(rows):
            t = 0
            plan, pieces = self.pieces(row)
            for start, length in pieces:
                inputs, following = plan.stream.read_with_labels(start, length)
                ids[b, t : t + length] = inputs
                labels[b, t : t + len(following)] = following
                begins[b, t] = True
                if self.document_mask and plan.crosses:
                    begins[b, t - start + plan.stream.document_starts(start, start + length)] = True
                t += length
            begins[b, t:] = True  # each padding token is a separate document
        if max(ids.max(), labels.max()) >= self.vocab_size:
            raise self._unknown_token_error(rows)
        batch = Batch(input_ids=torch.from_numpy(ids), labels=torch.from_numpy(labels))
        if self.document_mask:
            batch["document_ids"] = torch.from_numpy(np.cumsum(begins, axis=1))
        if self.count_bytes is not None:
            batch["text_bytes"] = torch.tensor([self._count_text_bytes(row, self.count_bytes) for row in rows])
        return batch

    def _count_text_bytes(self, row: int, count_bytes: Sequence[Callable[[int, int], int]]) -> int:
        part = min(bisect_right(self._ends, row), len(self.parts) - 1)
        return sum(count_bytes[part](start, length) for start, length in self.pieces(row)[1])

    def count_labels(self, rows: RowIndices) -> dict[str, Tensor]:
        """Count the labels in the rows without reading their tokens, and return the count as ``step_labels``."""
        parts = np.searchsorted(self._ends, rows, side="right")
        counts = (
            self.parts[part].count_labels(rows[parts == part] - self._ends[part] + len(self.parts[part]))
            for part in np.unique(parts)
        )
        return {"step_labels": torch.tensor(sum(counts))}

    def pieces(self, row: int) -> tuple[PackingPlan, list[tuple[int, int]]]:
        """Return the packing plan that contains a row, and the pieces of that row (see ``PackingPlan.pieces``)."""
        part = min(bisect_right(self._ends, row), len(self.parts) - 1)
        plan = self.parts[part]
        return plan, plan.pieces(row - self._ends[part] + len(plan))

    def describe_row(self, row: int) -> str:
        """Describe a row by the indices of its documents in the token stream, for log and error messages."""
        plan, pieces = self.pieces(row)
        numbers: set[int] = set()
        before = 0
        for starts, _ in plan.stream.document_spans():
            for first, length in pieces:
                a, b = np.searchsorted(starts, (first, first + length - 1), side="right") - 1
                numbers.update(range(before + max(int(a), 0), before + int(b) + 1))
            before += len(starts)
        part = f" of part {bisect_right(self._ends, row)}" if len(self.parts) > 1 else ""
        return f"document{'s' if len(numbers) > 1 else ''} {', '.join(f'{n:,}' for n in sorted(numbers))}{part}"

    def _unknown_token_error(self, rows: Sequence[int]) -> UserError:
        """Build an error that names the shard with the unknown token.

        On a GPU, the embedding lookup would otherwise fail with an error that does not identify the token.
        """
        for plan, pieces in map(self.pieces, rows):
            for start, length in pieces:
                for shift, tokens in enumerate(plan.stream.read_with_labels(start, length)):
                    unknown = np.flatnonzero(tokens >= self.vocab_size)
                    if not len(unknown):
                        continue
                    where = plan.stream.describe_position(start + shift + int(unknown[0]))
                    return UserError(
                        f"{where} contains token id {tokens[unknown[0]]}, but the tokenizer has only {self.vocab_size} "
                        "tokens; delete the folder and prepare the corpus again"
                    )
        raise AssertionError("all tokens are in the vocabulary")
