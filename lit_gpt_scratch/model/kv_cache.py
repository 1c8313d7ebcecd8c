"""The KV cache: keys and values of preceding tokens, in preallocated memory."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of a batch of rows, which may have different lengths; slot ``t`` of a row holds its token ``t``.

    It has ``n_kv_head`` heads; a tensor-parallel process holds its own. A forward pass is enclosed in
    ``begin_forward`` and ``end_forward``; in between, each block appends its keys and values once.

    Args:
        rows: Batch size.
        capacity: Tokens per row.
        device: Device of the model.
        dtype: Dtype of keys and values.
        fixed: For a single new token, return all slots together with a mask for the unused ones. Shapes then do not
            change from token to token, and a compiler has to trace the step only once.

    Attributes:
        lengths: Tokens of each row so far.
        capacity: Tokens per row.
        positions: Slots of the new tokens, (T,) int64 if all rows have the same length, else (B, T).
        visible_length: Slots that attention sees.
        needs_mask: Whether attention needs a mask over them.
        ragged: Whether rows write to different slots.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device, dtype: torch.dtype, fixed: bool = False) -> None:
        self._dtype = dtype
        self._keys: list[Tensor] = []  # of each block, (B, n_kv_head, capacity, head_dim)
        self._values: list[Tensor] = []
        self._previous: dict[str, Tensor] = {}  # (B, 1, ...) of each row's last token
        self._rows = torch.arange(rows, device=device)[:, None]  # (B, 1)
        self._fixed = fixed
        self.lengths = [0] * rows
        self.capacity = capacity
        self.begin_forward(0)

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    def begin_forward(self, tokens: int, counts: list[int] | None = None) -> None:
        """Prepare for new tokens.

        Args:
            tokens: T, of each row.
            counts: Each row's number of tokens without padding; T by default.
        """
        self._tokens, self._counts = tokens, counts
        self._start, self.visible_length = self.max_length, self.max_length + tokens
        device = self._rows.device
        self.ragged = len(set(self.lengths)) > 1
        self.needs_mask = self._start > 0 and (tokens > 1 or self.ragged)
        if self._fixed and tokens == 1 and self._start > 0:
            self.needs_mask = self.ragged = True
            self.visible_length = self.capacity
        offset = torch.arange(tokens, device=device)
        first = torch.tensor(self.lengths, device=device)[:, None] if self.ragged else self._start
        self.positions = offset + first
        self._last = None if counts is None else torch.tensor(counts, device=device)[:, None] - 1  # (B, 1)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a block's new keys and values, and return all it has.

        Args:
            layer: Number of the block.
            k: (B, n_kv_head, T, head_dim).
            v: (B, n_kv_head, T, head_dim).

        Returns:
            Keys and values of ``visible_length`` slots, (B, n_kv_head, S, head_dim); undefined after a row's end.
        """
        if layer == len(self._keys):
            B, heads, _, width = k.shape
            for tensors in (self._keys, self._values):
                tensors.append(torch.zeros(B, heads, self.capacity, width, device=k.device, dtype=self._dtype))
        keys, values = self._keys[layer], self._values[layer]
        if self.ragged and len(self.lengths) == 1:  # same result as below, but faster
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
        """Each new token's predecessor: (B, T, ...) -> (B, T, ...), zeros for the first token of a row.

        Args:
            name: Key under which the last token's value is kept for the next call.
            x: Values of the new tokens.
        """
        last = self._previous.get(name)
        shifted = torch.cat((torch.zeros_like(x[:, :1]) if last is None else last, x[:, :-1]), dim=1)
        self._previous[name] = x[:, -1:] if self._last is None else x[self._rows, self._last]
        return shifted

    def end_forward(self) -> None:
        """Add the new tokens to the lengths, after all blocks have appended."""
        counts = self._counts or [self._tokens] * len(self.lengths)
        self.lengths = [n + new for n, new in zip(self.lengths, counts, strict=True)]

    def select_rows(self, rows: list[int]) -> None:
        """Keep only these rows."""
        index = torch.tensor(rows, device=self._rows.device)
        self._keys = [keys[index] for keys in self._keys]
        self._values = [values[index] for values in self._values]
        self._previous = {name: x[index] for name, x in self._previous.items()}
        self._rows = self._rows[: len(rows)]
        self.lengths = [self.lengths[row] for row in rows]

    def clear_row(self, row: int) -> None:
        """Empty a row."""
        self.lengths[row] = 0

    def replace_row(self, row: int, other: "KVCache") -> None:
        """Replace a row by the only row of another cache."""
        for mine, its in zip([*self._keys, *self._values], [*other._keys, *other._values], strict=True):
            mine[row] = its[0]
        for name, x in other._previous.items():
            self._previous[name] = self._previous[name].clone()
            self._previous[name][row] = x[0]
        self.lengths[row] = other.lengths[0]
