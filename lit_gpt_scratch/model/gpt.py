"""The decoder-only transformer, which maps token ids to next-token logits."""

from functools import partial
from itertools import zip_longest
from typing import ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.kernels.onednn_linear import Linear
from lit_gpt_scratch.model.activation_checkpointing import ActivationCheckpointing, call_with_checkpointing
from lit_gpt_scratch.model.attention import AttentionLayout, build_attention_layouts
from lit_gpt_scratch.model.attention_registry import resolve_attention_class
from lit_gpt_scratch.model.bigram_embedding import BigramEmbedding, Smear
from lit_gpt_scratch.model.config import GPTConfig
from lit_gpt_scratch.model.feed_forward import resolve_feed_forward_class
from lit_gpt_scratch.model.kv_cache import KVCache
from lit_gpt_scratch.model.local_shard import shard_slices, to_local
from lit_gpt_scratch.model.module_metadata import OptimizerGroup, parameter_roles
from lit_gpt_scratch.model.moe import ExpertLinear
from lit_gpt_scratch.model.multi_token_prediction import MultiTokenModule
from lit_gpt_scratch.model.norms import build_norm
from lit_gpt_scratch.model.output_heads import POOLINGS, OutputHead, TokenHead, padded_vocab_size, pool_windows
from lit_gpt_scratch.model.positions import POSITION_ENCODINGS, PositionEncoding
from lit_gpt_scratch.model.weight_init import INITIALISATIONS, ResidualBranch, WeightsByRole
from lit_gpt_scratch.model.weight_sampler import WeightSampler, draw_seed

INITIALISED_BY_SCHEME: Final = nn.Linear | ExpertLinear | nn.Embedding | nn.LayerNorm
"""Modules that do not require ``init_weights``."""


