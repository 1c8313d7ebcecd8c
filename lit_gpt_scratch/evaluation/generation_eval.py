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
from lit_gpt_scratch.evaluation.intervals import Figures, Measured, Places
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.generation.streaming import write
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.document import TableRow
from lit_gpt_scratch.text.tokenizer import Tokenizer

ROWS_AT_ONCE: Final = 32
DISTINCT: Final = (1, 2)
REPEATED: Final = 4
GREEDY: Final = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Exercise:
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
    def of(cls, row: TableRow) -> "Exercise":
        """Of the columns ``prompt`` and ``reference``.

        Raises:
            UserError: One is missing or is no text.
        """
        return cls(row.where, jsonl.text(row, "prompt"), jsonl.text(row, "reference"))

    @property
    def text(self) -> str:
        """As it would stand in a corpus."""
        return self.prompt + self.reference


def measure(
    model: GPT,
    tokenizer: Tokenizer,
    exercises: Sequence[Exercise],
    max_new_tokens: int = 200,
    stop: Sequence[str] = (),
) -> Measured:
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
    written = continuations(model, tokenizer, [exercise.prompt for exercise in exercises], max_new_tokens, stop)
    return beside(written, [exercise.reference for exercise in exercises])


def beside(written: Sequence[str], references: Sequence[str], **more: NDArray[np.bool_]) -> Measured:
    """What is said of texts that were written, beside those that should have been.

    Args:
        written: What was.
        references: What should have been.
        **more: More that is true of a text or not, (n,) each, by its name.

    Returns:
        What ``measure`` returns, and the share of which each of ``more`` is true.
    """
    matches = np.array([text.strip() == wanted.strip() for text, wanted in zip(written, references, strict=True)])
    true = {"exact_match": matches, **more}
    runs = {n: [_runs(text.split(), n) for text in written] for n in (*DISTINCT, REPEATED)}
    repeated = np.array([1 - len(has) / max(1, has.total()) if has else 0.0 for has in runs[REPEATED]])

    def figures(places: Places) -> Figures:
        distinct = {}
        for n in DISTINCT:
            of = [runs[n][place] for place in places]
            distinct[f"distinct_{n}"] = len(set().union(*of)) / max(1, sum(has.total() for has in of))
        return {
            **{name: float(of[places].mean()) for name, of in true.items()},
            **distinct,
            f"repetition_{REPEATED}": float(repeated[places].mean()),
        }

    limits = dict.fromkeys((*(f"distinct_{n}" for n in DISTINCT), f"repetition_{REPEATED}"), (0.0, 1.0))
    return Measured.of_rows(len(written), figures, frozenset(true), limits=limits)


def continuations(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str] = ()
) -> list[str]:
    """What the model writes after each prompt, always its likeliest token.

    Raises:
        UserError: A prompt is longer than the context.
    """
    found = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    with tqdm(total=len(prompts), desc="writing", unit="", delay=2, leave=False, disable=None) as bar:
        for start in range(0, len(order), ROWS_AT_ONCE):
            places = order[start : start + ROWS_AT_ONCE]
            given = [prompts[place] for place in places]
            for row, piece in write(model, tokenizer, given, max_new_tokens, GREEDY, [0] * len(places), stop):
                found[places[row]] += piece
                bar.update(not piece)
    return found


def _runs(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
