"""Collect preferences: the user chooses the better of two replies, and both replies are appended to a JSONL file."""

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
from lit_gpt_scratch.text.chat_template import Message, load_chat_template, validate_messages
from lit_gpt_scratch.text.document import is_blank
from lit_gpt_scratch.text.tokenizer import Tokenizer

MAX_ATTEMPTS: Final = 4
"""Maximum number of attempts to sample two complete, different replies; after that, the prompt is skipped."""
QUESTION: Final = "Which reply is better? 1, 2, skip or quit"


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
    """Generate two replies to each prompt, ask the user which one is better, and append the pair to a file.

    Replies that are truncated, identical or blank are sampled again. Each answer is flushed to disk before the next
    prompt, so that no answer is lost if the command is interrupted.

    Args:
        model: Model in evaluation mode.
        tokenizer: Tokenizer of the model.
        system: System message, or None to omit it.
        questions: Prompts to reply to; blank prompts are skipped.
        answers: Answers from the user: ``1``, ``2``, ``skip``, ``quit``, or their first letters.
        path: JSONL file to append to, with keys ``prompt``, ``chosen`` and ``rejected``.
        max_new_tokens: Maximum number of tokens per reply.
        sampling: Sampling parameters.
        seed: Seed for the first reply; each further reply uses the next seed. For each existing line of the file,
            ``2 * MAX_ATTEMPTS`` seeds are skipped, so that repeating the command yields different pairs.

    Yields:
        Text to print.

    Raises:
        UserError: A prompt is too long, or the file cannot be written.
    """
    template, told = load_chat_template(tokenizer), [] if system is None else [Message("system", system)]
    append_line(path, "")  # fail before the first answer if the file is not writable
    seeds = count(seed + 2 * MAX_ATTEMPTS * _count_lines(path))
    for question in (each.strip() for each in questions if not is_blank(each)):
        messages = [*told, Message("user", question)]
        validate_messages(messages)
        prompt = template.render_prompt(messages)
        for _ in range(MAX_ATTEMPTS):
            one, two = generate_replies(
                model, tokenizer, [prompt] * 2, max_new_tokens, sampling, list(islice(seeds, 2))
            )
            pair = one.text, two.text
            whole = one.ended and two.ended  # truncated replies would teach the model to stop mid-sentence
            if whole and one.text != two.text and not any(map(is_blank, pair)):
                break
        else:
            why = "a higher --temperature" if whole else "a higher --max_new_tokens, so that replies are complete,"
            yield f"{question}\nThe model did not generate two different, complete replies; {why} may help.\n"
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
    """Append a line to a file, after adding a newline if the file does not end with one, and flush it to disk.

    Raises:
        UserError: The file cannot be written.
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
        raise UserError(
            f"argument --rank: cannot write {path}: {error.strerror}; check the permissions and the free disk space"
        ) from error


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _parse_answer(answers: Iterator[str]) -> str | None:
    """Return the next answer as ``1``, ``2``, ``s`` or ``q``, or None if it is invalid; the end of input means quit."""
    answer = next(answers, "quit").strip().casefold()
    return answer[:1] if answer in ("1", "2", "s", "skip", "q", "quit") else None
