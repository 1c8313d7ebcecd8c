"""Encoding a corpus: the same ids as ``tokenizers``, several times as fast, where that can be proven.

``tiktoken`` merges whichever neighbours make the token of lowest id; ``tokenizers`` merges the pair that stands first
in a list. For a byte-level BPE these are the same if

1. each pair of the list makes a token of its own, and their ids rise in the order of the list; and
2. each token, encoded alone, comes back as itself.

For let two tokens ``u`` and ``v`` stand side by side while ``tokenizers`` encodes a word, and ``uv`` be a token, too.
No merge has crossed their outer borders, so what happened inside is what happens when ``uv`` is encoded alone, and
that comes down to a single pair of tokens before it ends, by 2, as ``uv``: the pair that the list holds for it. So
``tiktoken`` never sees a pair that ``tokenizers`` would not merge, and by 1 both take the pairs in the same order.
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
"""The words of GPT-2, as ``tokenizers`` has them built in."""
LONG_WORD: Final = 500
"""Characters; ``tiktoken`` takes a time that grows with the square of a word's length, ``tokenizers`` does not."""
BYTE_LEVEL: Final = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def build_tiktoken_encoding(backend: Backend) -> tiktoken.Encoding | None:
    """An encoding with the ids of ``backend``, or None where that is not proven."""
    about: dict[str, Any] = json.loads(backend.to_str())
    model, words = about["model"], about["pre_tokenizer"] or {}
    more = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "unk_token", "ignore_merges")
    if model["type"] != "BPE" or any(model.get(key) for key in more) or about["normalizer"]:
        return None
    if any(words.get(key) != value for key, value in BYTE_LEVEL.items()) or not _same_characters():
        return None
    if any(not token["special"] for token in about["added_tokens"]) or not backend.encode_special_tokens:
        return None
    special = {token["content"]: token["id"] for token in about["added_tokens"]}
    bytes_of = _bytes_of_letters()
    vocabulary = {token: place for token, place in model["vocab"].items() if token not in special}
    if not set(bytes_of) <= vocabulary.keys() or not all(set(token) <= bytes_of.keys() for token in vocabulary):
        return None
    made = [a + b for a, b in model["merges"]]
    if not set(made) <= vocabulary.keys() or len(made) + len(bytes_of) != len(vocabulary):
        return None
    if not all(vocabulary[a] < vocabulary[b] for a, b in pairwise(made)):
        return None
    if any([piece.id for piece in backend.model.tokenize(token)] != [vocabulary[token]] for token in made):
        return None
    ranks = {bytes(bytes_of[letter] for letter in token): place for token, place in vocabulary.items()}
    return tiktoken.Encoding("proven", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def encode(
    backend: Backend, proven: tiktoken.Encoding | None, texts: Iterable[str], threads: int | None = None
) -> Iterator[NDArray[np.uint32]]:
    """The ids of each text, (n,) uint32, on all cores, or on so many."""
    if proven is None:
        for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False):
            yield np.asarray(encoding.ids, dtype=np.uint32)
        return

    def ids(text: str) -> NDArray[np.uint32]:
        if _may_have_long_words(text):
            return np.asarray(backend.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
        return proven.encode_to_numpy(text, disallowed_special=())

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(ids, texts)


def _may_have_long_words(text: str) -> bool:
    """True for every text with a word, or a row of spaces, of 2 ``LONG_WORD``: it fills a stretch of that length."""
    return any(
        len(text[i : i + LONG_WORD].split(maxsplit=1)) < 2 for i in range(0, len(text) - LONG_WORD + 1, LONG_WORD)
    )


def _bytes_of_letters() -> dict[str, int]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the others follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


@cache
def _same_characters() -> bool:
    """Whether both libraries know the same letters, numbers and spaces: each goes by its own version of Unicode."""
    characters = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    single = {bytes([byte]): byte for byte in range(256)}
    for kind, others in ((r"\p{L}", r"\P{L}"), (r"\p{N}", r"\P{N}"), (r"\s", r"\S")):
        theirs = normalizers.Replace(Regex(kind), "").normalize_str(characters)
        matched = tiktoken.Encoding("characters", pat_str=others, mergeable_ranks=single, special_tokens={})
        if matched.encode_to_numpy(characters, disallowed_special=()).astype(np.uint8).tobytes() != theirs.encode():
            return False
    return True
