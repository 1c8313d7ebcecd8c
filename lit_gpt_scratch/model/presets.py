"""Architecture presets: published model families, and three small models that can be trained on a laptop."""

from dataclasses import replace
from typing import Final

from lit_gpt_scratch.model.config import GPTConfig

# The published config files set dropout to 0.1. The presets set it to 0, because loading the weights does not depend on
# dropout and runs of one or two epochs do not overfit. Enable dropout for small datasets.
_GPT2: Final = GPTConfig(
    n_layer=12, n_head=12, n_embd=768, qk_norm=False, position="learned", norm="layernorm",
    norm_eps=1e-5, bias=True, feed_forward="gelu", tied_embeddings=True, dropout=0.0, initialisation="gpt2",
)  # fmt: skip

_LLAMA3: Final = GPTConfig(
    n_layer=32, n_head=32, n_embd=4096, n_kv_head=8, head_dim=128, ffn_dim=14_336, qk_norm=False, rotary_base=500_000.0,
    rotary_scaling="llama3", rotary_factor=8.0, rotary_trained_context=8192, rotary_slow=1.0, rotary_fast=4.0,
    norm_eps=1e-5, initialisation="normal",
)  # fmt: skip

_QWEN3: Final = GPTConfig(
    n_layer=36, n_head=32, n_embd=4096, n_kv_head=8, head_dim=128, ffn_dim=12_288, rotary_base=1_000_000.0,
    initialisation="normal",
)  # fmt: skip

_GEMMA2: Final = GPTConfig(
    n_layer=26, n_head=8, n_embd=2304, n_kv_head=4, head_dim=256, ffn_dim=9216, attention_softcap=50.0,
    sliding_window=4096, sliding_window_pattern=2, qk_norm=False, norm="zero_centered_rmsnorm",
    norm_placement="sandwich", feed_forward="geglu", tied_embeddings=True, scaled_embeddings=True, logit_softcap=30.0,
    initialisation="normal",
)  # fmt: skip

