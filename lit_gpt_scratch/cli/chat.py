"""Chat in the terminal, using the model's chat template."""

import io
import logging
import sys
from collections.abc import Iterable, Iterator

from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.generation.streaming import stream_text
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.chat_template import ASSISTANT, Message, load_chat_template, validate_messages
from lit_gpt_scratch.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def build_chat_prompts(tokenizer: Tokenizer, system: str | None, questions: Iterable[str]) -> list[list[int]]:
    """Build one prompt per question, as token ids up to the start of the assistant's reply.

    Raises:
        UserError: A question is empty.
    """
    template, head = load_chat_template(tokenizer), [] if system is None else [Message("system", system)]
    conversations = [[*head, Message("user", question)] for question in questions]
    for messages in conversations:
        validate_messages(messages)
    return [template.render_prompt(messages) for messages in conversations]


def chat_session(
    model: GPT,
    tokenizer: Tokenizer,
    system: str | None,
    lines: Iterable[str],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    sink_tokens: int | None = None,
) -> Iterator[str]:
    """Reply to each line, using the conversation so far as context.

    For each reply, ``max_new_tokens`` tokens are reserved, but at most a quarter of the context. If the conversation
    does not fit into the rest, the oldest messages and their replies are dropped. A message that does not fit into the
    context on its own gets no reply. Both cases are logged.

    Args:
        model: Model in evaluation mode.
        tokenizer: Tokenizer of the model.
        system: System message, or None to omit it.
        lines: Messages from the user; blank messages are skipped.
        max_new_tokens: Maximum number of tokens per reply.
        sampling: Sampling parameters.
        seed: Seed for the reply to the first message; it is increased by 1 for each further message.
        sink_tokens: Number of sink tokens with which replies exceed the context; see ``generate``.

    Yields:
        Parts of the replies as they are generated, and an empty string after each complete reply.
    """
    template, head = load_chat_template(tokenizer), [] if system is None else [Message("system", system)]
    turns: list[Message] = []
    reply_tokens = min(max_new_tokens, model.block_size // 4)
    for turn, question in enumerate(line.strip() for line in lines if line.strip()):
        message = Message("user", question)
        if (alone := len(template.render_prompt([*head, message]))) > model.block_size:  # even without earlier turns
            log.warning("the message has %d tokens, more than the context of %d; shorten it", alone, model.block_size)
            continue
        turns.append(message)
        while len(turns) > 1 and len(template.render_prompt([*head, *turns])) + reply_tokens > model.block_size:
            log.warning("the context is full; dropping the oldest message and its reply")
            turns = turns[2:]
        prompt = template.render_prompt([*head, *turns])
        reply = ""
        pieces = stream_text(
            model, tokenizer, [prompt], max_new_tokens, sampling, [seed + turn], sink_tokens=sink_tokens
        )
        for _, piece in pieces:
            reply += piece
            if piece:
                yield piece
        yield ""
        turns.append(Message(ASSISTANT, reply))


def read_stdin_lines() -> Iterator[str]:
    """Yield lines from standard input until it ends; if it is a terminal, print a prompt before reading each line."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # do not fail on bytes that are not UTF-8
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        yield line
