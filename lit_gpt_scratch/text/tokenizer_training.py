"""Train BPE, WordPiece, Unigram, character and byte tokenizers."""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import accumulate, repeat
from typing import Final

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.wordpiece import train_wordpiece

END_OF_TEXT: Final = "<|endoftext|>"
"""Token that separates documents; it precedes every document in training and every prompt in generation."""
UNKNOWN: Final = "<unk>"
BYTES: Final = sorted(pre_tokenizers.ByteLevel.alphabet())
"""GPT-2's byte-level alphabet: 256 printable characters, one for each byte, which can represent any text losslessly."""
CONTINUATION: Final = "\u203f"
"""Prefix of WordPiece tokens that continue a word. Unlike the usual "##", it cannot occur in byte-level text."""
MAX_WORD_BYTES: Final = 64
"""Maximum number of bytes per word for WordPiece and Unigram. Longer words, as in genomes, Base64 and minified code,
are split; WordPiece, which cannot encode long words, also splits them for encoding."""
MAX_BPE_WORD_BYTES: Final = 256
"""Maximum number of bytes per word when BPE is trained, and therefore per token. Longer words are split for training
only.

The training time of ``tokenizers`` is quadratic in the length of a word.
"""
LONG_WORD_BYTES: Final = 48
"""Minimum number of bytes in a long word; natural language and code have few distinct words of this length."""
MAX_LONG_WORDS_BYTES: Final = 2**16
"""Maximum total number of bytes of the distinct long words on which WordPiece and Unigram are trained.

The run time is proportional to the total number of bytes of all distinct words. In text without spaces, almost all
words are distinct, and a small sample of them has the same statistics.
"""
UNIGRAM_BYTES: Final = 2**18
"""Maximum total size in bytes of the distinct words on which Unigram is trained; the most frequent words are used. The
maximum is ``UNIGRAM_BYTES_PER_TOKEN`` times the vocabulary size if that is larger."""
UNIGRAM_BYTES_PER_TOKEN: Final = 64


def _train_bpe(texts: Iterable[str], size: int, special: list[str]) -> Backend:
    """Train byte-level BPE, which merges the most frequent pair (Sennrich et al. 2016; Radford et al. 2019)."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = _byte_level(MAX_BPE_WORD_BYTES), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=BYTES, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.pre_tokenizer = _byte_level()
    return backend


def _train_wordpiece(texts: Iterable[str], size: int, special: list[str]) -> Backend:
    """Train byte-level WordPiece, which merges pairs to maximize the likelihood (Schuster and Nakajima 2012)."""
    pieces = [*special, *train_wordpiece(_count_words(texts), BYTES, size - len(special), prefix=CONTINUATION)]
    model = models.WordPiece(  # every byte is a token, so no text is unknown
        {piece: id_ for id_, piece in enumerate(pieces)},
        unk_token=special[0],
        max_input_chars_per_word=MAX_WORD_BYTES,
        continuing_subword_prefix=CONTINUATION,
    )
    backend = Backend(model)
    backend.pre_tokenizer = _byte_level(MAX_WORD_BYTES)
    backend.decoder = decoders.Sequence([decoders.Replace(CONTINUATION, ""), decoders.ByteLevel()])
    backend.add_special_tokens(special)
    return backend


def _train_unigram(texts: Iterable[str], size: int, special: list[str]) -> Backend:
    """Train a byte-level Unigram tokenizer, which prunes a large vocabulary to maximize the likelihood (Kudo 2018)."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("\n", "removed"), decoders.ByteLevel()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=BYTES, show_progress=False
    )
    room = max(UNIGRAM_BYTES, UNIGRAM_BYTES_PER_TOKEN * size)
    counts = _count_words(texts).most_common()
    n_words = bisect_right(list(accumulate(len(word) for word, _ in counts)), room)
    # A byte-level word contains no newline. The trainer counts the words again.
    backend.train_from_iterator(("\n".join(repeat(word, count)) for word, count in counts[:n_words]), trainer)
    backend.pre_tokenizer = _byte_level()
    return backend