PRESETS: Final[dict[str, GPTConfig]] = {
    "nano": GPTConfig(n_layer=4, n_head=2, n_embd=128),
    "micro": GPTConfig(n_layer=5, n_head=4, n_embd=256),
    "mini": GPTConfig(n_layer=10, n_head=6, n_embd=384),
    "gpt2_124m": _GPT2,
    "gpt2_350m": replace(_GPT2, n_layer=24, n_head=16, n_embd=1024),
    "gpt2_774m": replace(_GPT2, n_layer=36, n_head=20, n_embd=1280),
    "gpt2_1558m": replace(_GPT2, n_layer=48, n_head=25, n_embd=1600),
    "llama3_1b": replace(
        _LLAMA3, n_layer=16, n_embd=2048, head_dim=64, ffn_dim=8192, rotary_factor=32.0, tied_embeddings=True
    ),
    "llama3_8b": _LLAMA3,
    "llama3_70b": replace(_LLAMA3, n_layer=80, n_head=64, n_embd=8192, ffn_dim=28_672),
    "qwen3_0.6b": replace(_QWEN3, n_layer=28, n_head=16, n_embd=1024, ffn_dim=3072, tied_embeddings=True),
    "qwen3_1.7b": replace(_QWEN3, n_layer=28, n_head=16, n_embd=2048, ffn_dim=6144, tied_embeddings=True),
    "qwen3_8b": _QWEN3,
    "qwen3_moe_30b": replace(
        _QWEN3, n_layer=48, n_embd=2048, n_kv_head=4, feed_forward="moe", ffn_dim=768, n_experts=128,
        experts_per_token=8,
    ),
    "mixtral_8x7b": GPTConfig(
        n_layer=32, n_head=32, n_embd=4096, n_kv_head=8, feed_forward="moe", ffn_dim=14_336, n_experts=8,
        experts_per_token=2, qk_norm=False, rotary_base=1_000_000.0, norm_eps=1e-5,
        initialisation="normal",
    ),
    "qwen2.5_0.5b": GPTConfig(
        n_layer=24, n_head=14, n_embd=896, n_kv_head=2, ffn_dim=4864, qk_norm=False, qkv_bias=True,
        rotary_base=1_000_000.0, tied_embeddings=True, initialisation="normal",
    ),
    "olmo2_1b": GPTConfig(
        n_layer=16, n_head=16, n_embd=2048, ffn_dim=8192, qk_norm_joint=True, rotary_base=500_000.0,
        norm_placement="output", initialisation="normal",
    ),
    "smollm3_3b": GPTConfig(
        n_layer=36, n_head=16, n_embd=2048, n_kv_head=4, ffn_dim=11_008, qk_norm=False, rotary_base=5_000_000.0,
        rotary_skip_every=4, tied_embeddings=True, initialisation="normal",
    ),
    "phi3_mini": GPTConfig(
        n_layer=32, n_head=32, n_embd=3072, ffn_dim=8192, sliding_window=2047, qk_norm=False, norm_eps=1e-5,
        initialisation="normal",
    ),
    "gpt_oss_20b": GPTConfig(
        n_layer=24, n_head=64, n_embd=2880, n_kv_head=8, head_dim=64, attention_sinks=True, sliding_window=128,
        sliding_window_pattern=2, qk_norm=False, rotary_base=150_000.0, rotary_scaling="yarn", rotary_factor=32.0,
        rotary_trained_context=4096, rotary_truncate=False, norm_eps=1e-5, bias=True, feed_forward="moe", ffn_dim=2880,
        n_experts=32, experts_per_token=4, expert_activation="clamped_swiglu", initialisation="normal",
    ),
    "gemma2_2b": _GEMMA2,
    "gemma3_1b": replace(
        _GEMMA2, n_head=4, n_embd=1152, n_kv_head=1, ffn_dim=6912, attention_softcap=None, sliding_window=512,
        sliding_window_pattern=6, qk_norm=True, rotary_base=1_000_000.0, rotary_local_base=10_000.0, logit_softcap=None,
    ),
}  # fmt: skip
"""Architectures, keyed by preset name.

Parameter counts for the published vocabulary size and, if positions are learned, the published context length:

- ``nano``, ``micro`` and ``mini``: 0.8, 3.9 and 17.7 million parameters in the blocks. These presets use the default
  architecture, a small Qwen3 model; the embedding and the head add ``2 * vocab_size * n_embd`` parameters.
- ``gpt2_124m`` 124,439,808, ``gpt2_350m`` 354,823,168, ``gpt2_774m`` 774,030,080, ``gpt2_1558m`` 1,557,611,200, with a
  vocabulary of 50,257 tokens and a context of 1024 tokens (Radford et al. 2019, https://github.com/openai/gpt-2).
- ``llama3_1b`` 1,235,814,400 (Llama 3.2), ``llama3_8b`` 8,030,261,248 and ``llama3_70b`` 70,553,706,496 (Llama 3.1,
  https://arxiv.org/abs/2407.21783), with a vocabulary of 128,256 tokens and a context extended to 131,072 tokens.
- ``qwen3_0.6b`` 596,049,920, ``qwen3_1.7b`` 1,720,574,976, ``qwen3_8b`` 8,190,735,360 and ``qwen3_moe_30b``
  30,532,122,624, of which a token uses 3,353,032,704 (Qwen3-30B-A3B), with a vocabulary of 151,936 tokens
  (https://arxiv.org/abs/2505.09388).
- ``mixtral_8x7b`` 46,702,792,704, of which a token uses 12,879,925,248, with a vocabulary of 32,000 tokens
  (https://arxiv.org/abs/2401.04088).
- ``qwen2.5_0.5b`` 494,032,768, with the same vocabulary (https://arxiv.org/abs/2412.15115).
- ``olmo2_1b`` 1,484,916,736, with a vocabulary of 100,352 tokens (https://arxiv.org/abs/2501.00656).
- ``smollm3_3b`` 3,075,098,624, with Llama 3's vocabulary (https://huggingface.co/HuggingFaceTB/SmolLM3-3B).
- ``phi3_mini`` 3,821,079,552, with a vocabulary of 32,064 tokens and a context of 4,096 tokens
  (https://arxiv.org/abs/2404.14219).
- ``gpt_oss_20b`` 20,914,757,184, of which a token uses 4,187,440,704, with a vocabulary of 201,088 tokens and a context
  extended to 131,072 tokens (https://arxiv.org/abs/2508.10925).
- ``gemma2_2b`` 2,614,341,888, with a vocabulary of 256,000 tokens (https://arxiv.org/abs/2408.00118).
- ``gemma3_1b`` 999,885,952, with a vocabulary of 262,144 tokens (https://arxiv.org/abs/2503.19786).

A different vocabulary size or ``vocab_multiple`` changes only the embedding and the head. The published families use
the ``initialisation`` of their authors when they are trained from scratch.
"""
