"""KV cache: preallocated keys and values, or what they are computed from, of the preceding tokens."""

from itertools import chain

import torch
from torch import Tensor


class KVCache:
    """Cache of keys and values for a batch of rows, which may have different lengths.

    Slot ``t`` of a row stores the keys and values of token ``t``, or other tensors: the attention module of each block
    determines how many tensors it appends, and their shapes. Under tensor parallelism, each process stores only its own
    heads. Call ``begin_forward`` before and ``end_forward`` after
    each forward pass; in between, each block appends its keys and values once.

    A rolling cache (StreamingLLM, https://arxiv.org/abs/2309.17453) never runs out of slots: in a full row, each new
    token replaces the oldest token that is not a sink token. Positions are counted inside the cache, so that they never
    exceed those of the context: the sink tokens keep the first positions, the other tokens follow in the order of the
    text, and each replacement moves them by one position. Keys are therefore stored before they are rotated. The cost
    of a token and the size of the cache do not depend on the length of the text.

    Args:
        rows: Batch size.
        capacity: Maximum number of tokens per row.
        device: Device of the model.
        dtype: Dtype of the keys and values.
        fixed: Whether to return all ``capacity`` slots when a single token is appended, and to require a mask over the
            unused slots. Tensor shapes then do not change from token to token, so that ``torch.compile`` compiles the
            decoding step only once.
        sink_tokens: Number of sink tokens of a rolling cache, which are the first tokens of each row and are never
            replaced; must be below ``capacity``. None creates a cache that does not roll.

    Attributes:
        lengths: Number of tokens appended to each row; in a rolling cache, it may exceed ``capacity``.
        capacity: Maximum number of tokens per row.
        rolling: Whether the cache rolls. Its keys must then be rotated by ``key_positions`` after they are read.
        positions: Positions of the new tokens, int64 tensor of shape (B, T) if ``ragged`` is True, otherwise (T,).
        key_positions: Position of the token in each of the first S = ``visible_length`` slots, int64 tensor of shape
            (B, S) or (S,). In slots that are not used yet, it is greater than all ``positions`` of the row.
        row_lengths: Number of tokens in each row after the forward pass, or one number if all rows have the same.
        visible_length: Number of slots that attention reads, starting with the first slot.
        needs_mask: Whether attention requires an explicit mask over the first ``visible_length`` slots.
        ragged: Whether the slots of the new tokens are specified separately for each row.
    """

    def __init__(
        self,
        rows: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        fixed: bool = False,
        sink_tokens: int | None = None,
    ) -> None:
        self._dtype = dtype
        self._layers: list[tuple[Tensor, ...]] = []  # one per block; each tensor is (B, heads, capacity, width)
        self._previous: dict[str, Tensor] = {}  # id or embedding of each row's last token, (B, 1, ...)
        self._rows = torch.arange(rows, device=device)[:, None]  # (B, 1)
        self._fixed = fixed
        self._sinks = sink_tokens or 0
        self.rolling = sink_tokens is not None
        self.lengths = [0] * rows
        self.capacity = capacity
        self.begin_forward(0)

    @property
    def max_length(self) -> int:
        """Number of tokens in the longest row."""
        return max(self.lengths)

    def begin_forward(self, tokens: int, counts: list[int] | None = None) -> None:
        """Prepare for a forward pass on new tokens.

        Args:
            tokens: Number of new tokens per row (T), including padding; must be 1 if tokens are to be replaced.
            counts: Number of new tokens in each row, excluding padding; T by default.
        """
        self._tokens, self._counts = tokens, counts
        device = self._rows.device
        replaced = [max(0, n + tokens - self.capacity) if self.rolling else 0 for n in self.lengths]
        firsts = [n - gone for n, gone in zip(self.lengths, replaced, strict=True)]
        start = max(firsts)
        self.visible_length = start + tokens
        self.ragged = len(set(self.lengths)) > 1
        self.needs_mask = start > 0 and (tokens > 1 or self.ragged)
        if self._fixed and tokens == 1 and start > 0:
            self.needs_mask = self.ragged = True
            self.visible_length = self.capacity

        def per_row(numbers: list[int]) -> Tensor | int:
            return torch.tensor(numbers, device=device)[:, None] if self.ragged else numbers[0]

        # A full row stores its next token in the slot of the oldest token that is not a sink token.
        ring = self.capacity - self._sinks
        slots = [self._sinks + (gone - 1) % ring if gone else n for n, gone in zip(firsts, replaced, strict=True)]
        offset, key_slots = torch.arange(tokens, device=device), torch.arange(self.visible_length, device=device)
        self._slots, self.positions, self._start = offset + per_row(slots), offset + per_row(firsts), slots[0]
        self.key_positions = key_slots
        if self.rolling:
            rolled = self._sinks + (key_slots - self._sinks - per_row(replaced)) % ring
            self.key_positions = torch.where(key_slots < self._sinks, key_slots, rolled)
        lengths = [min(n + new, self.capacity) for n, new in zip(self.lengths, self._new_tokens(), strict=True)]
        self.row_lengths = lengths if self.ragged or len(set(lengths)) > 1 else lengths[:1]
        self._last = None if counts is None else torch.tensor(counts, device=device)[:, None] - 1  # (B, 1)

    def append(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Store new keys and values for a block, and return all keys and values of that block.

        Args:
            layer: Index of the block.
            new: New keys and values, or other tensors (see ``Attention.cache_shapes``), each of shape
                (B, heads, T, width).

        Returns:
            For each tensor the first S = ``visible_length`` slots, of shape (B, heads, S, width). Slots beyond the end
            of a row are undefined.
        """
        if layer == len(self._layers):
            shapes = [(B, heads, self.capacity, width) for B, heads, _, width in (x.shape for x in new)]
            self._layers.append(tuple(torch.zeros(s, device=new[0].device, dtype=self._dtype) for s in shapes))
        for stored, x in zip(self._layers[layer], new, strict=True):
            if self.ragged and len(self.lengths) == 1:  # same result as below, but faster
                stored.index_copy_(2, self._slots[0], x.type_as(stored))
            elif self.ragged:
                stored[self._rows, :, self._slots] = x.transpose(1, 2).type_as(stored)  # (B, T, heads, width)
            else:
                stored[:, :, self._start : self._start + self._tokens] = x
        return tuple(stored[:, :, : self.visible_length] for stored in self._layers[layer])

    def shift_right(self, name: str, x: Tensor) -> Tensor:
        """Shift the ids or embeddings of the new tokens right by one token: (B, T, ...) -> (B, T, ...).

        The first position is filled with the last token of the previous forward pass, or with zeros if there is none.

        Args:
            name: Key under which each row's last id or embedding is stored for the next forward pass.
            x: Ids or embeddings of the new tokens.
        """
        last = self._previous.get(name)
        shifted = torch.cat((torch.zeros_like(x[:, :1]) if last is None else last, x[:, :-1]), dim=1)
        self._previous[name] = x[:, -1:] if self._last is None else x[self._rows, self._last]
        return shifted

    def end_forward(self) -> None:
        """Add the new tokens to ``lengths``, after all blocks have appended their keys and values."""
        self.lengths = [n + new for n, new in zip(self.lengths, self._new_tokens(), strict=True)]

    def _new_tokens(self) -> list[int]:
        """Return the number of new tokens in each row, excluding padding."""
        return self._counts or [self._tokens] * len(self.lengths)

    def mark_static(self) -> None:
        """Promise CUDA graphs that keys and values stay where they are, because a graph cannot modify other inputs.

        A graph is recorded again if the promise is broken. Without CUDA graphs, this has no effect.
        """
        for tensor in chain(*self._layers):
            torch._dynamo.mark_static_address(tensor, guard=False)

    def select_rows(self, rows: list[int]) -> None:
        """Keep only the rows with the given indices, in the given order."""
        index = torch.tensor(rows, device=self._rows.device)
        self._layers = [tuple(stored[index] for stored in layer) for layer in self._layers]
        self._previous = {name: x[index] for name, x in self._previous.items()}
        self._rows = self._rows[: len(rows)]
        self.lengths = [self.lengths[row] for row in rows]

    def clear_row(self, row: int) -> None:
        """Remove all tokens from a row."""
        self.lengths[row] = 0

    def replace_row(self, row: int, other: "KVCache") -> None:
        """Replace a row with the row of ``other``, a cache that has only one row."""
        for mine, its in zip(chain(*self._layers), chain(*other._layers), strict=True):
            mine[row] = its[0]
        for name, x in other._previous.items():
            self._previous[name] = self._previous[name].clone()
            self._previous[name][row] = x[0]
        self.lengths[row] = other.lengths[0]
