"""Prompts to text, a piece as soon as it is sure."""

from collections.abc import Callable, Iterator, Sequence

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.generation.decode_loop import generate
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.tokenizer import Tokenizer


def stream_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str | list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    stop: Sequence[str] = (),
    compile: bool = False,
) -> Iterator[tuple[int, str]]:
    """Continue documents side by side; each begins with its prompt.

    Args:
        model: In evaluation mode.
        tokenizer: The model's.
        prompts: Texts to continue, an empty one to begin a document; or the ids of what to continue, as they are.
        max_new_tokens: Stop after so many in a text.
        sampling: How to choose.
        seeds: One a prompt.
        stop: A text ends before the first of these that it would have in it, its prompt not counted.
        compile: As for ``generate``.

    Returns:
        The number of a prompt, and the next piece of its text; after a text's last piece an empty one.

    Raises:
        UserError: A prompt is longer than the context, or a stop string is empty.
    """
    if "" in stop:
        raise UserError("a stop string is empty; leave it out to stop at the end of the document alone")
    ids = [
        [tokenizer.start_of_text, *tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]
    texts = [_StopStringBuffer(tokenizer.decoder(prompt[1:]), tuple(stop)) for prompt in ids]
    tokens = generate(
        model, ids, max_new_tokens, sampling, seeds, tokenizer.end_of_text, lambda row, _: texts[row].stopped, compile
    )
    return _emit_pieces(tokens, texts)


def _emit_pieces(
    tokens: Iterator[tuple[int, int | None]], texts: list["_StopStringBuffer"]
) -> Iterator[tuple[int, str]]:
    for row, token in tokens:
        piece = texts[row].rest() if token is None else texts[row].add(token)
        if piece or token is None:
            yield row, piece
        if piece and token is None:
            yield row, ""


class _StopStringBuffer:
    """A text that grows; what may be the beginning of a stop string is held back until it is known not to be."""

    def __init__(self, decode: Callable[[int], str], stop: tuple[str, ...]) -> None:
        self.decode = decode
        self.stop = stop
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What is sure to be in the text, now that this token is."""
        self.held += self.decode(token)
        ends = [place for stop in self.stop if (place := self.held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self.held[: min(ends)]
        sure = next((n for n in range(len(self.held)) if any(s.startswith(self.held[n:]) for s in self.stop)), None)
        piece, self.held = self.held[:sure], "" if sure is None else self.held[sure:]
        return piece

    def rest(self) -> str:
        """What was held back, now that no token comes any more."""
        return "" if self.stopped else self.held
