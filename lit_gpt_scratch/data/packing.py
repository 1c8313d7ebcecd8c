"""How a stream of tokens is cut into windows."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lit_gpt_scratch.batch import IGNORED, Batch
from lit_gpt_scratch.data.token_store import Stream


class Windows(Dataset[Batch]):
    """Concatenate and split: window ``i`` sees tokens ``i * T`` to ``(i + 1) * T`` and predicts one further.

    Every token but the stream's very first is a label exactly once. Windows cross document borders; the
    end of text that precedes each document says where.

    Args:
        stream: The tokens.
        block_size: Tokens in a window, ``T``.
        whole: Keep the shorter last window, filled up with labels that are ignored, so that every token is
            scored (validation); else it is dropped (training, where all windows count alike).
    """

    def __init__(self, stream: Stream, block_size: int, whole: bool = False) -> None:
        self.stream = stream
        self.block_size = block_size
        scored = max(stream.n_tokens - 1, 0)
        self.n_windows = -(-scored // block_size) if whole else scored // block_size
        self.tokens = stream.open()

    def __getstate__(self) -> dict[str, Any]:
        # A loader's worker process opens the file anew; a pickled memory map would be the whole corpus.
        return {**self.__dict__, "tokens": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, tokens=state["stream"].open())

    def __len__(self) -> int:
        return self.n_windows

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch at once: the hook that ``DataLoader`` calls when a dataset has it.

        What lies behind the stream's end has no label, so an index of ``len(self)`` is a window without any.
        """
        T = self.block_size
        position = np.asarray(indices, dtype=np.int64)[:, None] * T + np.arange(T + 1)  # (B, T + 1)
        beyond = position >= self.stream.n_tokens
        window: NDArray[np.int64] = self.tokens[np.where(beyond, 0, position)].astype(np.int64)  # (B, T + 1)
        inputs, labels = window[:, :-1], np.where(beyond, IGNORED, window)[:, 1:]  # (B, T) each
        return Batch(input_ids=torch.from_numpy(inputs.copy()), labels=torch.from_numpy(labels.copy()))
