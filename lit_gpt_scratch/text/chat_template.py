"""Chat templates that convert messages to token ids, identically for fine-tuning and generation.

A model published with a chat template keeps it, including for fine-tuning (``ImportedChatTemplate``). All other
models use the template of this package (``ChatTemplate``): a conversation starts with the start-of-text token, and
each turn consists of a role marker, the message text and an end marker. The end marker of an assistant message is the
end-of-text token, which is included in the loss so that the model learns to stop; the end marker of all other turns is
a newline::

    <|endoftext|><|user|>Hi!
    <|assistant|>Hello.<|endoftext|><|user|>And now?
    <|assistant|>Bye.<|endoftext|>

The role marker is the token ``<|role|>`` if the tokenizer has this token, and the line ``### Role:`` otherwise, so that
any pretrained model can be fine-tuned without new tokens. Markers and messages are encoded separately, so a turn
boundary is always a token boundary, and a prompt has exactly the same ids as the same messages in training.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, get_args

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.document import get_text, is_blank
from lit_gpt_scratch.text.template_process import REMEDY, TemplateProcess
from lit_gpt_scratch.text.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)
ASSISTANT: Final = "assistant"
"""Role whose messages are included in the loss."""
ROLE_TOKENS: Final = tuple(f"<|{role}|>" for role in ROLES)
"""Special tokens to add when training a tokenizer for conversations."""
TURN_END: Final = "\n"
TURN_MARKERS: Final = tuple(marker for role in ROLES for marker in (f"<|{role}|>", f"### {role.capitalize()}:"))
"""Role markers of all roles in both forms: ``<|role|>`` and ``### Role:``."""
MARK: Final = "\ue000"
"""Private-use character. In messages, a special token string is replaced with its index, enclosed in two of these
characters."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


class RenderedConversation(NamedTuple):
    """A tokenized conversation.

    Attributes:
        ids: Token ids of the conversation.
        loss_mask: Whether each token belongs to an assistant message or is the token that ends one.
    """

    ids: list[int]
    loss_mask: list[bool]


class ChatTemplate:
    """Default chat template, which works with any tokenizer.

    Args:
        tokenizer: Tokenizer that encodes the messages.
    """

    turn_markers: Sequence[str] = TURN_MARKERS
    """Strings that begin or end a turn; a well-formed reply contains none of them."""

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
        """Tokenize messages as a prompt that ends with the assistant marker."""
        return self.render(messages).ids + self._markers[ASSISTANT]

    def _role_marker(self, role: Role) -> list[int]:
        special = self._tokenizer.special_token_id(f"<|{role}|>")
        return [special] if special is not None else self._tokenizer.encode(f"### {role.capitalize()}:\n")


class ImportedChatTemplate(ChatTemplate):
    """Chat template of a published model; produces the same token ids as ``transformers``.

    As with ``ChatTemplate``, messages cannot contain special tokens: special token strings in messages are replaced
    with placeholders before rendering, and encoded as ordinary text afterwards. The template cannot read the current
    time, so resuming a run on another day does not change the token ids.

    Args:
        tokenizer: Tokenizer of the published model.
        template: Jinja template.
        tokens: Special token strings that the template can insert, keyed by name, such as ``bos_token``.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, tokens: Mapping[str, str]) -> None:
        self._tokenizer = tokenizer
        self._process = TemplateProcess(template)
        self._variables = {**tokens, "tools": None, "documents": None}
        self.turn_markers = tuple(tokenizer.special_tokens)
        # The mark itself is also replaced, so that no message can contain a mark. Longer strings are matched first.
        self._marked = sorted({MARK, *self.turn_markers}, key=lambda name: (-len(name), name))
        self._names = re.compile("|".join(map(re.escape, self._marked)))
        self._marks = re.compile(f"{MARK}({'|'.join(map(str, range(len(self._marked))))}){MARK}")

    def render(self, messages: Sequence[Message]) -> RenderedConversation:
        """Tokenize a conversation for training, up to the end of its last reply.

        A reply is the text that follows the prompt, up to the first token that ends generation.

        Raises:
            UserError: The template is invalid, or replies cannot be located in the conversation.
        """
        replies = [n for n, message in enumerate(messages) if message.role == ASSISTANT]
        parts = [part for n in replies for part in ((messages[:n], True), (messages[: n + 1], False))]
        whole, *texts = self._render([(messages, False), *parts])
        ids, ranges = self._encode(whole)
        loss_mask, first = [False] * len(ids), 0
        for n, prompt, until in zip(replies, texts[::2], texts[1::2], strict=True):
            if not whole.startswith(prompt):
                raise UserError(
                    f"the chat template of the model renders the messages before message {n + 1} differently if a "
                    f"reply follows them, so training on replies is not possible; {REMEDY}"
                )
            limit = len(until) if whole.startswith(until) else len(whole)  # a template may shorten earlier replies
            reply = [at for at in range(first, len(ids)) if ranges[at][1] > len(prompt) and ranges[at][0] < limit]
            end = next((at for at in reply if ids[at] in self._tokenizer.stop_ids), None)
            if end is None:
                raise UserError(
                    f"the chat template of the model does not end message {n + 1} with a token that ends generation; "
                    "add the last token of the message to eos_token_id in generation_config.json of the model's "
                    "Hugging Face folder, and import the model again"
                )
            first = end + 1
            loss_mask[reply[0] : first] = [True] * (first - reply[0])
        length = first if replies else len(ids)
        return RenderedConversation(ids[:length], loss_mask[:length])

    def render_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokenize messages as a prompt that ends with the text that begins a reply.

        Raises:
            UserError: The template is invalid.
        """
        return self._encode(self._render([(messages, True)])[0])[0]

    def _render(self, requests: Sequence[tuple[Sequence[Message], bool]]) -> list[str]:
        """Render each (messages, add_generation_prompt) pair to text, after applying ``_mark`` to the messages."""
        contexts = [
            {
                **self._variables,
                "messages": [{"role": message.role, "content": self._mark(message.content)} for message in messages],
                "add_generation_prompt": add_generation_prompt,
            }
            for messages, add_generation_prompt in requests
        ]
        return self._process.render(contexts)

    def _mark(self, text: str) -> str:
        """Replace each special token string in a message with its index, enclosed in ``MARK`` characters."""
        marked = self._names.sub(lambda found: f"{MARK}{self._marked.index(found[0])}{MARK}", text)
        if self._tokenizer.normalizes_special_tokens:
            ids = set(self._tokenizer.encode_with_special_tokens(marked)[0]) - {self._tokenizer.unknown_id}
            if found := [name for name, id_ in self._tokenizer.special_tokens.items() if id_ in ids]:
                raise UserError(
                    f"a message contains text that is normalized to the special token {found[0]}; change this text"
                )
        return marked

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of a text from ``_render``, and the character range that each token represents."""
        ids: list[int] = []
        ranges: list[tuple[int, int]] = []
        at = 0
        for n, part in enumerate(self._marks.split(text)):
            if n % 2:  # the index between two marks
                plain, width = self._tokenizer.encode(self._marked[int(part)]), len(part) + 2
                ids += plain
                ranges += [(at, at + width)] * len(plain)
            else:
                found, places = self._tokenizer.encode_with_special_tokens(part)
                width = len(part)
                ids += found
                ranges += [(at + start, at + stop) for start, stop in places]
            at += width
        return ids, ranges


def load_chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """Return the chat template of the tokenizer's published model, or a ``ChatTemplate`` if there is none."""
    published = tokenizer.published
    if published is None or published.chat_template is None:
        return ChatTemplate(tokenizer)
    return ImportedChatTemplate(tokenizer, published.chat_template, published.tokens)


def parse_conversation(fields: Mapping[str, Any]) -> list[Message]:
    """Parse a training record into messages; the format is inferred from the column names.

    Args:
        fields: Column values keyed by column name. Contains either ``messages`` (a list of
            ``{"role": …, "content": …}``) or, as in Alpaca (Taori et al. 2023), ``instruction``, ``output`` and
            optionally ``input``.

    Raises:
        UserError: The record is in neither format, or is not a valid conversation. The caller adds the file and row to
            the message.
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
        fields: Column values keyed by column name. Contains either ``prompt`` (a string or a list of messages) or, as
            in Alpaca, ``instruction`` and optionally ``input``.

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
        UserError: The reply is empty or has the wrong type. The caller adds the file and row to the message.
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
