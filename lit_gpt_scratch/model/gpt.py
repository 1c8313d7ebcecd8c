"""The decoder-only transformer: token ids in, logits of the next token out."""

from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.kernels.onednn_linear import Linear
from lit_gpt_scratch.model.attention import AttentionLayout, build_attention_layout, resolve_attention_class
from lit_gpt_scratch.model.bigram_embedding import BigramEmbedding, Smear
from lit_gpt_scratch.model.config import GPTConfig
from lit_gpt_scratch.model.feed_forward import FEED_FORWARDS
from lit_gpt_scratch.model.init import initialise_weights
from lit_gpt_scratch.model.kv_cache import KVCache
from lit_gpt_scratch.model.norms import build_norm
from lit_gpt_scratch.model.output_heads import OutputHead, TokenHead, padded_vocab_size
from lit_gpt_scratch.model.positions import POSITION_ENCODINGS, PositionEncoding


class GPT(nn.Module):
    """A language model from scratch.

    Args:
        config: The architecture.
        vocab_size: Number of token ids.
        block_size: The longest window, in tokens.
        output_head: What the head returns off the stream; logits of the next token by default.

    Raises:
        UserError: The embeddings are tied to a head that does not read tokens.
    """

    def __init__(
        self,
        config: GPTConfig,
        vocab_size: int,
        block_size: int,
        output_head: OutputHead = TokenHead(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.output_head = output_head
        self.recompute = False
        """Whether to keep of each block its input alone, in training, and to compute the rest again for the backward
        pass (https://arxiv.org/abs/1604.06174): less memory for a third more computation."""
        self.embedding = nn.Embedding(padded_vocab_size(config, vocab_size), config.n_embd)
        self.bigrams = BigramEmbedding(config.bigram_rows, config.n_embd) if config.bigram_rows else None
        self.smear = Smear(config.n_embd) if config.smear else None
        self.position = POSITION_ENCODINGS[config.position](config, block_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.value_tables = nn.ModuleList(
            nn.Embedding(vocab_size, config.kv_heads * config.head_width)
            for _ in range(config.n_layer if config.value_embeddings else 0)
        )
        self.norm = nn.Identity() if config.norm_placement == "post" else build_norm(config)
        self.head = Linear(config.n_embd, output_head.out_features(config, vocab_size), bias=False)
        initialise_weights(self)
        if config.tied_embeddings:
            if not isinstance(output_head, TokenHead):
                raise UserError(
                    f"model.gpt.tied_embeddings is true, but the output head is {type(output_head).__name__}"
                )
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """What the head returns at each position: by default the logits of the token after it.

        Args:
            input_ids: (B, T) int64 with T at most ``block_size``.
            document_ids: (B, T) int64, another number for each document of a window: no token then sees another's. By
                default every token sees all before it.

        Returns:
            (B, T, vocab_size), float32 or the weights' type if that has more bits.

        Raises:
            UserError: The window is longer than the model's context.
        """
        return self.apply_head(self.hidden_states(input_ids, document_ids))

    def apply_head(self, x: Tensor) -> Tensor:
        """(B, T, n_embd), as ``hidden`` gives it -> what the head returns."""
        raw = self.head(x)
        return self.output_head.finalize(
            raw if raw.dtype == torch.float64 else raw.float(), self.config, self.vocab_size
        )

    def logit_lens(self, stream: Tensor) -> Tensor:
        """What the head would read if the network ended here; behind the last block, what it does read.

        The logit lens (https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru): what the model thinks on its way.

        Args:
            stream: (B, T, n_embd), before or behind any block.

        Returns:
            As ``read``.
        """
        return self.apply_head(self.norm(stream))

    def hidden_states(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        counts: list[int] | None = None,
    ) -> Tensor:
        """The stream after the last block, normalised.

        Args:
            input_ids: (B, T) int64; with a cache, the tokens that come next.
            document_ids: As for ``forward``; not with a cache.
            cache: What came before; the tokens are added to it.
            counts: With a cache, how many of the tokens are each row's own; the others fill it up. All, by default.

        Returns:
            (B, T, n_embd).

        Raises:
            UserError: There are more tokens than the model's context, or the cache, holds.
        """
        T, most = input_ids.size(1), self.block_size
        if cache is not None:
            T, most = T + cache.max_length, min(cache.capacity, most)
        if most < T:
            raise UserError(f"{T} tokens do not fit into a context of {most}")
        if cache is not None:
            cache.begin_forward(input_ids.size(1), counts)
        x = self.forward_blocks(
            input_ids, build_attention_layout(self.config, self.position, input_ids, document_ids, cache), cache
        )
        if cache is not None:
            cache.end_forward()
        return x

    def forward_blocks(self, input_ids: Tensor, order: AttentionLayout, cache: KVCache | None = None) -> Tensor:
        """``hidden``, when it is known where the tokens stand: no more than tensors and what is done with them."""
        x = self.position.embed(self.embedding(input_ids), order.positions)  # (B, T, n_embd)
        if self.bigrams is not None or self.smear is not None:
            x = self._look_back(x, input_ids, order.positions == 0, cache)
        x = start = self.dropout(x)
        for number, (block, table) in enumerate(zip_longest(self.blocks, self.value_tables)):
            added = None if table is None else table(input_ids)  # (B, T, n_kv_head * head_dim)
            remember = None if cache is None else (cache, number)
            given = x, start, self.position, order, added, remember
            x = checkpoint(block, *given, use_reentrant=False) if self.recompute and self.training else block(*given)
        out: Tensor = self.norm(x)
        return out

    def _look_back(self, x: Tensor, input_ids: Tensor, first: Tensor, cache: KVCache | None) -> Tensor:
        """Let embeddings know of the token before, except the first of a document; first: (T,) or (B, T) bool."""
        if self.bigrams is not None:
            before = _before(input_ids) if cache is None else cache.shift_right("ids", input_ids)
            x = x + self.bigrams(input_ids, before, first)
        if self.smear is not None:
            before = _before(x) if cache is None else cache.shift_right("embedding", x)
            x = self.smear(x, before.masked_fill(first[..., None], 0.0))
        return x


def _before(x: Tensor) -> Tensor:
    """Of each token of a window, the one before it: (B, T, ...) -> (B, T, ...), zeros before the first."""
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)


class Block(nn.Module):
    """Mix across tokens, then within each token; each part adds its answer to the stream.

    ::

        pre                    post                   sandwich
        x + part(norm(x))      norm(x + part(x))      x + end(part(norm(x)))
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.post = config.norm_placement == "post"
        sandwich = config.norm_placement == "sandwich"
        self.attention_norm = build_norm(config)
        self.attention = resolve_attention_class(config.attention)(config)
        self.attention_end = build_norm(config) if sandwich else nn.Identity()
        self.feed_forward_norm = build_norm(config)
        self.feed_forward = FEED_FORWARDS[config.feed_forward](config)
        self.feed_forward_end = build_norm(config) if sandwich else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.mixing = nn.Parameter(torch.tensor([1.0, 0.0])) if config.residual_scalars else None

    def forward(
        self,
        x: Tensor,
        start: Tensor,
        position: PositionEncoding,
        layout: AttentionLayout,
        value_embedding: Tensor | None = None,
        remember: tuple[KVCache, int] | None = None,
    ) -> Tensor:
        """Do the block's work.

        Args:
            x: (B, T, n_embd), the stream.
            start: (B, T, n_embd), the stream before the first block.
            position: How attention knows order.
            layout: Where the tokens stand, and what each may see.
            value_embedding: (B, T, n_kv_head * head_dim), added to attention's values.
            remember: A cache, and the block's number in it.

        Returns:
            (B, T, n_embd).
        """
        if self.mixing is not None:
            x = self.mixing[0] * x + self.mixing[1] * start
        read = x if self.post else self.attention_norm(x)
        x = x + self.dropout(self.attention_end(self.attention(read, position, layout, value_embedding, remember)))
        x = self.attention_norm(x) if self.post else x
        read = x if self.post else self.feed_forward_norm(x)
        x = x + self.dropout(self.feed_forward_end(self.feed_forward(read)))
        return self.feed_forward_norm(x) if self.post else x
