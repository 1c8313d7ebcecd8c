"""Tokenizers that are trained here, by the name of their kind."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import wordpiece

END_OF_TEXT: Final = "<|endoftext|>"
"""Stands before every document: it ends the last one, and means "begin" to a model that generates."""
UNKNOWN: Final = "<unk>"
BYTES: Final = sorted(pre_tokenizers.ByteLevel.alphabet())
"""GPT-2's 256 printable characters, one for each byte: text of any kind is written in them without loss."""
CONTINUATION: Final = "\u203f"
"""Marks a piece of WordPiece that goes on with a word. No byte is written so: "##" could stand in a text."""
MAX_WORD_BYTES: Final = 64
"""Bytes; WordPiece looks for the longest piece at every place of a word, and gives up on long words."""


def _bpe(texts: Iterable[str], size: int, special: list[str]) -> Backend:
    """Byte-pair encoding: join the most frequent pair (Sennrich et al. 2016), of bytes (Radford et al. 2019)."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = _words(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=BYTES, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend


def _wordpiece(texts: Iterable[str], size: int, special: list[str]) -> Backend:
    """WordPiece: join the pair that makes the text most likely (Schuster and Nakajima 2012), over bytes."""
    words = pre_tokenizers.Sequence([_words(), pre_tokenizers.Split(Regex(f".{{1,{MAX_WORD_BYTES}}}"), "isolated")])
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in words.pre_tokenize_str(text))
    pieces = [*special, *wordpiece.learn_wordpieces(counts, BYTES, size - len(special), prefix=CONTINUATION)]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    model = models.WordPiece(  # every byte is a piece, so that nothing is unknown
        vocabulary,
        unk_token=special[0],
        max_input_chars_per_word=MAX_WORD_BYTES,
        continuing_subword_prefix=CONTINUATION,
    )
    backend = Backend(model)
    backend.pre_tokenizer = words
    backend.decoder = decoders.Sequence([decoders.Replace(CONTINUATION, ""), decoders.ByteLevel()])
    backend.add_special_tokens(special)
    return backend


def _unigram(texts: Iterable[str], size: int, special: list[str]) -> Backend:
    """Unigram: prune a large vocabulary to the most likely one (Kudo 2018), over bytes."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer, backend.decoder = _words(), decoders.ByteLevel()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=BYTES, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _char(texts: Iterable[str], size: int, special: list[str]) -> Backend:
    """One token a character; of too many the most frequent. What the texts do not have becomes ``<unk>``."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    special = [*special, UNKNOWN]
    most = sorted(counts, key=lambda c: (-counts[c], c))[: size - len(special)]
    vocabulary = {token: place for place, token in enumerate([*special, *sorted(most)])}
    backend = Backend(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(special)
    return backend


def _byte(texts: Iterable[str], size: int, special: list[str]) -> Backend:
    """One token a byte: byte-pair encoding that has learned no pair."""
    return _bpe([], len(special) + len(BYTES), special)


def _words() -> pre_tokenizers.PreTokenizer:
    """GPT-2's words, written in ``BYTES``."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


TOKENIZER_KINDS: Final[dict[str, Callable[[Iterable[str], int, list[str]], Backend]]] = {
    "bpe": _bpe, "wordpiece": _wordpiece, "unigram": _unigram, "char": _char, "byte": _byte,
}  # fmt: skip
"""Texts, size of the vocabulary and special tokens, which come first in it, to a tokenizer."""
MIN_VOCAB_SIZE: Final = {"bpe": len(BYTES), "wordpiece": 2 * len(BYTES), "unigram": len(BYTES), "char": 2, "byte": 0}
"""Tokens that a kind needs beside the special ones."""
TRAINED_KINDS: Final = ("bpe", "wordpiece", "unigram")
"""Kinds that grow to what is asked for; the others have what they have."""
MAX_VOCAB_SIZE: Final = 2**24
"""Tokens in a vocabulary: the trainer sets memory aside for as many as are asked for, and ends the process."""


def train_tokenizer(kind: str, texts: Iterable[str], size: int, special: Iterable[str] = ()) -> Backend:
    """A tokenizer of one kind.

    Args:
        kind: A key of ``TOKENIZER_KINDS``.
        texts: What to learn from.
        size: Tokens in the vocabulary, special ones included; fewer if the texts give no more.
        special: Special tokens beside ``<|endoftext|>``.

    Raises:
        UserError: The size has no room for what the kind needs.
    """
    tokens = [END_OF_TEXT, *special]
    if twice := [token for token in tokens if tokens.count(token) > 1 or not token]:
        raise UserError(f"data.special_tokens: '{twice[0]}' is empty or named twice ({END_OF_TEXT} is always there)")
    if size > MAX_VOCAB_SIZE:
        raise UserError(f"data.vocab_size is {size}; no tokenizer has more than {MAX_VOCAB_SIZE:,}")
    if size < (least := MIN_VOCAB_SIZE[kind] + len(tokens)):
        what = "bytes and special tokens" if MIN_VOCAB_SIZE[kind] >= len(BYTES) else "special tokens"
        raise UserError(f"data.vocab_size is {size}; a tokenizer of kind {kind} has at least {least}: {what}")
    return TOKENIZER_KINDS[kind](texts, size, tokens)