def _train_char(texts: Iterable[str], size: int, special: list[str]) -> Backend:
    """Build a vocabulary of the most frequent characters; other characters become ``<unk>``."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    special = list(dict.fromkeys([*special, UNKNOWN]))
    most_frequent = sorted(counts, key=lambda c: (-counts[c], c))[: size - len(special)]
    vocabulary = {token: id_ for id_, token in enumerate([*special, *sorted(most_frequent)])}
    backend = Backend(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(special)
    return backend


def _train_byte(texts: Iterable[str], size: int, special: list[str]) -> Backend:
    """Build a vocabulary with one token per byte, i.e. byte-pair encoding without merges."""
    return _train_bpe([], len(special) + len(BYTES), special)


def _count_words(texts: Iterable[str]) -> Counter[str]:
    """Count the byte-level words in texts; words longer than ``MAX_WORD_BYTES`` are split.

    Once the distinct long words have ``MAX_LONG_WORDS_BYTES`` bytes in total, further long words are omitted.
    """
    pre_tokenizer = _byte_level()
    counts: Counter[str] = Counter()
    long: dict[str, str] = {}  # the part of each long word that is counted
    room = MAX_LONG_WORDS_BYTES
    for text in texts:
        words: list[str] = []
        for word, _ in pre_tokenizer.pre_tokenize_str(text):
            if len(word) < LONG_WORD_BYTES:
                words.append(word)
                continue
            if word not in long and room:
                long[word] = word[:room]
                room -= len(long[word])
            part = long.get(word, "")
            words += [part[start : start + MAX_WORD_BYTES] for start in range(0, len(part), MAX_WORD_BYTES)]
        counts.update(words)
    return counts


def _byte_level(max_word_bytes: int | None = None) -> pre_tokenizers.PreTokenizer:
    """Return GPT-2's pre-tokenizer, which splits text into words and maps bytes to the characters in ``BYTES``.

    Args:
        max_word_bytes: Maximum number of bytes per word; longer words are split. None disables the limit.
    """
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if max_word_bytes is None:
        return words
    return pre_tokenizers.Sequence([words, pre_tokenizers.Split(Regex(f".{{1,{max_word_bytes}}}"), "isolated")])


TOKENIZER_KINDS: Final[dict[str, Callable[[Iterable[str], int, list[str]], Backend]]] = {
    "bpe": _train_bpe, "wordpiece": _train_wordpiece, "unigram": _train_unigram, "char": _train_char,
    "byte": _train_byte,
}  # fmt: skip
"""Training function of each tokenizer type.

The arguments are the texts, the vocabulary size and the special tokens, which are assigned the first ids.
"""
MIN_VOCAB_SIZE: Final = {"bpe": len(BYTES), "wordpiece": 2 * len(BYTES), "unigram": len(BYTES), "char": 2, "byte": 0}
"""Minimum vocabulary size of each tokenizer type, excluding special tokens."""
TRAINED_KINDS: Final = ("bpe", "wordpiece", "unigram")
"""Tokenizer types that merge or prune tokens until the requested vocabulary size is reached."""
MAX_VOCAB_SIZE: Final = 2**24
"""Maximum vocabulary size; trainers allocate memory for the whole vocabulary, and abort the process if this fails."""


def train_tokenizer(kind: str, texts: Iterable[str], size: int, special: Iterable[str] = ()) -> Backend:
    """Train a tokenizer.

    Args:
        kind: Tokenizer type; a key of ``TOKENIZER_KINDS``.
        texts: Documents to train on.
        size: Vocabulary size, including special tokens; the result is smaller if the texts yield fewer tokens.
        special: Special tokens in addition to ``<|endoftext|>``.

    Raises:
        UserError: The size is out of range, or a special token is empty, repeated or an ordinary word or character.
    """
    tokens = [END_OF_TEXT, *special]
    if repeated := [token for token in tokens if tokens.count(token) > 1 or not token]:
        raise UserError(
            f"data.special_tokens: '{repeated[0]}' is empty or repeated; remove it ({END_OF_TEXT} is always included)"
        )
    if ordinary := [token for token in tokens if _may_be_ordinary_token(token, kind)]:
        raise UserError(
            f"data.special_tokens: '{ordinary[0]}' is an ordinary word or character, which text may contain; choose a "
            f"string such as '<|{ordinary[0]}|>', which a {kind} tokenizer always splits"
        )
    if size > MAX_VOCAB_SIZE:
        raise UserError(f"data.vocab_size is {size}; the maximum is {MAX_VOCAB_SIZE:,}")
    if size < (minimum := MIN_VOCAB_SIZE[kind] + len(tokens)):
        needed = "bytes and special tokens" if MIN_VOCAB_SIZE[kind] >= len(BYTES) else "special tokens"
        raise UserError(f"data.vocab_size is {size}; a {kind} tokenizer requires at least {minimum} for its {needed}")
    return TOKENIZER_KINDS[kind](texts, size, tokens)


def _may_be_ordinary_token(name: str, kind: str) -> bool:
    """Return whether the text may contain an ordinary token whose string equals that of a special token.

    Tokens are looked up by string, so such a token would have the id of the special token. The result does not depend
    on the training text. Only ASCII characters are considered for splitting, because the other characters of a
    byte-level token represent single bytes.
    """
    if kind == "char":
        return len(name) == 1
    if kind == "wordpiece":
        name = name.removeprefix(CONTINUATION)
    if not set(name) <= set(BYTES):
        return False
    words = (_byte_level().pre_tokenize_str(part) for part in re.findall("[!-~]+", name))
    return len(name) == 1 if kind == "byte" else all(len(found) < 2 for found in words)
