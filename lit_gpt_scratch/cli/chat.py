"""A conversation in the terminal, in the template that the model was tuned with."""

import io
import logging
import sys
from collections.abc import Iterable, Iterator

from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.generation.streaming import stream_text
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.chat_template import ASSISTANT, ChatTemplate, Message, validate_messages
from lit_gpt_scratch.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def build_chat_prompts(tokenizer: Tokenizer, system: str | None, questions: Iterable[str]) -> list[list[int]]:
    """Ids of what replies to single questions are written after.

    Raises:
        UserError: A question is empty.
    """
    template, told = ChatTemplate(tokenizer), [] if system is None else [Message("system", system)]
    asked = [[*told, Message("user", question)] for question in questions]
    for messages in asked:
        validate_messages(messages)
    return [template.prompt(messages) for messages in asked]


def chat_session(
    model: GPT,
    tokenizer: Tokenizer,
    system: str | None,
    lines: Iterable[str],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[str]:
    """Reply to one line after the other, each in the light of what was said before.

    Args:
        model: In evaluation mode.
        tokenizer: The model's.
        system: What the model is told first; None says nothing.
        lines: What the user says; empty ones are passed over.
        max_new_tokens: The longest reply.
        sampling: How to choose tokens.
        seed: Of the first reply; each next one has the next.

    Returns:
        The replies in pieces, as they are written, an empty one after each. The oldest turns are forgotten when the
        context has little room, and a question that does not fit gets no reply; the log says so.
    """
    template, told = ChatTemplate(tokenizer), [] if system is None else [Message("system", system)]
    said: list[Message] = []
    room = min(max_new_tokens, model.block_size // 4)
    for turn, question in enumerate(line.strip() for line in lines if line.strip()):
        asked = Message("user", question)
        if (alone := len(template.prompt([*told, asked]))) > model.block_size:  # however much is forgotten
            log.warning("%d tokens are more than the context holds: %d; say it shorter", alone, model.block_size)
            continue
        said.append(asked)
        while len(said) > 1 and len(template.prompt([*told, *said])) + room > model.block_size:
            log.warning("the context is full; the first question and its reply are forgotten")
            said = said[2:]
        prompt = template.prompt([*told, *said])
        reply = ""
        for _, piece in stream_text(model, tokenizer, [prompt], max_new_tokens, sampling, [seed + turn]):
            reply += piece
            if piece:
                yield piece
        yield ""
        said.append(Message(ASSISTANT, reply))


def read_stdin_lines() -> Iterator[str]:
    """Lines as they are typed, until the end of the input; a mark shows whose turn it is, where somebody watches."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no UTF-8 are no reason to end
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        yield line
