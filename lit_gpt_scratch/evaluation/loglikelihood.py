"""Log-probabilities of ends of sequences, of many at once: what all scores but those of written text are made of."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.losses.cross_entropy import sequence_logprobs
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.tokenizer import Tokenizer

TOKENS_PER_BATCH: Final = 2**14
LOGITS_PER_BATCH: Final = 2**26
"""Of a batch: 256 MB in float32, and as much again for their normalisation."""


@dataclass(frozen=True)
class ScoredSequence:
    """A sequence, the end of which is scored.

    Attributes:
        ids: What is read and what is scored, in one.
        scored: How many of the last ids are scored; not the first.
    """

    ids: Sequence[int]
    scored: int


@dataclass(frozen=True)
class LogLikelihood:
    """What a model says of a tail.

    Attributes:
        nats: Its log-probability, summed.
        greedy: Whether each of its tokens is the likeliest one.
    """

    nats: float
    greedy: bool


def encode_continuation(tokenizer: Tokenizer, context: str, continuation: str) -> ScoredSequence:
    """A continuation behind its context, which begins a document.

    Both are encoded as one text, and what the context alone has as tokens counts as read: as ``lm-eval`` does it, with
    white space that ends the context given to the continuation.

    Raises:
        UserError: The continuation has no token of its own.
    """
    space = len(context) - len(context.rstrip())
    context, continuation = context[: len(context) - space], context[len(context) - space :] + continuation
    read = tokenizer.encode(context)
    scored = tokenizer.encode(context + continuation)[len(read) :]
    if not scored:
        raise UserError(f"{continuation!r} adds no token to what is before it")
    return ScoredSequence([tokenizer.start_of_text, *read, *scored], len(scored))


@torch.inference_mode()
def compute_loglikelihoods(model: GPT, tails: Sequence[ScoredSequence], progress: bool = True) -> list[LogLikelihood]:
    """Score each tail behind what is before it.

    Tails of alike length go together, and only what is scored is put through the head.

    Args:
        model: In evaluation mode; reads tokens.
        tails: Their ids but the last fit into the context.
        progress: Whether a terminal shows a bar.
    """
    found: list[LogLikelihood | None] = [None] * len(tails)
    lengths = [len(tail.ids) for tail in tails]
    sizes = [max(len(tail.ids) / TOKENS_PER_BATCH, tail.scored * model.vocab_size / LOGITS_PER_BATCH) for tail in tails]
    with tqdm(
        total=len(tails), desc="scoring", unit="", delay=2, leave=False, disable=None if progress else True
    ) as bar:
        for places in batch_by_length(lengths, sizes):
            for place, likelihood in zip(places, _score_batch(model, [tails[place] for place in places]), strict=True):
                found[place] = likelihood
            bar.update(len(places))
    return [likelihood for likelihood in found if likelihood is not None]


def batch_by_length(lengths: Sequence[int], sizes: Sequence[float]) -> Iterator[list[int]]:
    """Deal sequences out to batches of alike length, the longest first: what needs most memory fails at once.

    Args:
        lengths: Of each.
        sizes: What share of the largest batch each would fill; all of a batch are filled up to the largest.

    Yields:
        Numbers of sequences, at least one.
    """
    batch: list[int] = []
    largest = 0.0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        largest = max(largest, sizes[place])
        if batch and (len(batch) + 1) * largest > 1:
            yield batch
            batch, largest = [], sizes[place]
        batch.append(place)
    if batch:
        yield batch


def _score_batch(model: GPT, tails: Sequence[ScoredSequence]) -> Iterator[LogLikelihood]:
    device = next(model.parameters()).device
    # Filled up behind the last token: seen by none before it, and not scored.
    inputs = _pad([tail.ids[:-1] or [0] for tail in tails], 0).to(device)  # (B, T)
    labels = _pad([tail.ids[len(tail.ids) - tail.scored :] for tail in tails], IGNORE_INDEX).to(device)  # (B, S)
    first = torch.tensor([len(tail.ids) - 1 - tail.scored for tail in tails], device=device)  # (B,)
    places = first[:, None] + torch.arange(labels.size(1), device=device)  # (B, S)
    x = model.hidden_states(inputs)  # (B, T, n_embd)
    scored = places.clamp(max=inputs.size(1) - 1)[..., None].expand(-1, -1, x.size(-1))
    logits = model.apply_head(x.gather(1, scored))  # (B, S, vocab_size)
    nats, _ = sequence_logprobs(logits, labels)
    greedy = ((logits.argmax(-1) == labels) | (labels == IGNORE_INDEX)).all(-1)  # (B,)
    return (LogLikelihood(*said) for said in zip(nats.tolist(), greedy.tolist(), strict=True))


def _pad(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True, padding_value=fill)
