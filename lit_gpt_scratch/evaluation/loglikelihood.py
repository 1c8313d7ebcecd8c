"""Compute log-likelihoods of continuations in batches, for perplexity, multiple choice and minimal pairs."""

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
"""Maximum number of logits per batch, which take 256 MB in float32, plus 256 MB for the log-softmax."""


@dataclass(frozen=True)
class ScoredSequence:
    """Token sequence whose last ``n_scored`` tokens are scored.

    Attributes:
        ids: Token ids of the context and continuation.
        n_scored: Number of tokens to score at the end of the sequence; the first token is never scored.
    """

    ids: Sequence[int]
    n_scored: int


@dataclass(frozen=True)
class LogLikelihood:
    """Log-likelihood of the scored tokens in a sequence.

    Attributes:
        nats: Sum of the tokens' log-probabilities, in nats.
        greedy: Whether each of the tokens is the most probable token at its position.
    """

    nats: float
    greedy: bool


def encode_continuation(tokenizer: Tokenizer, context: str, continuation: str) -> ScoredSequence:
    """Encode a context, which begins a document, and the continuation to score.

    The context and continuation are encoded as a single string. If the context alone has n tokens, all tokens after
    the first n are scored. As in ``lm-eval``, trailing whitespace is moved from the context to the continuation.

    Raises:
        UserError: The continuation adds no tokens.
    """
    space = len(context) - len(context.rstrip())
    context, continuation = context[: len(context) - space], context[len(context) - space :] + continuation
    read = tokenizer.encode(context)
    scored = tokenizer.encode(context + continuation)[len(read) :]
    if not scored:
        raise UserError(f"{continuation!r} adds no tokens to its context; remove the row")
    return ScoredSequence([tokenizer.start_of_text, *read, *scored], len(scored))


@torch.inference_mode()
def compute_loglikelihoods(
    model: GPT, sequences: Sequence[ScoredSequence], progress: bool = True
) -> list[LogLikelihood]:
    """Compute the log-likelihood of the scored tokens in each sequence.

    Sequences of similar length are batched, and the head is only applied to scored positions.

    Args:
        model: The language model, in evaluation mode.
        sequences: Sequences of at most ``block_size + 1`` tokens; the last token is not an input of the model.
        progress: Whether to show a progress bar if the output is a terminal.
    """
    found: list[LogLikelihood | None] = [None] * len(sequences)
    lengths = [len(sequence.ids) for sequence in sequences]
    sizes = [
        max(len(sequence.ids) / TOKENS_PER_BATCH, sequence.n_scored * model.vocab_size / LOGITS_PER_BATCH)
        for sequence in sequences
    ]
    with tqdm(
        total=len(sequences), desc="scoring", unit="", delay=2, leave=False, disable=None if progress else True
    ) as bar:
        for indices in batch_by_length(lengths, sizes):
            for index, likelihood in zip(
                indices, _score_batch(model, [sequences[index] for index in indices]), strict=True
            ):
                found[index] = likelihood
            bar.update(len(indices))
    return [likelihood for likelihood in found if likelihood is not None]


def batch_by_length(lengths: Sequence[int], sizes: Sequence[float]) -> Iterator[list[int]]:
    """Group sequences of similar length into batches, the longest first, so that out-of-memory errors occur early.

    Args:
        lengths: Length of each sequence.
        sizes: Fraction of a full batch that each sequence takes up. Because of padding, each sequence in a batch counts
            as much as the largest sequence.

    Yields:
        The indices of the sequences in each batch; no batch is empty.
    """
    batch: list[int] = []
    largest = 0.0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        largest = max(largest, sizes[index])
        if batch and (len(batch) + 1) * largest > 1:
            yield batch
            batch, largest = [], sizes[index]
        batch.append(index)
    if batch:
        yield batch


def _score_batch(model: GPT, sequences: Sequence[ScoredSequence]) -> Iterator[LogLikelihood]:
    device = next(model.parameters()).device
    # Sequences are right-padded: no token attends to padding, and padding is not scored.
    inputs = _pad([sequence.ids[:-1] or [0] for sequence in sequences], 0).to(device)  # (B, T)
    labels = _pad([sequence.ids[len(sequence.ids) - sequence.n_scored :] for sequence in sequences], IGNORE_INDEX).to(
        device
    )  # (B, S)
    first = torch.tensor([len(sequence.ids) - 1 - sequence.n_scored for sequence in sequences], device=device)  # (B,)
    positions = first[:, None] + torch.arange(labels.size(1), device=device)  # (B, S)
    x = model.hidden_states(inputs)  # (B, T, n_embd)
    scored = positions.clamp(max=inputs.size(1) - 1)[..., None].expand(-1, -1, x.size(-1))
    logits = model.apply_head(x.gather(1, scored))  # (B, S, vocab_size)
    nats, _ = sequence_logprobs(logits, labels)
    greedy = ((logits.argmax(-1) == labels) | (labels == IGNORE_INDEX)).all(-1)  # (B,)
    return (LogLikelihood(*scores) for scores in zip(nats.tolist(), greedy.tolist(), strict=True))


def _pad(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True, padding_value=fill)
