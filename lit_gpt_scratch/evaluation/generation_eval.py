"""Evaluate generated continuations: exact match with references, diversity and repetition."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.evaluation import benchmark_rows
from lit_gpt_scratch.evaluation.intervals import Measurements, Metrics, PartIndices
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.generation.streaming import stream_text
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.document import TableRow
from lit_gpt_scratch.text.tokenizer import Tokenizer

BATCH_SIZE: Final = 32
DISTINCT_NGRAMS: Final = (1, 2)
REPETITION_NGRAM: Final = 4
GREEDY: Final = Sampling(temperature=0.0)


@dataclass(frozen=True)
class GenerationExample:
    """Prompt with a reference continuation.

    Attributes:
        where: Source and line of the row, used in error messages.
        prompt: Text to continue.
        reference: Reference continuation.
    """

    where: str
    prompt: str
    reference: str

    @classmethod
    def from_row(cls, row: TableRow) -> "GenerationExample":
        """Read the columns ``prompt`` and ``reference`` of a benchmark row.

        Raises:
            UserError: A column is missing or is not a string.
        """
        return cls(row.where, benchmark_rows.get_text(row, "prompt"), benchmark_rows.get_text(row, "reference"))

    @property
    def text(self) -> str:
        """Prompt and reference as plain text, used to search the training data for contamination."""
        return self.prompt + self.reference


def evaluate_generation(
    model: GPT,
    tokenizer: Tokenizer,
    examples: Sequence[GenerationExample],
    max_new_tokens: int = 200,
    stop: Sequence[str] = (),
) -> Measurements:
    """Generate greedy continuations of prompts, and compare them with the references.

    Args:
        model: The language model, in evaluation mode.
        tokenizer: The model's tokenizer.
        examples: Prompts with reference continuations.
        max_new_tokens: Maximum number of tokens per continuation.
        stop: Strings that end a continuation, in addition to the end-of-text token.

    Returns:
        ``exact_match``, the fraction of continuations equal to the reference, ignoring surrounding whitespace;
        ``distinct_1`` and ``distinct_2``, the fraction of distinct words and word pairs across all continuations (Li et
        al. 2016, https://arxiv.org/abs/1510.03055), which decreases with the number and length of continuations; and
        ``repetition_4``, the mean fraction of 4-grams that already occurred in the same continuation (seq-rep-4 in
        Welleck et al. 2020, https://arxiv.org/abs/1908.04319). Words are separated by whitespace.

    Raises:
        UserError: A prompt is longer than the context.
    """
    for example in examples:
        if (length := 1 + len(tokenizer.encode(example.prompt))) > model.block_size:
            raise UserError(
                f"{example.where}: the prompt has {length} tokens, but the context length is {model.block_size}; "
                "shorten the prompt"
            )
    written = generate_continuations(model, tokenizer, [example.prompt for example in examples], max_new_tokens, stop)
    return compare_with_references(written, [example.reference for example in examples])


def compare_with_references(
    written: Sequence[str], references: Sequence[str], **more: NDArray[np.bool_]
) -> Measurements:
    """Compare generated texts with their references.

    Args:
        written: N generated texts.
        references: N reference texts.
        **more: Additional boolean properties of the generated texts, keyed by name; each has shape (N,).

    Returns:
        The metrics of ``evaluate_generation``, and the fraction of generated texts with each property in ``more``.
    """
    matches = np.array([text.strip() == wanted.strip() for text, wanted in zip(written, references, strict=True)])
    properties = {"exact_match": matches, **more}
    ngrams = {n: [_count_ngrams(text.split(), n) for text in written] for n in (*DISTINCT_NGRAMS, REPETITION_NGRAM)}
    repeated = np.array([1 - len(each) / max(1, each.total()) if each else 0.0 for each in ngrams[REPETITION_NGRAM]])

    def metrics(indices: PartIndices) -> Metrics:
        distinct = {}
        for n in DISTINCT_NGRAMS:
            counts = [ngrams[n][index] for index in indices]
            distinct[f"distinct_{n}"] = len(set().union(*counts)) / max(1, sum(each.total() for each in counts))
        return {
            **{name: float(values[indices].mean()) for name, values in properties.items()},
            **distinct,
            f"repetition_{REPETITION_NGRAM}": float(repeated[indices].mean()),
        }

    limits = dict.fromkeys((*(f"distinct_{n}" for n in DISTINCT_NGRAMS), f"repetition_{REPETITION_NGRAM}"), (0.0, 1.0))
    return Measurements.from_rows(len(written), metrics, frozenset(properties), limits=limits)


def generate_continuations(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str] = ()
) -> list[str]:
    """Generate one greedy continuation per prompt.

    Args:
        model: The language model, in evaluation mode.
        tokenizer: The model's tokenizer.
        prompts: Texts to continue.
        max_new_tokens: Maximum number of tokens per continuation.
        stop: Strings that end a continuation, in addition to the end-of-text token.

    Raises:
        UserError: A prompt is longer than the context.
    """
    found = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    with tqdm(total=len(prompts), desc="generating", unit="", delay=2, leave=False, disable=None) as bar:
        for start in range(0, len(order), BATCH_SIZE):
            indices = order[start : start + BATCH_SIZE]
            given = [prompts[index] for index in indices]
            for row, piece in stream_text(model, tokenizer, given, max_new_tokens, GREEDY, [0] * len(indices), stop):
                found[indices[row]] += piece
                bar.update(not piece)
    return found


def _count_ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
