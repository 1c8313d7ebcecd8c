"""Tokenizer that converts text to token ids and back, either newly trained or loaded from a ``tokenizer.json``."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.terminal_output import quote_short
from lit_gpt_scratch.text import fast_encoder
from lit_gpt_scratch.text.atomic_files import write_atomically
from lit_gpt_scratch.text.published_settings import PublishedSettings
from lit_gpt_scratch.text.text_bytes import share_bytes
from lit_gpt_scratch.text.tokenizer_training import BYTES, END_OF_TEXT, train_tokenizer
from lit_gpt_scratch.text.tokenizer_validation import validate_tokenizer_json

END_OF_TEXT_NAMES: Final = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "[SEP]")
"""End-of-text token strings of various tokenizer families, in order of preference."""
GPT2_FILES: Final = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
"""File names of GPT-2's vocabulary and merges, as published by OpenAI and as used by ``transformers``."""
TOKENIZER_FILE: Final = "tokenizer.json"
ROUND_TRIP_TEXTS: Final = (" A  b\r\n\tÇé…ﬁ 東京 🎉", "e\u0301 , b's \n")
"""Test strings. Encoding and decoding change at least one of them if the tokenizer normalizes text, adds or removes
whitespace, or has no byte fallback."""
MAX_ID_RATIO: Final = 16
"""Maximum ratio of the largest token id to the number of tokens; limits the length of lists indexed by token id."""


