"""What a model writes after a prompt, beside what should have come, and how much it repeats itself."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.evaluation import jsonl
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
    """A prompt and what should follow it.

    Attributes:
        where: Its place.
        prompt: What is given.
        reference: What should come.
    """

    where: str
    prompt: str
    reference: str

    @classmethod
    def from_row(cls, row: TableRow) -> "GenerationExample":
        """Of the columns ``prompt`` and ``reference``.

        Raises:
            UserError: One is missing or is no text.
        """
        return cls(row.where, jsonl.get_text(row, "prompt"), jsonl.get_text(row, "reference"))

    @property
    def text(self) -> str:
        """As it would stand in a corpus."""
        return self.prompt + self.reference


def evaluate_generation(
    model: GPT,
    tokenizer: Tokenizer,
    exercises: Sequence[GenerationExample],
    max_new_tokens: int = 200,
    stop: Sequence[str] = (),
) -> Measurements:
    """Let the model go on greedily, to the end of the text, a stop string or ``max_new_tokens``.

    Returns:
        ``exact_match``, a share, white space around both texts not counted; ``distinct_1`` and ``distinct_2``, of all
        words and pairs of words in all continuations together the share that differ (Li et al. 2016,
        https://arxiv.org/abs/1510.03055), which falls with the number of texts and their length; ``repetition_4``, of
        a continuation's runs of four words the share that it has had before, on average (seq-rep-4 of Welleck et al.
        2020, https://arxiv.org/abs/1908.04319). Words are what white space parts.

    Raises:
        UserError: A prompt is longer than the context.
    """
    for exercise in exercises:
        if (length := 1 + len(tokenizer.encode(exercise.prompt))) > model.block_size:
            raise UserError(f"{exercise.where}: its prompt has {length} tokens, the context holds {model.block_size}")
    written = generate_continuations(
        model, tokenizer, [exercise.prompt for exercise in exercises], max_new_tokens, stop
    )
    return compare_with_references(written, [exercise.reference for exercise in exercises])


def compare_with_references(
    written: Sequence[str], references: Sequence[str], **more: NDArray[np.bool_]
) -> Measurements:
    """What is said of texts that were written, beside those that should have been.

    Args:
        written: What was.
        references: What should have been.
        **more: More that is true of a text or not, (n,) each, by its name.

    Returns:
        What ``evaluate_generation`` returns, and the share of which each of ``more`` is true.
    """
    matches = np.array([text.strip() == wanted.strip() for text, wanted in zip(written, references, strict=True)])
    true = {"exact_match": matches, **more}
    runs = {n: [_count_ngrams(text.split(), n) for text in written] for n in (*DISTINCT_NGRAMS, REPETITION_NGRAM)}
    repeated = np.array([1 - len(has) / max(1, has.total()) if has else 0.0 for has in runs[REPETITION_NGRAM]])

    def metrics(places: PartIndices) -> Metrics:
        distinct = {}
        for n in DISTINCT_NGRAMS:
            of = [runs[n][place] for place in places]
            distinct[f"distinct_{n}"] = len(set().union(*of)) / max(1, sum(has.total() for has in of))
        return {
            **{name: float(of[places].mean()) for name, of in true.items()},
            **distinct,
            f"repetition_{REPETITION_NGRAM}": float(repeated[places].mean()),
        }

    limits = dict.fromkeys((*(f"distinct_{n}" for n in DISTINCT_NGRAMS), f"repetition_{REPETITION_NGRAM}"), (0.0, 1.0))
    return Measurements.from_rows(len(written), metrics, frozenset(true), limits=limits)


def generate_continuations(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str] = ()
) -> list[str]:
    """What the model writes after each prompt, always its likeliest token.

    Raises:
        UserError: A prompt is longer than the context.
    """
    found = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    with tqdm(total=len(prompts), desc="writing", unit="", delay=2, leave=False, disable=None) as bar:
        for start in range(0, len(order), BATCH_SIZE):
            places = order[start : start + BATCH_SIZE]
            given = [prompts[place] for place in places]
            for row, piece in stream_text(model, tokenizer, given, max_new_tokens, GREEDY, [0] * len(places), stop):
                found[places[row]] += piece
                bar.update(not piece)
    return found


def _count_ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
