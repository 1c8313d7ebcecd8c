"""Windows as batches."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch.utils.data import Dataset

from lit_gpt_scratch.batch_types import IGNORE_INDEX, Batch
from lit_gpt_scratch.data.packing import PackingPlan
from lit_gpt_scratch.errors import UserError


class PackedDataset(Dataset[Batch]):
    """The windows of one store, or of several, counted through.

    Args:
        parts: Each store's.
        block_size: Tokens in a window, ``T``.
        vocab_size: Tokens that there are.
        end_of_text: The token that fills what is left of a window.
        document_mask: Say which document each token is of.
    """

    def __init__(
        self,
        parts: Sequence[PackingPlan],
        block_size: int,
        vocab_size: int,
        end_of_text: int,
        document_mask: bool = False,
    ) -> None:
        self.parts = parts
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.end_of_text = end_of_text
        self.document_mask = document_mask
        self._ends = list(accumulate(len(part) for part in parts))

    @property
    def sizes(self) -> list[int]:
        """Windows of each part."""
        return [len(part) for part in self.parts]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch at once: the hook that ``DataLoader`` calls when a dataset has it.

        An index of ``len(self)`` is a window without any label.
        """
        shape = len(indices), self.block_size
        ids = np.full(shape, self.end_of_text, dtype=np.int64)
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        begins = np.zeros(shape, dtype=bool)  # a document, or its part in this window
        for row, index in enumerate(indices):
            column = 0
            packing, pieces = self.pieces(index)
            for start, length in pieces:
                inputs, following = packing.stream.read_with_labels(start, length)
                ids[row, column : column + length] = inputs
                labels[row, column : column + len(following)] = following
                begins[row, column] = True
                if self.document_mask and packing.crosses:
                    begins[row, column - start + packing.stream.document_starts(start, start + length)] = True
                column += length
            begins[row, column:] = True  # what fills the window up is of no document, and each place alone
        if max(ids.max(), labels.max()) >= self.vocab_size:
            raise self._beyond(indices)
        batch = Batch(input_ids=torch.from_numpy(ids), labels=torch.from_numpy(labels))
        if self.document_mask:
            batch["document_ids"] = torch.from_numpy(np.cumsum(begins, axis=1))
        return batch

    def pieces(self, index: int) -> tuple[PackingPlan, list[tuple[int, int]]]:
        """The part that a window is of, and its stretches of that one's stream; see ``Packing.pieces``."""
        part = min(bisect_right(self._ends, index), len(self.parts) - 1)
        packing = self.parts[part]
        return packing, packing.pieces(index - self._ends[part] + len(packing))

    def describe_documents(self, index: int) -> str:
        """The documents that a window has tokens of, by their numbers in what it is laid from, in words."""
        packing, pieces = self.pieces(index)
        numbers: set[int] = set()
        before = 0
        for starts, _ in packing.stream.document_spans():
            for first, length in pieces:
                a, b = np.searchsorted(starts, (first, first + length - 1), side="right") - 1
                numbers.update(range(before + max(int(a), 0), before + int(b) + 1))
            before += len(starts)
        part = f" of part {bisect_right(self._ends, index)}" if len(self.parts) > 1 else ""
        return f"document{'s' if len(numbers) > 1 else ''} {', '.join(f'{n:,}' for n in sorted(numbers))}{part}"

    def _beyond(self, indices: Sequence[int]) -> UserError:
        """Which shard has a token that there is not; on a GPU nothing would tell."""
        for packing, pieces in map(self.pieces, indices):
            for start, length in pieces:
                for shift, tokens in enumerate(packing.stream.read_with_labels(start, length)):
                    beyond = np.flatnonzero(tokens >= self.vocab_size)
                    if not len(beyond):
                        continue
                    where = packing.stream.describe_position(start + shift + int(beyond[0]))
                    return UserError(
                        f"{where} has token {tokens[beyond[0]]}, but its tokenizer only {self.vocab_size} tokens; "
                        "delete the folder and prepare it again"
                    )
        raise AssertionError("all tokens are in the vocabulary")