class Tokenizer:
    """Tokenizer that converts text to token ids and back.

    The class is a thin wrapper around ``tokenizers.Tokenizer``, so other tools can read the saved file.

    Args:
        backend: Tokenizer to wrap; it must contain a token in ``END_OF_TEXT_NAMES``, unless ``published`` specifies an
            end-of-text token.
        start_of_text: Id of the start-of-text token; if None, the end-of-text token is used.
        published: Settings of the published model that the tokenizer belongs to.

    Raises:
        UserError: There is no end-of-text token, or ordinary text may be encoded as a special token.

    Attributes:
        end_of_text: Id of the end-of-text token, which separates documents.
        start_of_text: Id of the token that precedes every document in training. It differs from the end-of-text token
            in some published models.
        published: Settings of the published model that the tokenizer belongs to; None for other tokenizers.
    """

    def __init__(
        self, backend: Backend, start_of_text: int | None = None, published: PublishedSettings | None = None
    ) -> None:
        ids = set(backend.get_vocab().values())
        found = [id_ for name in END_OF_TEXT_NAMES if (id_ := backend.token_to_id(name)) is not None]
        if published is not None:
            found += [id_ for id_ in published.eos_ids if id_ in ids]
        if not found:
            raise UserError(
                f"the tokenizer has no end-of-text token; add {END_OF_TEXT} to its file, or train a new tokenizer"
            )
        if max(ids) > MAX_ID_RATIO * len(ids):
            raise UserError(f"the tokenizer has {len(ids):,} tokens, but ids up to {max(ids):,}; renumber the tokens")
        # Special tokens in documents are encoded as ordinary text, so that "<|endoftext|>" does not end a document.
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._original_json: str | None = None
        """Original text of the tokenizer file if the backend was modified, otherwise None."""
        self._split_special_tokens()
        self.end_of_text: int = found[0]
        self.start_of_text = self.end_of_text if start_of_text is None else start_of_text
        self.published = published

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, kind: str = "bpe", special: Iterable[str] = ()
    ) -> "Tokenizer":
        """Train a tokenizer; see ``train_tokenizer`` for the arguments."""
        return cls(train_tokenizer(kind, texts, vocab_size, special))

    @classmethod
    def load(cls, path: Path, published: PublishedSettings | None = None) -> "Tokenizer":
        """Load a tokenizer, and verify its SHA-256 checksum if a checksum file is next to it.

        Args:
            path: Path to a ``tokenizer.json``, or to a folder that contains a ``tokenizer.json`` or one of the file
                pairs in ``GPT2_FILES``.
            published: Settings of the published model that the tokenizer belongs to.

        Raises:
            UserError: The file is missing, is not a valid tokenizer, or does not match its checksum.
        """
        try:
            for names in GPT2_FILES:
                if path.is_dir() and not (path / TOKENIZER_FILE).exists() and (path / names[0]).exists():
                    return cls(_load_gpt2_files(*(path / name for name in names)), published=published)
            path = path / TOKENIZER_FILE if path.is_dir() else path
            content = path.read_bytes()
            checksum_path = _checksum_path(path)
            if checksum_path.exists() and checksum_path.read_bytes() != _checksum(content, path):
                raise UserError(f"its checksum does not match the one in {checksum_path.name}; copy both files again")
            return cls.from_json(content.decode(), published=published)
        except (OSError, UnicodeDecodeError, UserError) as error:
            raise UserError(f"{path} is not a usable tokenizer file ({error})") from error

    def save(self, path: Path) -> None:
        """Write a ``tokenizer.json``, and next to it a checksum file that ``sha256sum -c`` can read."""
        content = self.to_json().encode()
        for target, data in ((path, content), (_checksum_path(path), _checksum(content, path))):
            write_atomically(target, data)

    @classmethod
    def from_json(
        cls, text: str, start_of_text: int | None = None, published: PublishedSettings | None = None
    ) -> "Tokenizer":
        """Build a tokenizer from the text of a ``tokenizer.json``, which does not include the other arguments.

        Raises:
            UserError: The text is not a valid tokenizer, or could hang or crash this process.
        """
        validate_tokenizer_json(text)
        with _library_errors("invalid tokenizer"):
            backend = Backend.from_str(text)
        return cls(backend, start_of_text, published)

    def to_json(self) -> str:
        """Return the tokenizer as the text of a ``tokenizer.json``."""
        text: str = self._original_json or self._backend.to_str(pretty=False)
        return text

    @property
    def vocab_size(self) -> int:
        """Largest token id plus 1; it may be smaller than the vocabulary size requested for training."""
        return 1 + max(self._backend.get_vocab().values())

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a string, without an end-of-text token."""
        with _library_errors("the tokenizer cannot encode the text", self._has_pattern):
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_with_special_tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenize text, such as a rendered template, and encode special token strings as special tokens.

        Args:
            text: String to tokenize; it must contain all required special tokens, because none are added.

        Returns:
            Token ids, of shape (n,), and the character range ``(start, stop)`` that each of the n tokens represents.
        """
        with _library_errors("the tokenizer cannot encode the text", self._has_pattern):
            encoding = self._parsing_backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    @cached_property
    def _parsing_backend(self) -> Backend:
        """Copy of the backend that, unlike ``encode``, encodes special token strings as special tokens."""
        backend = Backend.from_str(self.to_json())
        backend.encode_special_tokens = False
        backend.no_padding()
        backend.no_truncation()
        backend.post_processor = None  # it would change the offsets
        return backend

    def encode_many(
        self, texts: Iterable[str], fast: bool = False, threads: int | None = None
    ) -> Iterator[NDArray[np.uint32]]:
        """Yield the token ids of each string as a uint32 array, identical to those returned by ``encode``.

        Args:
            texts: Strings to encode.
            fast: Whether to use an encoder that is several times faster, if it provably returns the same ids; the check
                takes about a second.
            threads: Number of threads for the fast encoder; None uses the default of ``ThreadPoolExecutor``.
        """
        encoding = self._fast_encoding if fast else None
        with _library_errors("the tokenizer cannot encode the text", self._has_pattern):
            encoded = fast_encoder.encode_batch(self._backend, encoding, texts, threads)
            if encoding is None:  # all texts are encoded before the first result
                encoded = iter(list(encoded))
        with _library_errors("the tokenizer cannot encode the text"):
            yield from encoded

    @cached_property
    def _has_pattern(self) -> bool:
        """Whether the tokenizer contains a regular expression, which may exceed the limits of its library."""
        return "Regex(" in repr((self._backend.normalizer, self._backend.pre_tokenizer))

    @cached_property
    def _fast_encoding(self) -> tiktoken.Encoding | None:
        return fast_encoder.build_tiktoken_encoding(self._backend)

    def decode(self, ids: list[int]) -> str:
        """Decode token ids to a string; invalid UTF-8 is replaced with U+FFFD, and special tokens are included."""
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text

    def stream_decoder(self, after: Sequence[int] = ()) -> Callable[[int], str]:
        """Return a function that decodes one id at a time; bytes are buffered until they form complete characters.

        Args:
            after: Token ids of the preceding text; they may determine whether the first token starts with a space.
        """
        stream = decoders.DecodeStream(skip_special_tokens=False)
        for token_id in after:
            stream.step(self._backend, token_id)
        return lambda token_id: stream.step(self._backend, token_id) or ""

    @property
    def round_trip_loss(self) -> str:
        """Description of a test string that encoding and decoding change, or an empty string if there is none."""
        for text in ROUND_TRIP_TEXTS:
            if (decoded := self.decode(self.encode(text))) != text:
                return f"encoding and decoding change text: {text!r} becomes {decoded!r}"
        return ""

    @property
    def post_processor_ids(self) -> list[int]:
        """Token ids that the post-processor in the tokenizer file adds to every encoded text."""
        ids: list[int] = self._backend.encode("", add_special_tokens=True).ids
        return ids

    @cached_property
    def normalizes_special_tokens(self) -> bool:
        """Whether text is normalized before special tokens are matched, and may thus turn into a special token."""
        added = self._backend.get_added_tokens_decoder().values()
        return self._backend.normalizer is not None and any(entry.special and entry.normalized for entry in added)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids of all tokens that end generated text: end-of-text, and those specified by the published model."""
        published = self.published or PublishedSettings()
        named = self.special_token_id(published.tokens.get("eos_token", ""))
        return frozenset([self.end_of_text, *(published.eos_ids or ([] if named is None else [named]))])

    @property
    def unknown_id(self) -> int | None:
        """Id of the unknown token, or None if the tokenizer has no unknown token."""
        if isinstance(self._backend.model, models.Unigram):
            id_: int | None = json.loads(self._backend.to_str())["model"]["unk_id"]
            return id_
        name: str | None = getattr(self._backend.model, "unk_token", None)
        return None if name is None else self._backend.token_to_id(name)

    def token_name(self, token_id: int) -> str:
        """Return a token's vocabulary string, which differs from its text in most tokenizer types."""
        return str(self._backend.id_to_token(token_id))

    def special_token_id(self, token: str) -> int | None:
        """Return the id of a special token, or None if the tokenizer has no such special token."""
        return self.special_tokens.get(token)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of all special tokens, keyed by token string."""
        added = self._backend.get_added_tokens_decoder().items()
        return {entry.content: id_ for id_, entry in added if entry.special}

    def tokens(self) -> list[str]:
        """Return the text of every token, indexed by token id; invalid UTF-8 is replaced with U+FFFD."""
        return [self.decode([token_id]) for token_id in range(self.vocab_size)]

    def token_bytes(self) -> list[int]:
        """Return each token's decoded size in bytes within a text, indexed by token id; 0 for special tokens.

        At the start of a text, a token may represent one byte less, because some tokenizers prepend a space.
        """
        sizes, count = [0] * self.vocab_size, _decoded_byte_counter(self._backend)
        for token, token_id in self._backend.get_vocab(with_added_tokens=False).items():
            sizes[token_id] = count(token)
        for token_id, entry in self._backend.get_added_tokens_decoder().items():
            sizes[token_id] = 0 if entry.special else len(entry.content.encode())
        return sizes

    @cached_property
    def _token_bytes(self) -> NDArray[np.int64]:
        return np.array(self.token_bytes(), dtype=np.int64)

    def distribute_bytes(self, ids: Sequence[int] | NDArray[np.integer[Any]], n_bytes: int) -> NDArray[np.int64]:
        """Distribute a text's byte count over its tokens, in proportion to ``token_bytes``; see ``text.text_bytes``.

        Args:
            ids: Token ids of the text, of shape (n,).
            n_bytes: Size of the text in UTF-8 bytes.

        Returns:
            Number of bytes for each token, of shape (n,), summing to ``n_bytes`` if there are any tokens.
        """
        sizes = self._token_bytes[np.asarray(ids, dtype=np.int64)]
        before = np.concatenate([[0], np.cumsum(sizes)])
        return np.diff(share_bytes(before, np.arange(len(before)), n_bytes))

    def _split_special_tokens(self) -> None:
        """Add a pre-tokenizer that splits special token strings, if ordinary text could be encoded as a special token.

        This is the case if the model's vocabulary contains its special tokens, as in T5.

        Raises:
            UserError: A special token is a single character and therefore cannot be split.
        """
        names = self._special_tokens_in_text()
        if not names:
            return
        self._original_json = self._backend.to_str(pretty=False)
        starts = [f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names if len(name) > 1]
        split = pre_tokenizers.Split(Regex("|".join(starts)), "isolated")
        before = self._backend.pre_tokenizer
        self._backend.pre_tokenizer = pre_tokenizers.Sequence([before, split]) if before else split
        if names := self._special_tokens_in_text():
            raise UserError(
                f"ordinary text that contains {names[0]!r} may be encoded as this special token; rename the token in "
                "the tokenizer file"
            )

    def _special_tokens_in_text(self) -> list[str]:
        """Return the special tokens that the tokenizer recognizes in ordinary text, excluding the unknown token."""
        found = {
            id_: name
            for name, id_ in self.special_tokens.items()
            if any(id_ in self.encode(text) for text in {name, self.decode([id_])})
        }
        unknown = self.unknown_id if found else None
        return [name for id_, name in found.items() if id_ != unknown]


def _decoded_byte_counter(backend: Backend) -> Callable[[str], int]:
    """Return a function that counts the bytes to which a token decodes within a text."""
    decoder, steps = backend.decoder, repr(backend.decoder)
    if "ByteLevel" in steps:  # each character of a token represents one byte
        prefix: str = getattr(backend.model, "continuing_subword_prefix", None) or ""
        characters = frozenset(BYTES)

        def count_characters(token: str) -> int:
            text = token.removeprefix(prefix)
            return len(text) if characters.issuperset(text) else len(text.encode())

        return count_characters

    # Other tokens surround the token, because a decoder may treat the first and the last token differently.
    decode: Callable[[list[str]], str] = decoder.decode if decoder else " ".join
    others = len(decode(["a", "a"]).encode())

    def count_decoded(token: str) -> int:
        if "ByteFallback" in steps and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return 1
        return max(0, len(decode(["a", token, "a"]).encode()) - others)

    return count_decoded


@contextmanager
def _library_errors(problem: str, may_panic: bool = False) -> Iterator[None]:
    """Context manager that converts the errors of ``tokenizers`` (plain exceptions and panics) to ``UserError``.

    Args:
        problem: Start of the error message.
        may_panic: Whether to discard standard error, to which Rust prints panics and stack traces.
    """
    try:
        with _discarded_stderr() if may_panic else nullcontext():
            yield
    except BaseException as error:  # a panic in Rust is not an Exception
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{problem}: {quote_short(str(error))}") from error


_stderr_lock = Lock()


@contextmanager
def _discarded_stderr() -> Iterator[None]:
    """Context manager that redirects the process's file descriptor 2 to the null device."""
    with _stderr_lock:
        try:
            saved = os.dup(2)
        except OSError:  # it is closed
            saved = None
        if saved is None:
            yield
            return
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, 2)
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            os.close(null)


def _load_gpt2_files(vocabulary: Path, merges: Path) -> Backend:
    """Load GPT-2's tokenizer from its vocabulary and merges files."""
    with _library_errors(f"{vocabulary.name} and {merges.name} are not GPT-2's vocabulary and merges"):
        backend = Backend(models.BPE.from_file(str(vocabulary), str(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return backend


def _checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _checksum(content: bytes, path: Path) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  {path.name}\n".encode()
