"""Messages to token ids: the one template, for tuning and for talking.

A conversation is the start of text, then turn after turn: the role's marker, the text, and what closes it. A reply is
closed by the end of text, which is learned with it, so that a model knows when to stop; other turns by a newline::

    <|endoftext|><|user|>Hi!
    <|assistant|>Hello.<|endoftext|><|user|>And now?
    <|assistant|>Bye.<|endoftext|>

A marker is the token ``<|role|>`` where the tokenizer has it, and otherwise the line ``### Role:``, so that any
pretrained model can be tuned as it is. Markers, texts and closings are encoded apart: the border of a turn is a border
of tokens, and a prompt has the very ids that the same messages have in training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, get_args

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.document import get_text, is_blank
from lit_gpt_scratch.text.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)
ASSISTANT: Final = "assistant"
"""The role whose turns are learned."""
ROLE_TOKENS: Final = tuple(f"<|{role}|>" for role in ROLES)
"""Special tokens for a tokenizer that is made for conversations."""
TURN_END: Final = "\n"


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str


class RenderedConversation(NamedTuple):
    """A conversation in tokens.

    Attributes:
        ids: (n,).
        learned: (n,), True for the tokens of replies and for the end of text behind each.
    """

    ids: list[int]
    learned: list[bool]


class ChatTemplate:
    """The template in the tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._markers = {role: self._marker(role) for role in ROLES}
        self._closing = tokenizer.encode(TURN_END)

    def render(self, messages: Sequence[Message]) -> RenderedConversation:
        """A whole conversation, as it is learned."""
        ids, learned = [self._tokenizer.start_of_text], [False]
        for message in messages:
            reply = message.role == ASSISTANT
            said = self._tokenizer.encode(message.content)
            said += [self._tokenizer.end_of_text] if reply else self._closing
            ids += self._markers[message.role] + said
            learned += [False] * len(self._markers[message.role]) + [reply] * len(said)
        return RenderedConversation(ids, learned)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """What a reply to these messages is written after: all up to the marker of the reply."""
        return self.render(messages).ids + self._markers[ASSISTANT]

    def _marker(self, role: Role) -> list[int]:
        special = self._tokenizer.special(f"<|{role}|>")
        return [special] if special is not None else self._tokenizer.encode(f"### {role.capitalize()}:\n")


def parse_conversation(fields: Mapping[str, Any]) -> list[Message]:
    """The messages of a record, whose kind its columns tell.

    Args:
        fields: ``messages``, a list of ``{"role": …, "content": …}``; or, as in Alpaca (Taori et al. 2023),
            ``instruction``, ``input``, which may be empty, and ``output``.

    Raises:
        UserError: It is neither, or no conversation to learn from; without file and row, which the caller knows.
    """
    if fields.get("messages") is not None:
        messages = _listed(fields["messages"], "messages")
    elif fields.get("instruction") is not None:
        messages = [_instruction(fields), Message(ASSISTANT, get_text(fields, "output"))]
    else:
        there = ", ".join(fields) or "nothing"
        raise UserError(f"a record has 'messages', or 'instruction' and 'output'; here is {there}")
    validate_messages(messages)
    if messages[-1].role != ASSISTANT:
        raise UserError(f"the last message is the {messages[-1].role}'s; there is no reply to learn after it")
    return messages


def prompt(fields: Mapping[str, Any]) -> list[Message]:
    """The messages of a record to which replies are compared, or written.

    Args:
        fields: ``prompt``, a text or a list of messages; or ``instruction`` and ``input``, as in Alpaca.

    Raises:
        UserError: There is none, or nothing to reply to; without file and row, which the caller knows.
    """
    if isinstance(given := fields.get("prompt"), str):
        messages = [Message("user", given)]
    elif given is not None:
        messages = _listed(given, "prompt")
    elif fields.get("instruction") is not None:
        messages = [_instruction(fields)]
    else:
        raise UserError(f"a record has 'prompt', or 'instruction'; here is {', '.join(fields) or 'nothing'}")
    validate_messages(messages)
    if messages[-1].role != "user":
        raise UserError(f"the last message of the prompt is the {messages[-1].role}'s; a reply follows the user's")
    return messages


def reply(fields: Mapping[str, Any], column: str) -> str:
    """A reply of a record: a text, or a list of a single message of the assistant.

    Raises:
        UserError: It is empty, or something else; without file and row.
    """
    if isinstance(fields.get(column), list):
        messages = _listed(fields[column], column)
        if [message.role for message in messages] != [ASSISTANT]:
            raise UserError(
                f"'{column}' is not one message of the {ASSISTANT}; what was said before belongs to 'prompt'"
            )
        text = messages[0].content
    else:
        text = get_text(fields, column)
    if is_blank(text):
        raise UserError(f"'{column}' is empty")
    return text


def validate_messages(messages: Sequence[Message]) -> None:
    """Refuse what is no conversation: first the system, if at all, then the user, then turn about.

    Raises:
        UserError: A message is empty, or not in its place.
    """
    if not messages:
        raise UserError("there is no message")
    for number, message in enumerate(messages, 1):
        before = messages[number - 2].role if number > 1 else None
        if is_blank(message.content):
            what = "reply" if message.role == ASSISTANT else f"text of the {message.role}"
            raise UserError(f"message {number}: the {what} is empty")
        if message.role == before:
            raise UserError(f"messages {number - 1} and {number} are both the {before}'s; join them")
        if message.role == "system" and before is not None:
            raise UserError(f"message {number} is the system's, which can only be the first")
        if message.role == ASSISTANT and before != "user":
            raise UserError(f"message {number} is the {ASSISTANT}'s, but nobody has asked; the user begins")


def _instruction(fields: Mapping[str, Any]) -> Message:
    asked = [get_text(fields, name) for name in ("instruction", "input")]
    return Message("user", "\n\n".join(part for part in asked if not is_blank(part)))


def _listed(given: Any, column: str) -> list[Message]:
    if not isinstance(given, list):
        raise UserError(f"'{column}' is {type(given).__name__}, not a list")
    messages = []
    for number, entry in enumerate(given, 1):
        if not isinstance(entry, Mapping):
            raise UserError(f"message {number} is {type(entry).__name__}, not an object with 'role' and 'content'")
        if entry.get("role") not in ROLES:
            raise UserError(f"message {number} has the role {entry.get('role')!r}; there are {', '.join(ROLES)}")
        messages.append(Message(entry["role"], _content(entry, number)))
    return messages


def _content(entry: Mapping[str, Any], number: int) -> str:
    try:
        return get_text(entry, "content")
    except UserError as error:
        raise UserError(f"message {number}: {error}") from error
