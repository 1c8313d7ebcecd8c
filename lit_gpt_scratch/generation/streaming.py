"""Stream generated text piece by piece, with support for stop strings."""

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
    sink_tokens: int | None = None,
) -> Iterator[tuple[int, str]]:
    """Generate text for a batch of prompts and yield it piece by piece.

    Args:
        model: The language model, in evaluation mode.
        tokenizer: The model's tokenizer.
        prompts: Strings or lists of token ids. A string is preceded by the start-of-text token, so an empty string
            begins a new document. Token ids are used unchanged.
        max_new_tokens: Maximum number of new tokens per prompt.
        sampling: Sampling parameters.
        seeds: One seed per prompt.
        stop: Strings that end the generated text, which is truncated before the first stop string. Stop strings in the
            prompt have no effect.
        compile: Whether to compile the decoding step; see ``generate``.
        sink_tokens: Number of sink tokens with which texts exceed the context; see ``generate``.

    Yields:
        The index of a prompt and the next piece of its generated text; an empty string marks the end.

    Raises:
        UserError: A stop string is empty, or an argument of ``generate`` is invalid.
    """
    if "" in stop:
        raise UserError("a stop string is empty; remove it or use a non-empty string")
    ids = [
        [tokenizer.start_of_text, *tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]
    texts = [_StopStringBuffer(tokenizer.stream_decoder(prompt[1:]), tuple(stop)) for prompt in ids]
    tokens = generate(
        model,
        ids,
        max_new_tokens,
        sampling,
        seeds,
        tokenizer.stop_ids,
        lambda row, _: texts[row].stopped,
        compile,
        sink_tokens=sink_tokens,
    )
    return _emit_pieces(tokens, texts)


def _emit_pieces(
    tokens: Iterator[tuple[int, int | None]], texts: list["_StopStringBuffer"]
) -> Iterator[tuple[int, str]]:
    for row, token in tokens:
        piece = texts[row].flush() if token is None else texts[row].add(token)
        if piece or token is None:
            yield row, piece
        if piece and token is None:
            yield row, ""


class _StopStringBuffer:
    """Buffer that decodes the tokens of one row and holds back text that may be the beginning of a stop string."""

    def __init__(self, decode: Callable[[int], str], stop: tuple[str, ...]) -> None:
        self.decode = decode
        self.stop = stop
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Add a token, and return the decoded text that can no longer be part of a stop string."""
        self.held += self.decode(token)
        ends = [index for stop in self.stop if (index := self.held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self.held[: min(ends)]
        # First index at which the held text may be the beginning of a stop string.
        hold_from = next(
            (n for n in range(len(self.held)) if any(s.startswith(self.held[n:]) for s in self.stop)), None
        )
        piece, self.held = self.held[:hold_from], "" if hold_from is None else self.held[hold_from:]
        return piece

    def flush(self) -> str:
        """Return the text that is still held back after the last token."""
        return "" if self.stopped else self.held
