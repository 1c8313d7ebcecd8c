"""What attention remembers of the tokens before: their keys and values, in memory that is laid out once."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lit_gpt_scratch.model.config import GPTConfig


class KVCache:
    """Keys and values of a batch of rows, which may be of different lengths: token t of a row lies in slot t.

    It has as many heads as there are keys and values (``n_kv_head``), not queries.

    Args:
        config: The architecture.
        rows: Of the batch.
        slots: Tokens that a row can hold.
        device: Where the model is.
        dtype: Of its keys and values.

    Attributes:
        lengths: Tokens of each row so far.
    """

    def __init__(self, config: "GPTConfig", rows: int, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (rows, config.kv_heads, slots, config.head_width)
        self._keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self._values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self._before: dict[str, Tensor] = {}
        self._rows = torch.arange(rows, device=device)[:, None]  # (B, 1)
        self._places: Tensor | None = None
        self._counts: list[int] | None = None
        self.lengths = [0] * rows
        self.slots = slots

    @property
    def empty(self) -> bool:
        """Whether nothing came before."""
        return not any(self.lengths)

    @property
    def even(self) -> bool:
        """Whether all rows are of one length."""
        return len(set(self.lengths)) == 1

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    def place(self, offset: Tensor) -> Tensor:
        """Slots of the tokens that come next: (T,) int64 -> (T,) where all rows are of one length, else (B, T)."""
        if self.even:
            self._places = None
            return offset + self.lengths[0]
        self._places = offset + torch.tensor(self.lengths, device=offset.device)[:, None]  # (B, T)
        return self._places

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep what one block adds, and give all that it has.

        Args:
            layer: The block's number.
            k: (B, n_kv_head, T, head_dim).
            v: (B, n_kv_head, T, head_dim).

        Returns:
            Keys and values of every slot up to the last that is used, (B, n_kv_head, S, head_dim); those beyond a row's
            own tokens mean nothing.
        """
        T, keys, values = k.size(2), self._keys[layer], self._values[layer]
        end = self.longest + T
        if self._places is None:
            keys[:, :, end - T : end] = k
            values[:, :, end - T : end] = v
        else:
            keys[self._rows, :, self._places] = k.transpose(1, 2).type_as(keys)  # (B, T, n_kv_head, head_dim)
            values[self._rows, :, self._places] = v.transpose(1, 2).type_as(values)
        return keys[:, :, :end], values[:, :, :end]

    def before(self, name: str, x: Tensor) -> Tensor:
        """Of each token, the one before it: (B, T, ...) -> (B, T, ...), zeros before the first of a row.

        Args:
            name: Of what is to be remembered for the next call.
            x: Of the tokens that are new.
        """
        last = self._before.get(name)
        shifted = torch.cat((torch.zeros_like(x[:, :1]) if last is None else last, x[:, :-1]), dim=1)
        if self._counts is None:
            self._before[name] = x[:, -1:]
        else:
            ends = torch.tensor(self._counts, device=x.device)[:, None] - 1  # (B, 1)
            self._before[name] = x[self._rows, ends]
        return shifted

    def expect(self, counts: list[int] | None) -> None:
        """Say how many of the tokens that come next are each row's own; the others fill the batch up. None: all."""
        self._counts = counts

    def advance(self, tokens: int) -> None:
        """All blocks have added their part of the tokens that were expected."""
        self.lengths = [
            n + more for n, more in zip(self.lengths, self._counts or [tokens] * len(self.lengths), strict=True)
        ]
        self._counts = None

    def keep(self, rows: list[int]) -> None:
        """Forget all other rows."""
        index = torch.tensor(rows, device=self._rows.device)
        self._keys = [keys[index] for keys in self._keys]
        self._values = [values[index] for values in self._values]
        self._before = {name: x[index] for name, x in self._before.items()}
        self._rows = self._rows[: len(rows)]
        self.lengths = [self.lengths[row] for row in rows]

    def clear(self, row: int) -> None:
        """Begin a row anew."""
        self.lengths[row] = 0

    def replace(self, row: int, other: "KVCache") -> None:
        """Put the only row of another cache in the place of one of this one."""
        for mine, its in zip([*self._keys, *self._values], [*other._keys, *other._values], strict=True):
            mine[row] = its[0]
        for name, x in other._before.items():
            self._before[name] = self._before[name].clone()
            self._before[name][row] = x[0]
        self.lengths[row] = other.lengths[0]
