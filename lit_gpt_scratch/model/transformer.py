"""The decoder-only transformer: token ids in, logits of the next token out."""

from itertools import zip_longest

import torch
from torch import Tensor, nn

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model.attention import Attention
from lit_gpt_scratch.model.block import Block
from lit_gpt_scratch.model.config import GPTConfig
from lit_gpt_scratch.model.documents import can_use_blocks, documents
from lit_gpt_scratch.model.layers import Bigrams, FeedForward, RMSNorm, Smear
from lit_gpt_scratch.model.positions import build_position


class GPT(nn.Module):
    """A language model from scratch.

    Args:
        config: The architecture.
        vocab_size: Number of token ids.
        block_size: The longest window, in tokens.
    """

    def __init__(self, config: GPTConfig, vocab_size: int, block_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.embedding = nn.Embedding(vocab_size, config.n_embd)
        self.bigrams = Bigrams(config.bigram_rows, config.n_embd) if config.bigram_rows else None
        self.smear = Smear(config.n_embd) if config.smear else None
        self.position = build_position(config, block_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.value_tables = nn.ModuleList(
            nn.Embedding(vocab_size, config.kv_heads * config.head_width)
            for _ in range(config.n_layer if config.value_embeddings else 0)
        )
        self.norm = RMSNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, vocab_size, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw the weights. Whatever writes to the residual stream or to the logits starts at zero.

        Blocks then begin as the identity and the loss as exactly ln(vocab_size): the model starts from
        "I know nothing" instead of unlearning a random opinion (muP and Fixup style, as in modded-nanogpt).
        Token embeddings have unit variance, so that what the blocks learn to add does not soon drown them.
        """
        nn.init.normal_(self.embedding.weight, std=1.0)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for module in self.modules():
            if isinstance(module, Attention | FeedForward):
                nn.init.zeros_(module.output.weight)
        for table in self.value_tables.parameters():
            nn.init.zeros_(table)
        nn.init.zeros_(self.head.weight)

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Logits of the token after each position.

        Args:
            input_ids: (B, T) int64 with T at most ``block_size``.
            document_ids: (B, T) int64, another number for each document of a window: no token then sees another's. By
                default every token sees all before it.

        Returns:
            (B, T, vocab_size) float32.

        Raises:
            UserError: The window is longer than the model's context.
        """
        if input_ids.size(1) > self.block_size:
            raise UserError(f"{input_ids.size(1)} tokens do not fit into a context of {self.block_size}")
        layout = positions = first = None
        if document_ids is not None:
            dense = self.config.dropout > 0 or not can_use_blocks(input_ids.device, self.config.head_width)
            layout = documents(document_ids, dense)
            positions, first = layout.positions, layout.positions == 0
        x = self.position.embed(self.embedding(input_ids), positions)  # (B, T, n_embd)
        if self.bigrams is not None:
            x = x + self.bigrams(input_ids, first)
        if self.smear is not None:
            x = self.smear(x, first)
        x = start = self.dropout(x)
        for block, table in zip_longest(self.blocks, self.value_tables):
            x = block(x, start, self.position, table(input_ids) if table is not None else None, layout)
        logits: Tensor = self.head(self.norm(x)).float()  # (B, T, vocab_size)
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        return logits
