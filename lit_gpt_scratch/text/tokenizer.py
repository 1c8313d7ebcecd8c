"""Text to token ids and back: a tokenizer that was trained here, or anybody's file."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import fast_encoder, tokenizer_training
from lit_gpt_scratch.text.atomic_files import atomic_file
from lit_gpt_scratch.text.tokenizer_training import END_OF_TEXT

END_OF_TEXT_NAMES: Final = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
"""What families of tokenizers call the token between two documents."""
GPT2_FILES: Final = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
"""GPT-2's vocabulary and merges: as they were published, and as ``transformers`` calls them."""
TOKENIZER_FILE: Final = "tokenizer.json"
ROUND_TRIP_TEXT: Final = " A  b\r\n\tÇé…ﬁ 東京 🎉"
"""Text that a tokenizer with a normaliser, or without bytes to fall back on, does not give back."""


class Tokenizer:
    """Text to token ids and back.

    A thin hand on a ``tokenizers`` file, which is also what other tools read.

    Args:
        backend: A tokenizer that knows a token for the end of text, by one of the names in ``END_OF_TEXT_NAMES``.
        start_of_text: See below; by default the end of text.

    Attributes:
        end_of_text: Id of the token that stands between documents.
        start_of_text: Id of the token that a model of this tokenizer has seen before every document. It is another one
            where a published model was trained so.
    """

    def __init__(self, backend: Backend, start_of_text: int | None = None) -> None:
        found = [place for name in END_OF_TEXT_NAMES if (place := backend.token_to_id(name)) is not None]
        if not found:
            raise UserError(f"the tokenizer has no token {END_OF_TEXT}; train one here, or add the token to it")
        # A document that happens to contain "<|endoftext|>" must not be able to end itself.
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.end_of_text: int = found[0]
        self.start_of_text = self.end_of_text if start_of_text is None else start_of_text

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, kind: str = "bpe", special: Iterable[str] = ()
    ) -> "Tokenizer":
        """Learn one from texts; see ``tokenizer_training.train_tokenizer``."""
        return cls(tokenizer_training.train_tokenizer(kind, texts, vocab_size, special))

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read one, and compare it with the SHA-256 that ``save`` left beside it, if there is one.

        Args:
            path: A ``tokenizer.json``; or a folder with one, or with GPT-2's two files.

        Raises:
            UserError: The file is missing, is no tokenizer, or is not what was saved.
        """
        try:
            for names in GPT2_FILES:
                if path.is_dir() and not (path / TOKENIZER_FILE).exists() and (path / names[0]).exists():
                    return cls(_gpt2(*(path / name for name in names)))
            path = path / TOKENIZER_FILE if path.is_dir() else path
            content = path.read_bytes()
            seal = _seal(path)
            if seal.exists() and seal.read_bytes() != _checksum(content, path):
                raise UserError(f"it is not what was saved: {seal.name} says so; copy the two files together")
            return cls.from_json(content.decode())
        except (OSError, UnicodeDecodeError, UserError) as error:
            raise UserError(f"{path} is not a usable tokenizer file ({error})") from error

    def save(self, path: Path) -> None:
        """Write a ``tokenizer.json``, and beside it a checksum that ``sha256sum -c`` knows, too."""
        content = self.to_json().encode()
        for place, written in ((path, content), (_seal(path), _checksum(content, path))):
            with atomic_file(place) as file:
                file.write(written)

    @classmethod
    def from_json(cls, text: str, start_of_text: int | None = None) -> "Tokenizer":
        """The inverse of ``to_json``, which does not hold ``start_of_text``."""
        try:
            backend = Backend.from_str(text)
        except Exception as error:  # the library raises nothing narrower than Exception
            raise UserError(f"not a tokenizer: {error}") from error
        return cls(backend, start_of_text)

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

    def encode_many(
        self, texts: Iterable[str], fast: bool = False, threads: int | None = None
    ) -> Iterator[NDArray[np.uint32]]:
        """``encode`` for each text, (n,) uint32.

        Args:
            texts: The texts.
            fast: Take a second to see whether the same ids can be had several times as fast.
            threads: Of the faster way; by default as many as there are cores.
        """
        return fast_encoder.encode(self._backend, self._proven if fast else None, texts, threads)

    @cached_property
    def _proven(self) -> tiktoken.Encoding | None:
        return fast_encoder.build_tiktoken_encoding(self._backend)

    def decode(self, ids: list[int]) -> str:
        """The text of some ids; bytes that form no UTF-8 show as U+FFFD, an end of text as itself."""
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text

    def decoder(self, after: Sequence[int] = ()) -> Callable[[int], str]:
        """For ids as they come: what text each one completes; bytes wait until they form whole characters.

        Args:
            after: Ids of the text that they follow: some tokenizers write a space between two words alone.
        """
        stream = decoders.DecodeStream(skip_special_tokens=False)
        for token_id in after:
            stream.step(self._backend, token_id)
        return lambda token_id: stream.step(self._backend, token_id) or ""

    @property
    def loss(self) -> str:
        """What text loses on its way to ids and back, as a sentence; empty where nothing is lost."""
        back = self.decode(self.encode(ROUND_TRIP_TEXT))
        if back == ROUND_TRIP_TEXT:
            return ""
        return f"text is not given back as it was: {ROUND_TRIP_TEXT!r} comes back as {back!r}"

    @property
    def template(self) -> list[int]:
        """The ids that the file itself would have around a text, as for a published model."""
        ids: list[int] = self._backend.encode("", add_special_tokens=True).ids
        return ids

    @property
    def unknown(self) -> int | None:
        """The id of what the tokenizer has no token for, if there can be such a thing."""
        name: str | None = getattr(self._backend.model, "unk_token", None)
        return None if name is None else self._backend.token_to_id(name)

    def special(self, token: str) -> int | None:
        """The id of a special token, by its text; None if there is none of that name."""
        added = self._backend.get_added_tokens_decoder().items()
        return next((token_id for token_id, one in added if one.special and one.content == token), None)

    def tokens(self) -> list[str]:
        """The text of every id, special tokens as they are; bytes that form no UTF-8 show as U+FFFD."""
        return [self.decode([token_id]) for token_id in range(self.vocab_size)]

    def token_bytes(self) -> list[int]:
        """For every id, how many bytes of text it stands for; 0 for special tokens, an unknown character too."""
        sizes = [0] * self.vocab_size
        prefix: str | None = getattr(self._backend.model, "continuing_subword_prefix", None)
        # In a byte-level vocabulary each character of a token is one byte.
        byte_level = "ByteLevel" in repr(self._backend.decoder)
        for token, token_id in self._backend.get_vocab(with_added_tokens=False).items():
            text = token.removeprefix(prefix) if prefix else token
            sizes[token_id] = len(text) if byte_level else len(text.replace("\u2581", " ").encode())
            if not byte_level and re.fullmatch("<0x[0-9A-F]{2}>", token):  # a byte that a family falls back on
                sizes[token_id] = 1
        for token_id, added in self._backend.get_added_tokens_decoder().items():
            sizes[token_id] = 0 if added.special else len(added.content.encode())
        return sizes


def _gpt2(vocabulary: Path, merges: Path) -> Backend:
    """The files as they were published with GPT-2."""
    try:
        backend = Backend(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises nothing narrower than Exception
        raise UserError(f"{vocabulary.name} and {merges.name} are not GPT-2's: {error}") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return backend


def _seal(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _checksum(content: bytes, path: Path) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  {path.name}\n".encode()
