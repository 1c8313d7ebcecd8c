"""Byte-level byte-pair encoding: train one, load one, text to ids and back."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from lit_gpt_scratch.errors import UserError

END_OF_TEXT: Final = "<|endoftext|>"
"""Stands before every document: it ends the last one, and means "begin" to a model that generates."""
LARGEST: Final = 2**24
"""Tokens in a vocabulary: the trainer sets memory aside for as many as are asked for, and ends the process."""
PROBE: Final = " A  b\r\n\tÇé…ﬁ 東京 🎉"
"""Text that a tokenizer with a normaliser, or without bytes to fall back on, does not give back."""


class Tokenizer:
    """Text to token ids and back, without loss for any string.

    A thin hand on a ``tokenizers`` file, which is also what other tools read.

    Args:
        backend: A byte-level tokenizer that knows ``<|endoftext|>``.
    """

    def __init__(self, backend: Backend) -> None:
        end_of_text = backend.token_to_id(END_OF_TEXT)
        if end_of_text is None:
            raise UserError(f"the tokenizer has no token {END_OF_TEXT}; train one here, or add the token to it")
        # A document that happens to contain "<|endoftext|>" must not be able to end itself.
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.end_of_text: int = end_of_text

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn merges from texts: every byte, ``<|endoftext|>``, then the most frequent pairs.

        Raises:
            UserError: ``vocab_size`` has no room for the 256 bytes and the end of text, or is no size at all.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size > LARGEST:
            raise UserError(f"data.vocab_size is {vocab_size}; no tokenizer has more than {LARGEST:,}")
        if vocab_size < len(alphabet) + 1:
            raise UserError(f"data.vocab_size is {vocab_size}; bytes and end of text alone are {len(alphabet) + 1}")
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a ``tokenizer.json``, and compare it with the SHA-256 that ``save`` left beside it, if there is one.

        Raises:
            UserError: The file is missing, is no tokenizer, or is not what was saved.
        """
        try:
            content = path.read_bytes()
            seal = _seal(path)
            if seal.exists() and seal.read_bytes() != _checksum(content, path):
                raise UserError(f"it is not what was saved: {seal.name} says so; copy the two files together")
            tokenizer = cls.from_json(content.decode())
        except (OSError, UnicodeDecodeError, UserError) as error:
            raise UserError(f"{path} is not a usable tokenizer file ({error})") from error
        if tokenizer.decode(tokenizer.encode(PROBE)) != PROBE:
            raise UserError(f"{path} is not a usable tokenizer file (it loses text: it is not byte-level)")
        return tokenizer

    def save(self, path: Path) -> None:
        """Write a ``tokenizer.json``, and beside it a checksum that ``sha256sum -c`` knows, too."""
        content = self.to_json().encode()
        path.write_bytes(content)
        _seal(path).write_bytes(_checksum(content, path))

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """The inverse of ``to_json``."""
        try:
            backend = Backend.from_str(text)
        except Exception as error:  # the library raises nothing narrower than Exception
            raise UserError(f"not a tokenizer: {error}") from error
        return cls(backend)

    def to_json(self) -> str:
        """The whole tokenizer as the text of a ``tokenizer.json``."""
        text: str = self._backend.to_str(pretty=False)
        return text

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; it can be below what was asked for when the texts have too few pairs."""
        return 1 + max(self._backend.get_vocab().values())

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without an end of text."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_many(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """``encode`` for each text, on all cores."""
        for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False):
            yield encoding.ids

    def decode(self, ids: list[int]) -> str:
        """The text of some ids; bytes that form no UTF-8 show as U+FFFD, an end of text as itself."""
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come, a piece as soon as its bytes form whole characters."""
        stream = decoders.DecodeStream(skip_special_tokens=False)
        for token_id in ids:
            piece: str | None = stream.step(self._backend, token_id)
            if piece:
                yield piece

    def token_bytes(self) -> list[int]:
        """For every id, how many bytes of text it stands for; 0 for the end of text."""
        # In a byte-level vocabulary each character of a token is one byte.
        sizes = [0] * self.vocab_size
        for token, token_id in self._backend.get_vocab(with_added_tokens=False).items():
            sizes[token_id] = len(token)
        for token_id, added in self._backend.get_added_tokens_decoder().items():
            sizes[token_id] = 0 if added.special else len(added.content.encode())
        return sizes


def _seal(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _checksum(content: bytes, path: Path) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  {path.name}\n".encode()
