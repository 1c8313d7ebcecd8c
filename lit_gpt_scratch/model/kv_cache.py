"""What attention remembers of the tokens before: their keys and values, in memory that is laid out once."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of a batch of rows, which may be of different lengths: token t of a row lies in slot t.

    It has as many heads as there are keys and values (``n_kv_head``), not queries; a tensor-parallel process has those
    of its own. A call of the model is framed by ``begin`` and ``end``; in between every block appends its part once.

    Args:
        rows: Of the batch.
        slots: Tokens that a row can hold.
        device: Where the model is.
        dtype: Of its keys and values.
        fixed: Give every slot to every token that comes alone, and a mask over those that are not used: nothing then
            changes its shape from token to token, and a compiler needs to look at it once.

    Attributes:
        lengths: Tokens of each row so far.
        slots: Tokens that a row can hold.
        places: Slots of the tokens that come next, (T,) int64 where all rows are of one length, else (B, T).
        stop: Slots that attention gets to see.
        masked: Whether some of them are not to be seen by all.
        scattered: Whether each row writes to a place of its own.
    """

    def __init__(self, rows: int, slots: int, device: torch.device, dtype: torch.dtype, fixed: bool = False) -> None:
        self._dtype = dtype
        self._keys: list[Tensor] = []  # of each block
        self._values: list[Tensor] = []
        self._before: dict[str, Tensor] = {}
        self._rows = torch.arange(rows, device=device)[:, None]  # (B, 1)
        self._fixed = fixed
        self.lengths = [0] * rows
        self.capacity = slots
        self.begin_forward(0)

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    def begin_forward(self, tokens: int, counts: list[int] | None = None) -> None:
        """Make ready for tokens that come next.

        Args:
            tokens: T, of each row.
            counts: How many of them are each row's own; the others fill it up. All, by default.
        """
        self._tokens, self._counts = tokens, counts
        self._start, self.visible_length = self.max_length, self.max_length + tokens
        device = self._rows.device
        self.needs_mask = self._start > 0 and (tokens > 1 or len(set(self.lengths)) > 1)
        self.ragged = len(set(self.lengths)) > 1
        if self._fixed and tokens == 1 and self._start > 0:
            self.needs_mask = self.ragged = True
            self.visible_length = self.capacity
        offset = torch.arange(tokens, device=device)
        first = torch.tensor(self.lengths, device=device)[:, None] if self.ragged else self._start
        self.positions = offset + first
        self._own = None if counts is None else torch.tensor(counts, device=device)[:, None] - 1  # (B, 1)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep what one block adds, and give all that it has.

        Args:
            layer: The block's number.
            k: (B, n_kv_head, T, head_dim).
            v: (B, n_kv_head, T, head_dim).

        Returns:
            Keys and values of ``stop`` slots, (B, n_kv_head, S, head_dim); those beyond a row's own mean nothing.
        """
        if layer == len(self._keys):
            B, heads, _, width = k.shape
            for kept in (self._keys, self._values):
                kept.append(torch.zeros(B, heads, self.capacity, width, device=k.device, dtype=self._dtype))
        keys, values = self._keys[layer], self._values[layer]
        if self.ragged and len(self.lengths) == 1:  # the same, and faster
            keys.index_copy_(2, self.positions[0], k.type_as(keys))
            values.index_copy_(2, self.positions[0], v.type_as(values))
        elif self.ragged:
            keys[self._rows, :, self.positions] = k.transpose(1, 2).type_as(keys)  # (B, T, n_kv_head, head_dim)
            values[self._rows, :, self.positions] = v.transpose(1, 2).type_as(values)
        else:
            keys[:, :, self._start : self.visible_length] = k
            values[:, :, self._start : self.visible_length] = v
        return keys[:, :, : self.visible_length], values[:, :, : self.visible_length]

    def shift_right(self, name: str, x: Tensor) -> Tensor:
        """Of each token, the one before it: (B, T, ...) -> (B, T, ...), zeros before the first of a row.

        Args:
            name: Of what is to be remembered for the next call.
            x: Of the tokens that are new.
        """
        last = self._before.get(name)
        shifted = torch.cat((torch.zeros_like(x[:, :1]) if last is None else last, x[:, :-1]), dim=1)
        self._before[name] = x[:, -1:] if self._own is None else x[self._rows, self._own]
        return shifted

    def end_forward(self) -> None:
        """All blocks have added their part."""
        counts = self._counts or [self._tokens] * len(self.lengths)
        self.lengths = [n + more for n, more in zip(self.lengths, counts, strict=True)]

    def select_rows(self, rows: list[int]) -> None:
        """Forget all other rows."""
        index = torch.tensor(rows, device=self._rows.device)
        self._keys = [keys[index] for keys in self._keys]
        self._values = [values[index] for values in self._values]
        self._before = {name: x[index] for name, x in self._before.items()}
        self._rows = self._rows[: len(rows)]
        self.lengths = [self.lengths[row] for row in rows]

    def clear_row(self, row: int) -> None:
        """Begin a row anew."""
        self.lengths[row] = 0

    def replace_row(self, row: int, other: "KVCache") -> None:
        """Put the only row of another cache in the place of one of this one."""
        for mine, its in zip([*self._keys, *self._values], [*other._keys, *other._values], strict=True):
            mine[row] = its[0]
        for name, x in other._before.items():
            self._before[name] = self._before[name].clone()
            self._before[name][row] = x[0]
        self.lengths[row] = other.lengths[0]