class Block(nn.Module):
    """Transformer block: attention and a feed-forward network, whose outputs are added to the residual stream.

    ``config.norm_placement`` determines where the norms are placed; ``f`` is attention or the feed-forward network::

        pre                post               output                 sandwich
        x + f(norm(x))     norm(x + f(x))     x + end_norm(f(x))     x + end_norm(f(norm(x)))
    """

    optimizer_group: ClassVar[OptimizerGroup] = "matrices"

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        norm = partial(build_norm, config.norm, config.n_embd, config.norm_eps, config.bias)
        self.post = config.norm_placement == "post"
        begins, self.ends = config.norm_placement != "output", config.norm_placement in ("output", "sandwich")
        self.attention_norm = norm() if begins else nn.Identity()
        self.attention = resolve_attention_class(config.attention)(config)
        self.attention_end = norm() if self.ends else nn.Identity()
        self.feed_forward_norm = norm() if begins else nn.Identity()
        self.feed_forward = resolve_feed_forward_class(config.feed_forward)(config)
        self.feed_forward_end = norm() if self.ends else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.mixing = nn.Parameter(torch.tensor([1.0, 0.0])) if config.residual_scalars else None

    def init_weights(self, sampler: WeightSampler) -> None:
        """Initialize the residual scalars so that the block's input is its only input."""
        if self.mixing is not None:
            [part] = shard_slices(self.mixing)
            to_local(self.mixing).copy_(torch.tensor([1.0, 0.0])[part])

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        position: PositionEncoding,
        layout: AttentionLayout,
        value_embedding: Tensor | None = None,
        layer_cache: tuple[KVCache, int] | None = None,
        checkpointing: ActivationCheckpointing = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the block to the residual stream.

        Args:
            x: Residual stream, of shape (B, T, n_embd).
            x0: Residual stream before the first block, of shape (B, T, n_embd).
            position: The position encoding.
            layout: Positions and attention mask.
            value_embedding: Tensor of shape (B, T, n_kv_head * head_dim) to add to the attention values, or None.
            layer_cache: KV cache and the index of this block in the cache, or None if no cache is used.
            checkpointing: What to store for the backward pass.

        Returns:
            The new residual stream, of shape (B, T, n_embd), and the router logits of a mixture of experts, of shape
            (B, T, n_experts); None for other feed-forward networks.
        """
        if checkpointing:  # inside the block, so that compiling the block compiles the recomputation, too
            inputs = x, x0, position, layout, value_embedding, layer_cache
            return call_with_checkpointing(checkpointing, self.forward, *inputs)
        if self.mixing is not None:
            x = self.mixing[0] * x + self.mixing[1] * x0
        h = x if self.post else self.attention_norm(x)
        x = x + self.dropout(self.attention_end(self.attention(h, position, layout, value_embedding, layer_cache)))
        x = self.attention_norm(x) if self.post else x
        h = self.feed_forward(x if self.post else self.feed_forward_norm(x))
        h, router_logits = h if isinstance(h, tuple) else (h, None)
        x = x + self.dropout(self.feed_forward_end(h))
        return (self.feed_forward_norm(x) if self.post else x), router_logits

    def residual_branches(self) -> list[ResidualBranch]:
        """Return the attention branch and the feed-forward branch, for weight initialization."""
        return [
            ResidualBranch(module.residual_outputs(), end_norm if self.ends else None)
            for module, end_norm in (
                (self.attention, self.attention_end),
                (self.feed_forward, self.feed_forward_end),
            )
        ]


class GPT(nn.Module):
    """Decoder-only transformer.

    Args:
        config: The architecture.
        vocab_size: Number of tokens in the vocabulary.
        block_size: Context length in tokens.
        output_head: Output head; by default, the model returns next-token logits.
        seed: Random seed of the initial weights; by default drawn from torch's global generator.
        initialise: Whether to initialize the weights. Pass False if they will be loaded, or on the meta device, where
            they are not allocated; see ``materialize``.

    Raises:
        UserError: ``config.tied_embeddings`` is True, but the output head does not predict tokens.
    """

    tensor_parallel_plan: ClassVar[dict[str, str]] = {
        "embedding": "embedding",
        "value_tables.*": "colwise",
        "head": "colwise_gather",
    }

    def __init__(
        self,
        config: GPTConfig,
        vocab_size: int,
        block_size: int,
        output_head: OutputHead = TokenHead(),  # noqa: B008 - frozen
        seed: int | None = None,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.output_head = output_head
        self.activation_checkpointing: ActivationCheckpointing = False
        """What each block stores for the backward pass in training."""
        self.recorded_router_logits: list[Tensor] | None = None
        """List to which each forward pass with gradients appends the router logits of each block, of shape
        (B, T, n_experts), if the blocks are mixtures of experts; None disables recording."""
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
        self.norm = (
            nn.Identity()
            if config.norm_placement == "post"
            else build_norm(config.norm, config.n_embd, config.norm_eps, config.bias)
        )
        self.head = Linear(config.n_embd, output_head.out_features(config, vocab_size), bias=False)
        self.multi_token_modules = nn.ModuleList(
            MultiTokenModule(config, Block(config), self.head.out_features) for _ in range(config.multi_token_depth)
        )
        if config.tied_embeddings:
            if not isinstance(output_head, TokenHead):
                raise UserError(
                    f"model.gpt.tied_embeddings is true, but the output head is {type(output_head).__name__}, which "
                    f"does not predict tokens; set model.gpt.tied_embeddings to false"
                )
            self.head.weight = self.embedding.weight
        if initialise and not self.embedding.weight.is_meta:
            self.initialise_weights(draw_seed() if seed is None else seed)

    @property
    def width_multiplier(self) -> float:
        """Width relative to the model for which the hyperparameters were tuned; see ``GPTConfig.parametrisation``."""
        return self.config.width_multiplier

    @property
    def all_blocks(self) -> list[Block]:
        """The blocks of the network, followed by those of the modules for multi-token prediction."""
        return [module for module in self.modules() if isinstance(module, Block)]

    @torch.no_grad()
    def initialise_weights(self, seed: int) -> None:
        """Initialize all weights with the scheme ``config.initialisation``, which may be sharded.

        Args:
            seed: Random seed, nonnegative.
        """
        sampler = WeightSampler(self, seed)
        for module in self.modules():
            if (init_weights := getattr(module, "init_weights", None)) is not None:
                init_weights(sampler)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for table in self.value_tables.parameters():
            nn.init.zeros_(table)
        head = None if self.head.weight is self.embedding.weight else self.head
        linears = [
            module
            for module in self.modules()
            if isinstance(module, nn.Linear | ExpertLinear) and (module is not self.head or head is not None)
        ]
        for linear in linears:
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        branches = [branch for block in self.all_blocks for branch in block.residual_branches()]
        roles = parameter_roles(self)
        readouts = frozenset(linear for linear in linears if roles[linear.get_parameter("weight")] == "readouts")
        weights = WeightsByRole(self.embedding.weight, linears, branches, head, readouts, self.width_multiplier)
        INITIALISATIONS[self.config.initialisation](weights, sampler)

    @torch.no_grad()
    def materialize(self, device: torch.device, seed: int) -> None:
        """Allocate and initialize a network that was built on the meta device and may have been sharded since.

        Only the shards of this process are allocated, and their weights are those of a network that was never sharded.

        Args:
            device: Device of the weights.
            seed: See ``initialise_weights``.

        Raises:
            UserError: A module of a custom attention class does not define how its parameters or buffers are
                initialized.
        """
        self._require_initial_values()
        tied = self.head.weight is self.embedding.weight
        self.to_empty(device=device)
        if tied:
            self.head.weight = self.embedding.weight
        for parameter in self.parameters():
            to_local(parameter).fill_(torch.nan)  # so that a weight that is not initialized cannot go unnoticed
        with torch.device(device):
            for module in self.modules():
                if (init_buffers := getattr(module, "init_buffers", None)) is not None:
                    init_buffers()
        self.initialise_weights(seed)

    def _require_initial_values(self) -> None:
        """Check that all parameters and buffers can be initialized without the constructors of their modules."""
        for name, module in self.named_modules():
            for kind, tensors, method in (
                ("parameters", module.parameters(recurse=False), "init_weights"),
                ("buffers", module.buffers(recurse=False), "init_buffers"),
            ):
                known = kind == "parameters" and isinstance(module, INITIALISED_BY_SCHEME)
                if [*tensors] and not known and not hasattr(module, method):
                    raise UserError(
                        f"model.gpt: {name} has {kind} without initial values, because {type(module).__name__} does "
                        f"not define {method}, which a sharded model requires; define it, or train without sharding"
                    )

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Compute the output of the head at each position, by default next-token logits.

        Args:
            input_ids: Token ids, int64 tensor of shape (B, T), with T at most ``block_size``.
            document_ids: Id of the document that contains each token, int64 tensor of shape (B, T); ids are unique
                within a row. Each token then attends only to tokens of its own document. If None, each token attends
                to all preceding tokens.

        Returns:
            The output of the head in at least float32; next-token logits have shape (B, T, vocab_size).

        Raises:
            UserError: T exceeds the context length.
        """
        return self.apply_head(self.hidden_states(input_ids, document_ids))

    def forward_pooled(
        self, input_ids: Tensor, lengths: Tensor, pooling: str = "last", window_counts: Tensor | None = None
    ) -> Tensor:
        """Compute one output per sequence, such as class logits or a reward.

        Args:
            input_ids: Right-padded token ids, int64 tensor of shape (W, T).
            lengths: Number of tokens in each row, excluding padding, int64 tensor of shape (W,).
            pooling: Name of a pooling function in ``POOLINGS``.
            window_counts: Number of consecutive rows per sequence, int64 tensor of shape (B,), or None if each row is a
                sequence.

        Returns:
            With a classification head, class logits of shape (B, n_classes); with a scalar head, scalars of shape (B,).
        """
        pooled = POOLINGS[pooling](self.hidden_states(input_ids), lengths)  # (W, 1, n_embd)
        if window_counts is not None:
            pooled = pool_windows(pooled, lengths, window_counts)  # (B, 1, n_embd)
        return self.apply_head(pooled).squeeze(1)

    def apply_head(self, x: Tensor) -> Tensor:
        """Apply the output head to the output of ``hidden_states``, a tensor of shape (B, T, n_embd)."""
        return self.finalize_output(self.head(x))

    def finalize_output(self, raw: Tensor) -> Tensor:
        """Convert the output of ``head``, a tensor of shape (B, T, out_features), to that of ``apply_head``."""
        raw = raw if raw.dtype == torch.float64 else raw.float()
        return self.output_head.finalize(raw, self.config, self.vocab_size)

    def logit_lens(self, x: Tensor) -> Tensor:
        """Compute the output of the head for an intermediate residual stream (logit lens).

        This is the output that the network would have if it ended at this point. After the last block, it is the
        actual output of the network. See https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru.

        Args:
            x: Residual stream before or after any block, of shape (B, T, n_embd).

        Returns:
            The output of ``apply_head``.
        """
        return self.apply_head(self.norm(x))

    def hidden_states(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        counts: list[int] | None = None,
    ) -> Tensor:
        """Compute the normalized residual stream after the last block.

        Args:
            input_ids: Token ids, int64 tensor of shape (B, T); with a cache, the tokens that follow the cached tokens.
            document_ids: See ``forward``; not supported with a cache.
            cache: KV cache of the preceding tokens, to which the keys and values of ``input_ids`` are appended.
            counts: Number of tokens in each row of ``input_ids``, excluding padding; T by default. Ignored without a
                cache.

        Returns:
            The normalized residual stream, of shape (B, T, n_embd).

        Raises:
            UserError: The number of tokens exceeds the context length or the capacity of the cache.
        """
        length, max_length = input_ids.size(1), self.block_size
        if cache is not None and not (cache.rolling and length == 1):  # a rolling cache has room for one more token
            length, max_length = length + cache.max_length, min(cache.capacity, max_length)
        _validate_length(length, max_length)
        if cache is not None:
            cache.begin_forward(input_ids.size(1), counts)
        layouts = build_attention_layouts(self.config, self.position, input_ids, document_ids, cache)
        x = self.forward_blocks(input_ids, layouts, cache)
        if cache is not None:
            cache.end_forward()
        return x

    def hidden_states_by_depth(self, input_ids: Tensor, document_ids: Tensor | None = None) -> list[Tensor]:
        """Compute ``hidden_states`` and the states from which tokens further ahead are predicted.

        For each module in ``multi_token_modules`` the states are one token shorter, because it also reads the token
        that the states before it predict. All states read only tokens of their own document, as far as
        ``labels_ahead`` assigns them a label.

        Args:
            input_ids: Token ids, int64 tensor of shape (B, T).
            document_ids: See ``forward``.

        Returns:
            1 + ``config.multi_token_depth`` tensors. The one at index ``depth`` has shape (B, T - depth, n_embd), and
            ``apply_head`` predicts from it the token ``depth + 1`` positions after each position.

        Raises:
            UserError: T exceeds the context length.
        """
        T = input_ids.size(1)
        _validate_length(T, self.block_size)
        layouts = build_attention_layouts(self.config, self.position, input_ids, document_ids, None)
        states = [self.forward_blocks(input_ids, layouts)]  # (B, T, n_embd) at each depth: the last tokens are padding
        checkpointing = self.training and self.activation_checkpointing
        for depth, module in enumerate(self.multi_token_modules, start=1):
            ahead = F.pad(input_ids[:, depth:], (0, min(depth, T)))  # (B, T)
            embedding = self.embedding(ahead)  # (B, T, n_embd)
            layout = layouts[self.config.is_local(self.config.n_layer + depth - 1)]
            x, router_logits = module(states[-1], embedding, self.position, layout, checkpointing)
            self._record_router_logits(router_logits)
            states.append(x)
        return [x[:, : max(T - depth, 0)] for depth, x in enumerate(states)]

    def multi_token_logits(self, input_ids: Tensor, document_ids: Tensor | None = None) -> list[Tensor]:
        """Compute the logits of the next token and of tokens further ahead, such as drafts for speculative decoding.

        Returns:
            The output of ``apply_head`` for each tensor of ``hidden_states_by_depth``.
        """
        return [self.apply_head(x) for x in self.hidden_states_by_depth(input_ids, document_ids)]

    def forward_blocks(
        self, input_ids: Tensor, layouts: dict[bool, AttentionLayout], cache: KVCache | None = None
    ) -> Tensor:
        """Compute ``hidden_states`` for the output of ``build_attention_layouts``.

        This method consists only of tensor operations, so that it can be compiled as a single graph.
        """
        positions = layouts[self.config.is_local(0)].positions  # the same in all layouts
        x = self.embedding(input_ids)  # (B, T, n_embd)
        if self.config.scaled_embeddings:
            x = x * x.new_full((), self.config.n_embd**0.5)  # rounded to the dtype of the embeddings, as in Gemma
        x = self.position.embed(x, positions)
        if self.bigrams is not None or self.smear is not None:
            x = self._add_previous_token(x, input_ids, positions == 0, cache)
        x = x0 = self.dropout(x)
        checkpointing = self.training and self.activation_checkpointing
        skip_every = self.config.rotary_skip_every
        for layer, (block, table) in enumerate(zip_longest(self.blocks, self.value_tables)):
            value_embedding = None if table is None else table(input_ids)  # (B, T, n_kv_head * head_dim)
            layer_cache = None if cache is None else (cache, layer)
            layout = layouts[self.config.is_local(layer)]
            if skip_every is not None and (layer + 1) % skip_every == 0:
                layout = layout._replace(cos_sin=None, key_cos_sin=None)
            x, router_logits = block(x, x0, self.position, layout, value_embedding, layer_cache, checkpointing)
            self._record_router_logits(router_logits)
        out: Tensor = self.norm(x)
        return out

    def _record_router_logits(self, router_logits: Tensor | None) -> None:
        if router_logits is not None and self.recorded_router_logits is not None and torch.is_grad_enabled():
            self.recorded_router_logits.append(router_logits)

    def _add_previous_token(self, x: Tensor, input_ids: Tensor, is_first: Tensor, cache: KVCache | None) -> Tensor:
        """Add the bigram embeddings and apply ``Smear``, each only if it is enabled.

        ``is_first`` is a bool tensor of shape (T,) or (B, T) that is True at the first token of each document.
        """
        if self.bigrams is not None:
            previous = _shift_right(input_ids) if cache is None else cache.shift_right("ids", input_ids)
            x = x + self.bigrams(input_ids, previous, is_first)
        if self.smear is not None:
            previous = _shift_right(x) if cache is None else cache.shift_right("embedding", x)
            x = self.smear(x, previous.masked_fill(is_first[..., None], 0.0))
        return x


def _validate_length(length: int, max_length: int) -> None:
    if length > max_length:
        raise UserError(f"{length} tokens do not fit into a context of {max_length} tokens; shorten the input")


def _shift_right(x: Tensor) -> Tensor:
    """Shift each row right by one token, filling with zeros: (B, T, ...) -> (B, T, ...)."""
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
