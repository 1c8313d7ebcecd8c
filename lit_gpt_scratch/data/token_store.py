"""Token ids on disk, mapped into memory, made once."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.corpus import SIDES
from lit_gpt_scratch.text.tokenizer import Tokenizer

FORMAT: Final = 2


@dataclass(frozen=True)
class Stream:
    """One side of a corpus as a single row of token ids, each document preceded by the end of text.

    Attributes:
        path: The file of little-endian ids.
        dtype: ``uint16`` or ``uint32``.
        n_tokens: Ids in the file, ends of text included.
        n_bytes: UTF-8 bytes of the documents' text.
        n_documents: Documents.
    """

    path: str
    dtype: str
    n_tokens: int
    n_bytes: int
    n_documents: int

    def open(self) -> NDArray[np.unsignedinteger[Any]]:
        """The ids as a read-only memory map, (n_tokens,).

        Raises:
            UserError: The file is missing or has another length.
        """
        expected = self.n_tokens * np.dtype(self.dtype).itemsize
        if not os.path.isfile(self.path) or os.path.getsize(self.path) != expected:
            raise UserError(
                f"{self.path} is damaged (it should have {expected} bytes); delete its folder and try again"
            )
        if self.n_tokens == 0:  # an empty file cannot be mapped
            return np.zeros(0, dtype=self.dtype)
        return np.memmap(self.path, dtype=self.dtype, mode="r")


@dataclass(frozen=True)
class TokenStore:
    """A prepared corpus: its tokenizer and its two streams, under the fingerprint of all that went in."""

    fingerprint: str
    tokenizer: Tokenizer
    train: Stream
    validation: Stream

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        """Open a folder that ``Recipe.prepare`` made.

        Raises:
            UserError: It is no such folder.
        """
        about = cls.about(folder)
        try:
            train, validation = (Stream(**{**about[side], "path": str(folder / about[side]["path"])}) for side in SIDES)
            return cls(about["fingerprint"], Tokenizer.load(folder / "tokenizer.json"), train, validation)
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder} is no token store ({error}); delete it and try again") from error

    @staticmethod
    def about(folder: Path) -> dict[str, Any]:
        """What a folder says of its tokens.

        Raises:
            UserError: It does not say anything.
        """
        try:
            found: dict[str, Any] = json.loads((folder / "store.json").read_text(encoding="utf-8"))
            return found
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is no token store ({error}); delete it and try again") from error
