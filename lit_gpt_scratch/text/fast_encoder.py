"""Fast batch encoding with ``tiktoken``, used only if its token ids provably equal those of ``tokenizers``.

``tiktoken`` merges the adjacent pair whose merged token has the lowest id; ``tokenizers`` merges the pair that comes
first in the merge list. For a byte-level BPE tokenizer, both give the same ids if

1. each pair in the merge list produces a distinct token, and token ids increase in the order of the list; and
2. the text of each token, encoded alone, results in this single token.

Proof: suppose that, while ``tokenizers`` encodes a word, the tokens ``u`` and ``v`` are adjacent, and that their
concatenation ``uv`` is also a token. No merge has crossed the outer boundaries of ``uv`` so far, so the merges within
these boundaries are the same as if ``uv`` were encoded alone. By 2, encoding ``uv`` alone results in the single token
``uv``. The only remaining merge is that of ``u`` and ``v``, so this pair is in the merge list. Therefore, ``tiktoken``
never merges a pair that ``tokenizers`` would not merge, and by 1, both merge pairs in the same order.
"""

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, Final

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tokenizers import Regex, normalizers
from tokenizers import Tokenizer as Backend

GPT2_PATTERN: Final = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""GPT-2's pre-tokenization pattern, as built into ``tokenizers``."""
LONG_WORD: Final = 500
"""Minimum length of a long word, in characters; texts with long words are not encoded with ``tiktoken``.

The run time of ``tiktoken`` is quadratic in the length of a word.
"""
SEPARATORS: Final = "\x1c\x1d\x1e\x1f"
"""Control characters that are whitespace in Python, but not in the pre-tokenization pattern."""
BYTE_LEVEL: Final = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def build_tiktoken_encoding(backend: Backend) -> tiktoken.Encoding | None:
    """Build a ``tiktoken`` encoding that provably returns the same ids as ``backend``, or return None if impossible."""
    spec: dict[str, Any] = json.loads(backend.to_str())
    model, pre_tokenizer = spec["model"], spec["pre_tokenizer"] or {}
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "unk_token", "ignore_merges")
    if model["type"] != "BPE" or any(model.get(key) for key in options) or spec["normalizer"]:
        return None
    if any(pre_tokenizer.get(key) != value for key, value in BYTE_LEVEL.items()) or not _same_unicode_classes():
        return None
    if any(not token["special"] for token in spec["added_tokens"]) or not backend.encode_special_tokens:
        return None
    special = {token["content"]: token["id"] for token in spec["added_tokens"]}
    byte_of = _byte_by_character()
    vocabulary = {token: id_ for token, id_ in model["vocab"].items() if token not in special}
    if not set(byte_of) <= vocabulary.keys() or not all(set(token) <= byte_of.keys() for token in vocabulary):
        return None
    merged = [a + b for a, b in model["merges"]]
    if not set(merged) <= vocabulary.keys() or len(merged) + len(byte_of) != len(vocabulary):
        return None
    if not all(vocabulary[a] < vocabulary[b] for a, b in pairwise(merged)):
        return None
    if any([piece.id for piece in backend.model.tokenize(token)] != [vocabulary[token]] for token in merged):
        return None
    ranks = {bytes(byte_of[character] for character in token): id_ for token, id_ in vocabulary.items()}
    return tiktoken.Encoding("proven", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def encode_batch(
    backend: Backend, encoding: tiktoken.Encoding | None, texts: Iterable[str], threads: int | None = None
) -> Iterator[NDArray[np.uint32]]:
    """Yield the token ids of each string as a uint32 array.

    Args:
        backend: Tokenizer to encode with.
        encoding: Result of ``build_tiktoken_encoding``; if None, only ``backend`` is used.
        texts: Strings to encode.
        threads: Number of threads for ``encoding``; None uses the default of ``ThreadPoolExecutor``.
    """
    if encoding is None:
        for encoded in backend.encode_batch_fast(list(texts), add_special_tokens=False):
            yield np.asarray(encoded.ids, dtype=np.uint32)
        return

    def encode(text: str) -> NDArray[np.uint32]:
        if _may_have_long_words(text):
            return np.asarray(backend.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
        return encoding.encode_to_numpy(text, disallowed_special=())

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(encode, texts)


def _may_have_long_words(text: str) -> bool:
    """Return whether a string may contain a word or a run of whitespace with at least ``2 * LONG_WORD`` characters.

    The string is divided into windows of ``LONG_WORD`` characters. A word or run of twice this length fills at least
    one window completely, so the function checks whether a window contains a single word, or only whitespace. It also
    returns True if the string contains ``SEPARATORS``, because only ``str.split`` splits words at these characters.
    """
    return any(separator in text for separator in SEPARATORS) or any(
        len(text[i : i + LONG_WORD].split(maxsplit=1)) < 2 for i in range(0, len(text) - LONG_WORD + 1, LONG_WORD)
    )


def _byte_by_character() -> dict[str, int]:
    """Return a mapping from each character of GPT-2's byte-level alphabet to the byte that it represents.

    A printable byte is represented by the character with the same code point, any other byte by a character at or above
    U+0100.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


@cache
def _same_unicode_classes() -> bool:
    """Return whether ``tiktoken`` and ``tokenizers`` classify letters, numbers and spaces identically.

    Each library includes its own version of the Unicode data.
    """
    characters = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    for class_, complement in ((r"\p{L}", r"\P{L}"), (r"\p{N}", r"\P{N}"), (r"\s", r"\S")):
        expected = normalizers.Replace(Regex(class_), "").normalize_str(characters)
        matched = tiktoken.Encoding("characters", pat_str=complement, mergeable_ranks=single_bytes, special_tokens={})
        ids = matched.encode_to_numpy(characters, disallowed_special=())
        if ids.astype(np.uint8).tobytes() != expected.encode():
            return False
    return True
