"""The loop that writes: prompts are read at once, then every row gets one token after the other."""

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.generation.compiled_step import DecodeStep, compile_decode_step
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.kv_cache import KVCache


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
    """Continue prompts side by side, until each document ends.

    A row's text depends on its own prompt and seed, and not on its neighbours but for the order in which numbers are
    added: in float32 it hardly ever decides between two tokens, in bfloat16 it does. What a row has of keys and values
    is kept; when a text outgrows the context, the model goes on with the last half of it.

    Args:
        model: In evaluation mode.
        prompts: Ids to continue; at least one each, so begin with the token that stands before documents.
        max_new_tokens: Stop after so many in a row.
        sampling: How to choose.
        seeds: One a prompt; the global random state is left alone.
        end_of_text: A row ends when this token is chosen; it is not given.
        done: Whether a prompt's row ends with this token, which is given all the same.
        compile: Compile the step from token to token: many seconds at first. A single row is then written faster.
        logprobs: A list a prompt, to which the log-probability of each of its tokens is added, in nats, the end's too:
            at the sampling's temperature, before anything is left out (1 where the temperature is 0).

    Returns:
        The number of a prompt, and its next token; None when it has ended.

    Raises:
        UserError: A prompt is empty or longer than the context, or ``max_new_tokens`` is negative.
    """
    for prompt in prompts:
        if not 0 < len(prompt) <= model.block_size:
            raise UserError(
                f"the prompt has {len(prompt)} tokens (with the start of text), the context holds {model.block_size}; "
                f"shorten the prompt"
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
    rows = list(range(len(texts)))  # the prompt of each row of the batch
    dice = [random.Random(seed) for seed in seeds]
    slots = max(map(len, texts)) + max_new_tokens
    if compile:  # few different sizes, each of which is compiled anew
        slots = 1 << (slots - 1).bit_length()
    slots = min(model.block_size, slots)
    cache, logits = prefill(model, texts, slots, fixed=compile)
    step = compile_decode_step(model, len(texts)) if compile else _eager_step(model)
    seen = _mark_seen_tokens(texts, logits) if sampling.repetition_penalty != 1 else None
    ended: set[int] = set()
    for n in range(1, max_new_tokens + 1):
        tokens = sampling.sample(logits, [dice[row].random() for row in rows], seen)  # (B,)
        if logprobs is not None:
            sharp = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
            for row, chance in zip(rows, sharp.gather(1, tokens[:, None]).flatten().tolist(), strict=True):
                if row not in ended:
                    logprobs[row].append(chance)
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
        if ended.intersection(rows) and not compile:  # compiled, the batch keeps its shape
            going_on = [place for place, row in enumerate(rows) if row not in ended]
            rows, tokens = [rows[place] for place in going_on], tokens[going_on]
            cache.select_rows(going_on)
            seen = seen[going_on] if seen is not None else None
        if seen is not None:
            seen.scatter_(1, tokens[:, None], value=True)
        if cache.max_length == model.block_size:
            _truncate_full_rows(model, [[] if row in ended else texts[row] for row in rows], cache)
        logits = step(tokens[:, None], cache)


def prefill(model: GPT, texts: Sequence[list[int]], slots: int, fixed: bool = False) -> tuple[KVCache, Tensor]:
    """Read texts of uneven lengths at once.

    Args:
        model: The network.
        texts: Ids, at least one each.
        slots: Tokens that each row of the cache shall hold.
        fixed: As for the cache.

    Returns:
        The cache, and the logits after each text, (B, vocab_size).
    """
    weight = model.embedding.weight
    counts = [len(text) for text in texts]
    # Filled up behind, where no token of the text looks; what is written there is written over later.
    filled = [text + [0] * (max(counts) - len(text)) for text in texts]
    ids = torch.tensor(filled, device=weight.device)  # (B, T)
    cache = KVCache(len(texts), slots, weight.device, weight.dtype, fixed)
    with torch.compiler.set_stance("force_eager"):  # prompts of ever new lengths would be compiled anew each
        x = model.hidden_states(ids, cache=cache, counts=counts)  # (B, T, n_embd)
        last = x[torch.arange(len(counts)), torch.tensor(counts) - 1][:, None]  # (B, 1, n_embd)
        return cache, model.apply_head(last)[:, -1]


def _eager_step(model: GPT) -> DecodeStep:
    """Ids (B, 1) and a cache -> logits after them, (B, vocab_size)."""

    def step(ids: Tensor, cache: KVCache) -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return model.apply_head(model.hidden_states(ids, cache=cache))[:, -1]

    return step


def _truncate_full_rows(model: GPT, texts: list[list[int]], cache: KVCache) -> None:
    """Where a row is full, read the last half of its text anew; its last token, which comes next, not yet."""
    half = max(1, model.block_size // 2)
    for row, text in enumerate(texts):
        if cache.lengths[row] == model.block_size:
            cache.clear_row(row)
            if kept := text[-half:-1]:
                cache.replace_row(row, prefill(model, [kept], cache.capacity)[0])


def _mark_seen_tokens(texts: Sequence[list[int]], logits: Tensor) -> Tensor:
    """Which tokens each text has: (B, vocab_size) bool."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, text in enumerate(texts):
        seen[row, text] = True
    return seen
