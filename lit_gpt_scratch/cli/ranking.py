"""A person says which of two replies is better, and the file of preferences grows by a line."""

import json
import os
from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, Final

from lit_gpt_scratch.decoding.sampling import Sampling
from lit_gpt_scratch.decoding.writing import write
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.chat import Message, Template, refuse_messages
from lit_gpt_scratch.text.document import blank
from lit_gpt_scratch.text.tokenizer import Tokenizer

DRAWS: Final = 4
"""Times that two replies are drawn until they differ."""
ASKED: Final = "Which is better? 1, 2, skip or quit"


def rank(
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
        seed: Of the first reply; each next one has the next.

    Returns:
        What to show, line by line.

    Raises:
        UserError: A question is too long, or the file cannot be written.
    """
    template, told, seeds = Template(tokenizer), [] if system is None else [Message("system", system)], count(seed)
    append(path, "")  # what cannot be written is better known before there is an answer
    for question in (each.strip() for each in questions if not blank(each)):
        messages = [*told, Message("user", question)]
        refuse_messages(messages)
        for _ in range(DRAWS):
            replies = ["", ""]
            given = [template.prompt(messages)] * 2
            for row, piece in write(model, tokenizer, given, max_new_tokens, sampling, list(islice(seeds, 2))):
                replies[row] += piece
            if replies[0] != replies[1] and not any(map(blank, replies)):
                break
        else:
            yield f"{question}\nThe model has nothing to choose between here; a higher --temperature may help.\n"
            continue
        yield f"{question}\n\n[1] {replies[0]}\n\n[2] {replies[1]}\n"
        yield ASKED
        answer = _understood(answers)
        while answer is None:
            yield ASKED
            answer = _understood(answers)
        if answer == "q":
            return
        if answer == "s":
            continue
        better = int(answer) - 1
        prompt: Any = question if system is None else [vars(message) for message in messages]
        pair = {"prompt": prompt, "chosen": replies[better], "rejected": replies[1 - better]}
        append(path, json.dumps(pair, ensure_ascii=False) + "\n")


def append(path: Path, line: str) -> None:
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


def _understood(answers: Iterator[str]) -> str | None:
    """``1``, ``2``, ``s`` or ``q``; the end of the input is a way to quit, and anything else is None."""
    said = next(answers, "quit").strip().casefold()
    return said[:1] if said in ("1", "2", "s", "skip", "q", "quit") else None
