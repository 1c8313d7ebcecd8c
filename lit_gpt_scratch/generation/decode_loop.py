"""Token generation with a KV cache: prefill a batch of prompts at once, then decode one token per row at each step."""

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.kernels.compiler_backend import CompilerBackend
from lit_gpt_scratch.kernels.single_row_matmul import single_row_backend
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.attention import Attention, build_attention_layouts
from lit_gpt_scratch.model.attention_registry import resolve_attention_class
from lit_gpt_scratch.model.kv_cache import KVCache
from lit_gpt_scratch.model.local_shard import device_of

DecodeStep = Callable[[Tensor, KVCache], Tensor]
MAX_BATCH_ROWS: Final = 64
"""Maximum number of prompts that are decoded at the same time."""
MAX_CACHE_BYTES: Final = 2**30
"""Maximum size of the KV cache in bytes; the cache of a batch with a single row may be larger."""


def generate(
    model: GPT,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    end_of_text: int | Collection[int],
    done: Callable[[int, int], bool] | None = None,
    compile: bool = False,
    logprobs: Sequence[list[float]] | None = None,
    sink_tokens: int | None = None,
) -> Iterator[tuple[int, int | None]]:
    """Generate tokens for any number of prompts, one per row, until every row has ended.

    The prompts are processed in consecutive batches, so that memory does not grow with their number; a batch has at
    most ``MAX_BATCH_ROWS`` rows and ``MAX_CACHE_BYTES`` of cache. The tokens of a row depend only on its prompt and
    seed, up to rounding: the batch size affects the order of floating-point additions, which rarely changes a token in
    float32, but may do so in bfloat16. Keys and values are cached. When a row exceeds the context length, generation
    continues from the last half of its context, which is encoded again, or with a rolling cache (``sink_tokens``).

    Args:
        model: The language model, in evaluation mode.
        prompts: Token ids, at least one per prompt; a prompt normally begins with the start-of-text token.
        max_new_tokens: Maximum number of new tokens per row.
        sampling: Sampling parameters.
        seeds: One seed per prompt; the global random state is not used.
        end_of_text: Id of the end-of-text token, or ids of several such tokens. When one of them is sampled, the row
            ends, and the token is not yielded.
        done: Callback that is called with the index of a prompt and its new token. If it returns True, the row ends
            after that token.
        compile: Whether to compile the decoding step. The first call then takes many seconds, but a single row decodes
            faster afterwards.
        logprobs: If given, one list per prompt, to which the log-probability of each sampled token in nats is appended,
            including that of the end-of-text token. Log-probabilities are computed at the sampling temperature (1 for
            greedy decoding), before the repetition penalty, top-k, top-p and min-p are applied.
        sink_tokens: If given, a row that exceeds the context length continues with a rolling cache of its first
            ``sink_tokens`` tokens and its most recent tokens (StreamingLLM, https://arxiv.org/abs/2309.17453); see
            ``KVCache``. The authors keep 4 sink tokens; 0 keeps only the most recent tokens. Within the context, the
            output does not depend on it.

    Yields:
        The index of a prompt and its next token, or None instead of a token when the row has ended.

    Raises:
        UserError: A prompt is empty or longer than the context, ``max_new_tokens`` is negative, ``sink_tokens`` is out
            of range or not supported by the model, or the compiler fails.
    """
    for prompt in prompts:
        if not 0 < len(prompt) <= model.block_size:
            raise UserError(
                f"the prompt has {len(prompt)} tokens (including the start-of-text token), but the context length "
                f"is {model.block_size}; shorten the prompt"
            )
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    if sink_tokens is not None:
        _validate_sink_tokens(model, sink_tokens)
    if not prompts or max_new_tokens == 0:
        return ((row, None) for row in range(len(prompts)))
    ends = {end_of_text} if isinstance(end_of_text, int) else set(end_of_text)
    return _generate(model, prompts, max_new_tokens, sampling, seeds, ends, done, compile, logprobs, sink_tokens)


