"""Token generation with a KV cache: prefill all prompts at once, then decode one token per row at each step."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.kernels.compiler_backend import CompilerBackend
from lit_gpt_scratch.kernels.single_row_matmul import single_row_backend
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.attention import build_attention_layout
from lit_gpt_scratch.model.kv_cache import KVCache

DecodeStep = Callable[[Tensor, KVCache], Tensor]


def generate(
    model: GPT,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    end_of_text: int,
    done: Callable[[int, int], bool] | None = None,
    compile: bool = False,
    logprobs: Sequence[list[float]] | None = None,
) -> Iterator[tuple[int, int | None]]:
    """Generate tokens for a batch of prompts, one per row, until every row has ended.

    The tokens of a row depend only on its prompt and seed, up to rounding: the batch size affects the order of
    floating-point additions, which rarely changes a token in float32, but may do so in bfloat16. Keys and values are
    cached. When a row exceeds the context length, generation continues from the last half of its context.

    Args:
        model: The language model, in evaluation mode.
        prompts: Token ids, at least one per prompt; a prompt normally begins with the start-of-text token.
        max_new_tokens: Maximum number of new tokens per row.
        sampling: Sampling parameters.
        seeds: One seed per prompt; the global random state is not used.
        end_of_text: Id of the end-of-text token, which ends a row when it is sampled and is not yielded.
        done: Callback that is called with the index of a prompt and its new token. If it returns True, the row ends
            after that token.
        compile: Whether to compile the decoding step. The first call then takes many seconds, but a single row decodes
            faster afterwards.
        logprobs: One list per prompt, to which the log-probability in nats of each sampled token is appended, including
            the end-of-text token. The log-probability is computed at the sampling temperature, or at temperature 1 for
            greedy decoding, without the repetition penalty, top-k, top-p and min-p.

    Yields:
        The index of a prompt and its next token, or None instead of a token when the row has ended.

    Raises:
        UserError: A prompt is empty or longer than the context, ``max_new_tokens`` is negative, or the compiler fails.
    """
    for prompt in prompts:
        if not 0 < len(prompt) <= model.block_size:
            raise UserError(
                f"the prompt has {len(prompt)} tokens (including the start-of-text token), but the context length "
                f"is {model.block_size}; shorten the prompt"
            )
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    if not prompts or max_new_tokens == 0:
        return ((row, None) for row in range(len(prompts)))
    texts = [list(prompt) for prompt in prompts]
    return _generate(model, texts, max_new_tokens, sampling, seeds, end_of_text, done, compile, logprobs)


@torch.inference_mode()
def _generate(
    model: GPT,
    texts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    end_of_text: int,
    done: Callable[[int, int], bool] | None,
    compile: bool,
    logprobs: Sequence[list[float]] | None,
) -> Iterator[tuple[int, int | None]]:
    rows = list(range(len(texts)))  # prompt index of each row of the batch
    generators = [random.Random(seed) for seed in seeds]
    capacity = max(map(len, texts)) + max_new_tokens
    if compile:  # round up to a power of two, because each cache size is compiled separately
        capacity = 1 << (capacity - 1).bit_length()
    capacity = min(model.block_size, capacity)
    cache, logits = prefill(model, texts, capacity, fixed=compile)
    step = _compiled_step(model, len(texts)) if compile else _eager_step(model)
    seen = _mark_seen_tokens(texts, logits) if sampling.repetition_penalty != 1 else None
    ended: set[int] = set()
    for n in range(1, max_new_tokens + 1):
        tokens = sampling.sample(logits, [generators[row].random() for row in rows], seen)  # (B,)
        if logprobs is not None:
            scaled = (logits / (sampling.temperature or 1.0)).log_softmax(-1)  # (B, vocab_size)
            for row, logprob in zip(rows, scaled.gather(1, tokens[:, None]).flatten().tolist(), strict=True):
                if row not in ended:
                    logprobs[row].append(logprob)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row in ended:
                continue
            if token != end_of_text:
                texts[row].append(token)
                yield row, token
            if token == end_of_text or n == max_new_tokens or (done and done(row, token)):
                ended.add(row)
                yield row, None
        if len(ended) == len(texts):
            return
        if ended.intersection(rows) and not compile:  # a compiled step requires a constant batch size
            active = [index for index, row in enumerate(rows) if row not in ended]
            rows, tokens = [rows[index] for index in active], tokens[active]
            cache.select_rows(active)
            seen = seen[active] if seen is not None else None
        if seen is not None:
            seen.scatter_(1, tokens[:, None], value=True)
        if cache.max_length == model.block_size:
            _truncate_full_rows(model, [[] if row in ended else texts[row] for row in rows], cache)
        logits = step(tokens[:, None], cache)


def prefill(model: GPT, texts: Sequence[list[int]], capacity: int, fixed: bool = False) -> tuple[KVCache, Tensor]:
    """Fill a KV cache with token sequences of different lengths in a single forward pass.

    Args:
        model: The network.
        texts: Token sequences, each with at least one token id.
        capacity: Number of tokens that each row of the cache can hold.
        fixed: Whether to keep tensor shapes constant for a compiled step; see ``KVCache``.

    Returns:
        The cache, and the logits after the last token of each sequence, (B, vocab_size).
    """
    weight = model.embedding.weight
    counts = [len(text) for text in texts]
    # Sequences are right-padded: no token attends to padding, and its cache entries are overwritten later.
    padded = [text + [0] * (max(counts) - len(text)) for text in texts]
    ids = torch.tensor(padded, device=weight.device)  # (B, T)
    cache = KVCache(len(texts), capacity, weight.device, weight.dtype, fixed)
    with torch.compiler.set_stance("force_eager"):  # otherwise, each prompt length would be compiled separately
        x = model.hidden_states(ids, cache=cache, counts=counts)  # (B, T, n_embd)
        last = x[torch.arange(len(counts)), torch.tensor(counts) - 1][:, None]  # (B, 1, n_embd)
        return cache, model.apply_head(last)[:, -1]


def _eager_step(model: GPT) -> DecodeStep:
    """Return an uncompiled function that maps token ids, (B, 1), and a cache to the next logits, (B, vocab_size)."""

    def step(ids: Tensor, cache: KVCache) -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return model.apply_head(model.hidden_states(ids, cache=cache))[:, -1]

    return step


def _compiled_step(model: GPT, rows: int) -> DecodeStep:
    """Return a compiled version of ``_eager_step`` for a fixed cache size and batch size.

    The first call of the returned function takes many seconds.
    """

    def decode(ids: Tensor, layout: Any, cache: KVCache) -> Tensor:
        return model.apply_head(model.forward_blocks(ids, layout, cache))[:, -1]

    on_cpu = model.embedding.weight.device.type == "cpu"
    backend = CompilerBackend(required=True, compile=single_row_backend if rows == 1 and on_cpu else None)
    program = torch.compile(decode, dynamic=False, backend=backend)

    def step(ids: Tensor, cache: KVCache) -> Tensor:
        cache.begin_forward(1)
        logits: Tensor = program(ids, build_attention_layout(model.config, model.position, ids, None, cache), cache)
        cache.end_forward()
        return logits

    return step


def _truncate_full_rows(model: GPT, texts: list[list[int]], cache: KVCache) -> None:
    """Recompute the cache of each full row from the last half of its context, excluding the newest token."""
    half = max(1, model.block_size // 2)
    for row, text in enumerate(texts):
        if cache.lengths[row] == model.block_size:
            cache.clear_row(row)
            if kept := text[-half:-1]:
                cache.replace_row(row, prefill(model, [kept], cache.capacity)[0])


def _mark_seen_tokens(texts: Sequence[list[int]], logits: Tensor) -> Tensor:
    """Return a mask of the tokens that occur in each sequence, (B, vocab_size) bool."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, text in enumerate(texts):
        seen[row, text] = True
    return seen
