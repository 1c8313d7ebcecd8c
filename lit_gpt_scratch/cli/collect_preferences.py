"""A person says which of two replies is better, and the file of preferences grows by a line."""

import json
import os
from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, Final

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.evaluation.chat_eval import generate_replies
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.chat_template import ChatTemplate, Message, validate_messages
from lit_gpt_scratch.text.document import is_blank
from lit_gpt_scratch.text.tokenizer import Tokenizer

MAX_ATTEMPTS: Final = 4
"""Times that two replies are drawn until there is something to choose between."""
QUESTION: Final = "Which is better? 1, 2, skip or quit"


def collect_preferences(
    model: GPT,
    tokenizer: Tokenizer,
    system: str | None,
    questions: Iterable[str],
    answers: Iterator[str],
    path: Path,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[str]:
    """Reply twice to each question, ask which reply is better, and add the answer to the file.

    Replies that do not come to their end, are the same or say nothing are drawn again.

    Each answer is on the disk before the next question is asked: whatever ends this, nothing that was said is lost.

    Args:
        model: In evaluation mode.
        tokenizer: The model's.
        system: What the model is told first; None says nothing.
        questions: What is replied to; empty ones are passed over.
        answers: Of the person: ``1``, ``2``, ``skip``, ``quit``, or their first letters.
        path: The file, in lines of JSON: ``prompt``, ``chosen``, ``rejected``.
        max_new_tokens: The longest reply.
        sampling: How to choose tokens.
        seed: Of the first reply into an empty file; each next one has the next. Where there are lines it begins behind
            all that were drawn for them, so that the same command again asks about other pairs.

    Returns:
        What to show, line by line.

    Raises:
        UserError: A question is too long, or the file cannot be written.
    """
    template, told = ChatTemplate(tokenizer), [] if system is None else [Message("system", system)]
    append_line(path, "")  # what cannot be written is better known before there is an answer
    seeds = count(seed + 2 * MAX_ATTEMPTS * _count_lines(path))
    for question in (each.strip() for each in questions if not is_blank(each)):
        messages = [*told, Message("user", question)]
        validate_messages(messages)
        prompt = template.prompt(messages)
        for _ in range(MAX_ATTEMPTS):
            one, two = generate_replies(
                model, tokenizer, [prompt] * 2, max_new_tokens, sampling, list(islice(seeds, 2))
            )
            pair = one.text, two.text
            whole = one.ended and two.ended  # who learns from one that was cut off learns to stop amid a sentence
            if whole and one.text != two.text and not any(map(is_blank, pair)):
                break
        else:
            why = "a higher --temperature" if whole else "more --max_new_tokens, in which they come to their end,"
            yield f"{question}\nThe model has no two replies to choose between here; {why} may help.\n"
            continue
        yield f"{question}\n\n[1] {one.text}\n\n[2] {two.text}\n"
        yield QUESTION
        answer = _parse_answer(answers)
        while answer is None:
            yield QUESTION
            answer = _parse_answer(answers)
        if answer == "q":
            return
        if answer == "s":
            continue
        better = int(answer) - 1
        asked: Any = question if system is None else [vars(message) for message in messages]
        row = {"prompt": asked, "chosen": pair[better], "rejected": pair[1 - better]}
        append_line(path, json.dumps(row, ensure_ascii=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, on the disk before this returns; one that ends amid a line is ended first.

    Raises:
        UserError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read() == b"\n" or not line else "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"argument --rank: {path} cannot be written: {error.strerror}") from error


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _parse_answer(answers: Iterator[str]) -> str | None:
    """``1``, ``2``, ``s`` or ``q``; the end of the input is a way to quit, and anything else is None."""
    said = next(answers, "quit").strip().casefold()
    return said[:1] if said in ("1", "2", "s", "skip", "q", "quit") else None