def _validate_sink_tokens(model: GPT, sink_tokens: int) -> None:
    if not 0 <= sink_tokens < model.block_size:
        raise UserError(
            f"sink_tokens is {sink_tokens}; it must be 0 or more, and below the context length, {model.block_size}"
        )
    if model.position.embeds_positions:
        raise UserError(
            f"sink_tokens is {sink_tokens}, but the model has {model.config.position} positions, which cached tokens "
            f"cannot change when they move in a rolling cache; omit sink_tokens"
        )
    if resolve_attention_class(model.config.attention).forward is not Attention.forward:
        raise UserError(
            f"sink_tokens is {sink_tokens}, but {model.config.attention} defines forward, which may cache keys that "
            f"are already rotated; omit sink_tokens"
        )


def max_batch_rows(model: GPT, capacity: int) -> int:
    """Return the maximum number of prompts per batch if the KV cache has ``capacity`` tokens for each prompt."""
    attentions = [module for module in model.blocks.modules() if isinstance(module, Attention)]
    shapes = [shape for attention in attentions for shape in attention.cache_shapes()]
    row_bytes = sum(heads * width for heads, width in shapes) * capacity * model.embedding.weight.element_size()
    return max(1, min(MAX_BATCH_ROWS, MAX_CACHE_BYTES // row_bytes))


@torch.inference_mode()
def _generate(
    model: GPT,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    ends: set[int],
    done: Callable[[int, int], bool] | None,
    compile: bool,
    logprobs: Sequence[list[float]] | None,
    sink_tokens: int | None,
) -> Iterator[tuple[int, int | None]]:
    capacity = max(map(len, prompts)) + max_new_tokens
    if compile:  # round up to a power of two, because each cache size is compiled separately
        capacity = 1 << (capacity - 1).bit_length()
    capacity = min(model.block_size, capacity)
    if capacity < model.block_size:  # no row exceeds the context, so that nothing rolls
        sink_tokens = None
    size = min(len(prompts), max_batch_rows(model, capacity))
    step = _compiled_step(model, size) if compile else _eager_step(model)
    for first in range(0, len(prompts), size):
        rows = list(range(first, min(first + size, len(prompts))))  # prompt index of each row of the batch
        texts = {row: list(prompts[row]) for row in rows}
        generators = {row: random.Random(seeds[row]) for row in rows}
        ended: set[int] = set()
        if compile:  # a compiled step requires a constant batch size: fill the last batch with rows that have ended
            for row in range(len(prompts), first + size):
                rows.append(row)
                texts[row], generators[row] = list(prompts[-1]), random.Random(0)
                ended.add(row)
        cache, logits = prefill(model, [texts[row] for row in rows], capacity, compile, sink_tokens)
        seen = _mark_seen_tokens([texts[row] for row in rows], logits) if sampling.repetition_penalty != 1 else None
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
                if token not in ends:
                    texts[row].append(token)
                    yield row, token
                if token in ends or n == max_new_tokens or (done and done(row, token)):
                    ended.add(row)
                    yield row, None
            if len(ended) == len(texts):
                break
            if ended.intersection(rows) and not compile:
                active = [index for index, row in enumerate(rows) if row not in ended]
                rows, tokens = [rows[index] for index in active], tokens[active]
                cache.select_rows(active)
                seen = seen[active] if seen is not None else None
            if seen is not None:
                seen.scatter_(1, tokens[:, None], value=True)
            if sink_tokens is None and cache.max_length == model.block_size:
                _truncate_full_rows(model, [[] if row in ended else texts[row] for row in rows], cache)
            logits = step(tokens[:, None], cache)
            for index, row in enumerate(rows):
                length = cache.lengths[index]
                if row not in ended and length <= capacity and model.position.changes_at(length):
                    encoded, own = prefill(model, [texts[row][-length:]], capacity, sink_tokens=sink_tokens)
                    cache.replace_row(index, encoded)
                    logits = torch.cat((logits[:index], own, logits[index + 1 :]))


def prefill(
    model: GPT, texts: Sequence[list[int]], capacity: int, fixed: bool = False, sink_tokens: int | None = None
) -> tuple[KVCache, Tensor]:
    """Fill a KV cache with token sequences of different lengths in a single forward pass.

    Args:
        model: The network.
        texts: Token sequences, each with at least one token id.
        capacity: Number of tokens that each row of the cache can hold.
        fixed: Whether to keep tensor shapes constant for a compiled step; see ``KVCache``.
        sink_tokens: Number of sink tokens of a rolling cache, or None for a cache that does not roll.

    Returns:
        The cache, and the logits after the last token of each sequence, of shape (B, vocab_size).
    """
    weight = model.embedding.weight
    device = device_of(weight)
    counts = [len(text) for text in texts]
    # Sequences are right-padded: no token attends to padding, and its cache entries are overwritten later.
    padded = [text + [0] * (max(counts) - len(text)) for text in texts]
    ids = torch.tensor(padded, device=device)  # (B, T)
    cache = KVCache(len(texts), capacity, device, weight.dtype, fixed, sink_tokens)
    with torch.compiler.set_stance("force_eager"):  # otherwise, each prompt length would be compiled separately
        x = model.hidden_states(ids, cache=cache, counts=counts)  # (B, T, n_embd)
        if fixed:
            cache.mark_static()
        last = x[torch.arange(len(counts)), torch.tensor(counts) - 1][:, None]  # (B, 1, n_embd)
        return cache, model.apply_head(last)[:, -1]


def _eager_step(model: GPT) -> DecodeStep:
    """Return an uncompiled function that computes the next logits from token ids and a cache.

    The ids have shape (B, 1), and the logits have shape (B, vocab_size).
    """

    def step(ids: Tensor, cache: KVCache) -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return model.apply_head(model.hidden_states(ids, cache=cache))[:, -1]

    return step


_inductor = CompilerBackend(required=True)
_single_row_cpu = CompilerBackend(required=True, compile=single_row_backend)


def _compiled_step(model: GPT, rows: int) -> DecodeStep:
    """Return a compiled version of ``_eager_step`` for a fixed cache size and batch size.

    The first call of the returned function takes many seconds.
    """

    def decode(ids: Tensor, layouts: Any, cache: KVCache) -> Tensor:
        return model.apply_head(model.forward_blocks(ids, layouts, cache))[:, -1]

    on_cpu = device_of(model.embedding.weight).type == "cpu"
    program = torch.compile(decode, dynamic=False, backend=_single_row_cpu if rows == 1 and on_cpu else _inductor)

    def step(ids: Tensor, cache: KVCache) -> Tensor:
        cache.begin_forward(1)
        layouts = build_attention_layouts(model.config, model.position, ids, None, cache)
        logits: Tensor = program(ids, layouts, cache)
        cache.end_forward()
        return logits

    return step


def _truncate_full_rows(model: GPT, texts: list[list[int]], cache: KVCache) -> None:
    """Recompute the cache of each row that fills its context, from the last half of the context.

    The newest token is excluded, because the next decoding step appends it to the cache.
    """
    half = max(1, model.block_size // 2)
    for row, text in enumerate(texts):
        if cache.lengths[row] == model.block_size:
            cache.clear_row(row)
            if kept := text[-half:-1]:
                cache.replace_row(row, prefill(model, [kept], cache.capacity)[0])


def _mark_seen_tokens(texts: Sequence[list[int]], logits: Tensor) -> Tensor:
    """Return a mask of the tokens that occur in each sequence, bool tensor of shape (B, vocab_size)."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, text in enumerate(texts):
        seen[row, text] = True
    return seen
