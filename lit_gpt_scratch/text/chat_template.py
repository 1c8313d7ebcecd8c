"""Chat template: converts messages to token ids, identically in fine-tuning and in generation.

A conversation starts with the start-of-text token. Each turn consists of the role's marker, the content and a turn end.
An assistant message ends with the end-of-text token, which is included in the loss so that the model learns to stop;
other turns end with a newline::

    <|endoftext|><|user|>Hi!
    <|assistant|>Hello.<|endoftext|><|user|>And now?
    <|assistant|>Bye.<|endoftext|>

The marker is the token ``<|role|>`` if the tokenizer has it, otherwise the line ``### Role:``, so that any pretrained
model can be fine-tuned without new tokens. Markers, contents and turn ends are encoded separately: a turn boundary is
always a token boundary, and a prompt has exactly the same ids as the same messages in training.
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
"""The role whose messages are trained on."""
ROLE_TOKENS: Final = tuple(f"<|{role}|>" for role in ROLES)
"""Special tokens to add when training a tokenizer for conversations."""
TURN_END: Final = "\n"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


class RenderedConversation(NamedTuple):
    """A tokenized conversation.

    Attributes:
        ids: Token ids, (n,).
        loss_mask: Loss mask, (n,): True for tokens of assistant messages and the end of text after each of them.
    """

    ids: list[int]
    loss_mask: list[bool]


class ChatTemplate:
    """Render messages as token ids.

    Args:
        tokenizer: The tokenizer to encode with.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._markers = {role: self._role_marker(role) for role in ROLES}
        self._turn_end = tokenizer.encode(TURN_END)

    def render(self, messages: Sequence[Message]) -> RenderedConversation:
        """Tokenize a complete conversation for training."""
        ids, loss_mask = [self._tokenizer.start_of_text], [False]
        for message in messages:
            in_loss = message.role == ASSISTANT
            content = self._tokenizer.encode(message.content)
            content += [self._tokenizer.end_of_text] if in_loss else self._turn_end
            ids += self._markers[message.role] + content
            loss_mask += [False] * len(self._markers[message.role]) + [in_loss] * len(content)
        return RenderedConversation(ids, loss_mask)

    def render_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokenize messages as the prompt for a reply; it ends with the assistant's marker."""
        return self.render(messages).ids + self._markers[ASSISTANT]

    def _role_marker(self, role: Role) -> list[int]:
        special = self._tokenizer.special_token_id(f"<|{role}|>")
        return [special] if special is not None else self._tokenizer.encode(f"### {role.capitalize()}:\n")


def parse_conversation(fields: Mapping[str, Any]) -> list[Message]:
    """Return the messages of a training record; the format is inferred from its columns.

    Args:
        fields: Values by column: ``messages``, a list of ``{"role": …, "content": …}``; or, as in Alpaca (Taori et al.
            2023), ``instruction``, an optional ``input``, and ``output``.

    Raises:
        UserError: The record has neither format, or is not a valid training conversation. The caller adds the file and
            row to the message.
    """
    if fields.get("messages") is not None:
        messages = _parse_messages(fields["messages"], "messages")
    elif fields.get("instruction") is not None:
        messages = [_parse_instruction(fields), Message(ASSISTANT, get_text(fields, "output"))]
    else:
        found = ", ".join(fields) or "nothing"
        raise UserError(f"a record needs 'messages', or 'instruction' and 'output'; this one has {found}")
    validate_messages(messages)
    if messages[-1].role != ASSISTANT:
        raise UserError(f"the last message has role {messages[-1].role}; there is no assistant reply after it to learn")
    return messages


def parse_prompt(fields: Mapping[str, Any]) -> list[Message]:
    """Return the prompt of a record as messages, for generating replies or comparing them.

    Args:
        fields: Values by column: ``prompt``, a string or a list of messages; or ``instruction`` and ``input``, as in
            Alpaca.

    Raises:
        UserError: There is no prompt, or its last message is not the user's. The caller adds the file and row to the
            message.
    """
    if isinstance(prompt := fields.get("prompt"), str):
        messages = [Message("user", prompt)]
    elif prompt is not None:
        messages = _parse_messages(prompt, "prompt")
    elif fields.get("instruction") is not None:
        messages = [_parse_instruction(fields)]
    else:
        found = ", ".join(fields) or "nothing"
        raise UserError(f"a record needs 'prompt' or 'instruction'; this one has {found}")
    validate_messages(messages)
    if messages[-1].role != "user":
        raise UserError(f"the last message of the prompt has role {messages[-1].role}; it must be the user's")
    return messages


def parse_reply(fields: Mapping[str, Any], column: str) -> str:
    """Return the reply in a column: a string, or a list with a single assistant message.

    Raises:
        UserError: The reply is empty or has another type. The caller adds the file and row to the message.
    """
    if isinstance(fields.get(column), list):
        messages = _parse_messages(fields[column], column)
        if [message.role for message in messages] != [ASSISTANT]:
            raise UserError(f"'{column}' is not a single {ASSISTANT} message; put earlier turns into 'prompt'")
        text = messages[0].content
    else:
        text = get_text(fields, column)
    if is_blank(text):
        raise UserError(f"'{column}' is empty")
    return text


def validate_messages(messages: Sequence[Message]) -> None:
    """Check the order of messages: an optional system message first, then user and assistant alternating.

    Raises:
        UserError: A message is empty or out of order.
    """
    if not messages:
        raise UserError("there are no messages")
    for number, message in enumerate(messages, 1):
        before = messages[number - 2].role if number > 1 else None
        if is_blank(message.content):
            raise UserError(f"message {number}: the {message.role}'s text is empty")
        if message.role == before:
            raise UserError(f"messages {number - 1} and {number} both have role {before}; join them")
        if message.role == "system" and before is not None:
            raise UserError(f"message {number} has role system, which can only come first")
        if message.role == ASSISTANT and before != "user":
            raise UserError(f"message {number} has role {ASSISTANT} but does not follow a user message")


def _parse_instruction(fields: Mapping[str, Any]) -> Message:
    parts = [get_text(fields, name) for name in ("instruction", "input")]
    return Message("user", "\n\n".join(part for part in parts if not is_blank(part)))


def _parse_messages(value: Any, column: str) -> list[Message]:
    if not isinstance(value, list):
        raise UserError(f"'{column}' is {type(value).__name__}, not a list")
    messages = []
    for number, entry in enumerate(value, 1):
        if not isinstance(entry, Mapping):
            raise UserError(f"message {number} is {type(entry).__name__}, not an object with 'role' and 'content'")
        if entry.get("role") not in ROLES:
            raise UserError(f"message {number} has role {entry.get('role')!r}; choose from {', '.join(ROLES)}")
        messages.append(Message(entry["role"], _parse_content(entry, number)))
    return messages


def _parse_content(entry: Mapping[str, Any], number: int) -> str:
    try:
        return get_text(entry, "content")
    except UserError as error:
        raise UserError(f"message {number}: {error}") from error
