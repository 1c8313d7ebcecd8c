"""What a model replies, and whether in the form that it was tuned to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.evaluation.generation_eval import BATCH_SIZE, GREEDY, compare_with_references
from lit_gpt_scratch.evaluation.intervals import Measurements
from lit_gpt_scratch.generation.decode_loop import generate
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.chat_template import ROLES, ChatTemplate, Message, parse_conversation
from lit_gpt_scratch.text.document import TableRow, is_blank
from lit_gpt_scratch.text.tokenizer import Tokenizer

TURN_MARKERS = tuple(marker for role in ROLES for marker in (f"<|{role}|>", f"### {role.capitalize()}:"))
"""What opens a turn, in both ways of the template."""


@dataclass(frozen=True)
class ChatExample:
    """A conversation that waits for a reply, and the reply that it had.

    Attributes:
        where: Its place.
        messages: All before the reply.
        reference: The reply.
    """

    where: str
    messages: tuple[Message, ...]
    reference: str

    @classmethod
    def from_row(cls, row: TableRow) -> "ChatExample":
        """Of a record of conversations; what is replied to is its last message but one.

        Raises:
            UserError: It is no conversation that ends in a reply.
        """
        try:
            *before, last = parse_conversation(row.fields)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error
        return cls(row.where, tuple(before), last.content)

    @property
    def text(self) -> str:
        """As it would stand in a corpus."""
        return "\n\n".join((*(message.content for message in self.messages), self.reference))


class ChatReply(NamedTuple):
    """What a model wrote after a prompt.

    Attributes:
        text: Without the end of text; special tokens under their names.
        ended: Whether the model ended it, and not the number of tokens that it was granted.
        n_tokens: Its tokens, the end of text among them.
    """

    text: str
    ended: bool
    n_tokens: int

    @property
    def well_formed(self) -> bool:
        """Whether it says something, ends, and leaves it to others to open the next turn."""
        return self.ended and not is_blank(self.text) and not any(marker in self.text for marker in TURN_MARKERS)


def evaluate_chat(
    model: GPT, tokenizer: Tokenizer, asked: Sequence[ChatExample], max_new_tokens: int = 200
) -> Measurements:
    """Let the model reply in the chat template, always by its likeliest token.

    Returns:
        ``in_form``, the share of replies that are ``well_formed``, beside what ``continuations.measure`` says of texts.

    Raises:
        UserError: A conversation is longer than the context.
    """
    template = ChatTemplate(tokenizer)
    prompts = [template.render_prompt(each.messages) for each in asked]
    for each, prompt in zip(asked, prompts, strict=True):
        if len(prompt) > model.block_size:
            raise UserError(
                f"{each.where}: up to its reply it has {len(prompt)} tokens, the context holds {model.block_size}"
            )
    found = generate_replies(model, tokenizer, prompts, max_new_tokens)
    in_form = np.array([reply.well_formed for reply in found])
    return compare_with_references([reply.text for reply in found], [each.reference for each in asked], in_form=in_form)


def generate_replies(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
) -> list[ChatReply]:
    """The reply to each prompt; the same at every call.

    Args:
        model: In evaluation mode.
        tokenizer: The model's.
        prompts: Ids up to the marker of the reply, as ``Template.prompt`` gives them.
        max_new_tokens: The most tokens of a reply, its end among them.
        sampling: How to choose tokens; by default always the likeliest.
        seeds: One a prompt; by default its number.

    Raises:
        UserError: A prompt is longer than the context.
    """
    written: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    for start in range(0, len(order), BATCH_SIZE):
        places = order[start : start + BATCH_SIZE]
        given = [prompts[place] for place in places]
        drawn = places if seeds is None else [seeds[place] for place in places]
        tokens = generate(model, given, max_new_tokens, sampling, drawn, tokenizer.end_of_text)
        for row, token in tokens:
            if token is not None:
                written[places[row]].append(token)
    # The end of text is not given: where it came, there is a token less than there could be.
    return [ChatReply(tokenizer.decode(ids), ended := len(ids) < max_new_tokens, len(ids) + ended) for ids in written]
