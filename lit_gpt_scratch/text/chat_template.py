"""Chat template that converts messages to token ids, identically for fine-tuning and generation.

A conversation starts with the start-of-text token. Each turn consists of a role marker, the content and an end marker.
The end marker of an assistant message is the end-of-text token, which is included in the loss so that the model learns
to stop; the end marker of all other turns is a newline::

    <|endoftext|><|user|>Hi!
    <|assistant|>Hello.<|endoftext|><|user|>And now?
    <|assistant|>Bye.<|endoftext|>

The role marker is the token ``<|role|>`` if the tokenizer has this token, and the line ``### Role:`` otherwise, so that
any pretrained model can be fine-tuned without new tokens. Markers and contents are encoded separately, so a turn
boundary is always a token boundary, and a prompt has exactly the same ids as the same messages in training.
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
"""Role whose messages are included in the loss."""
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
        loss_mask: Loss mask, (n,): True for the tokens of assistant messages, including their end-of-text tokens.
    """

    ids: list[int]
    loss_mask: list[bool]


class ChatTemplate:
    """Chat template that converts messages to token ids.

    Args:
        tokenizer: Tokenizer that encodes the messages.
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
        """Tokenize messages as a prompt, which ends with the assistant marker."""
        return self.render(messages).ids + self._markers[ASSISTANT]

    def _role_marker(self, role: Role) -> list[int]:
        special = self._tokenizer.special_token_id(f"<|{role}|>")
        return [special] if special is not None else self._tokenizer.encode(f"### {role.capitalize()}:\n")


def parse_conversation(fields: Mapping[str, Any]) -> list[Message]:
    """Parse a training record into messages; the format is inferred from the column names.

    Args:
        fields: Values by column name: either ``messages``, a list of ``{"role": …, "content": …}``, or, as in Alpaca
            (Taori et al. 2023), ``instruction``, ``output`` and optionally ``input``.

    Raises:
        UserError: The record has neither of these formats, or is not a valid conversation. The caller adds the file and
            row to the message.
    """
    if fields.get("messages") is not None:
        messages = _parse_messages(fields["messages"], "messages")
    elif fields.get("instruction") is not None:
        messages = [_parse_instruction(fields), Message(ASSISTANT, get_text(fields, "output"))]
    else:
        found = ", ".join(fields) or "nothing"
        raise UserError(f"a record must have 'messages', or 'instruction' and 'output', but it has {found}")
    validate_messages(messages)
    if messages[-1].role != ASSISTANT:
        raise UserError(f"the last message has role {messages[-1].role}; it must be an assistant reply")
    return messages


def parse_prompt(fields: Mapping[str, Any]) -> list[Message]:
    """Parse the prompt of a record into messages, for generating or comparing replies.

    Args:
        fields: Values by column name: either ``prompt``, a string or a list of messages, or, as in Alpaca,
            ``instruction`` and optionally ``input``.

    Raises:
        UserError: The prompt is missing, or its last message is not a user message. The caller adds the file and row to
            the message.
    """
    if isinstance(prompt := fields.get("prompt"), str):
        messages = [Message("user", prompt)]
    elif prompt is not None:
        messages = _parse_messages(prompt, "prompt")
    elif fields.get("instruction") is not None:
        messages = [_parse_instruction(fields)]
    else:
        found = ", ".join(fields) or "nothing"
        raise UserError(f"a record must have 'prompt' or 'instruction', but it has {found}")
    validate_messages(messages)
    if messages[-1].role != "user":
        raise UserError(f"the last message of the prompt has role {messages[-1].role}; it must be a user message")
    return messages


def parse_reply(fields: Mapping[str, Any], column: str) -> str:
    """Return the reply in a column, which contains a string or a list with a single assistant message.

    Raises:
        UserError: The reply is empty or has another type. The caller adds the file and row to the message.
    """
    if isinstance(fields.get(column), list):
        messages = _parse_messages(fields[column], column)
        if [message.role for message in messages] != [ASSISTANT]:
            raise UserError(f"'{column}' must be a single {ASSISTANT} message; move earlier turns to 'prompt'")
        text = messages[0].content
    else:
        text = get_text(fields, column)
    if is_blank(text):
        raise UserError(f"'{column}' is empty")
    return text


def validate_messages(messages: Sequence[Message]) -> None:
    """Check that user and assistant messages alternate after an optional system message.

    Raises:
        UserError: There are no messages, or a message is empty or out of order.
    """
    if not messages:
        raise UserError("there are no messages")
    for number, message in enumerate(messages, 1):
        before = messages[number - 2].role if number > 1 else None
        if is_blank(message.content):
            raise UserError(f"message {number} has role {message.role} and no content")
        if message.role == before:
            raise UserError(
                f"messages {number - 1} and {number} both have role {before}; merge them into a single message"
            )
        if message.role == "system" and before is not None:
            raise UserError(f"message {number} has role system, but only the first message may have this role")
        if message.role == ASSISTANT and before != "user":
            raise UserError(f"message {number} has role {ASSISTANT} but does not follow a user message")


def _parse_instruction(fields: Mapping[str, Any]) -> Message:
    parts = [get_text(fields, name) for name in ("instruction", "input")]
    return Message("user", "\n\n".join(part for part in parts if not is_blank(part)))


def _parse_messages(value: Any, column: str) -> list[Message]:
    if not isinstance(value, list):
        raise UserError(f"'{column}' must be a list, but its type is {type(value).__name__}")
    messages = []
    for number, entry in enumerate(value, 1):
        if not isinstance(entry, Mapping):
            raise UserError(
                f"message {number} must be an object with 'role' and 'content', but its type is {type(entry).__name__}"
            )
        if entry.get("role") not in ROLES:
            raise UserError(
                f"message {number} has role {entry.get('role')!r}; the role must be one of {', '.join(ROLES)}"
            )
        messages.append(Message(entry["role"], _parse_content(entry, number)))
    return messages


def _parse_content(entry: Mapping[str, Any], number: int) -> str:
    try:
        return get_text(entry, "content")
    except UserError as error:
        raise UserError(f"message {number}: {error}") from error
