"""Cleaning steps that edit or reject documents.

The pipeline is a list of steps, which are selected and ordered in the config; by default, only exact duplicates are
removed. A step is a frozen dataclass whose fields determine its behavior and are part of the cache key of the corpus.
"""

import hashlib
import inspect
import ipaddress
import re
import sys
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.document import Document

RejectionReason = str
"""Short phrase that states why a document was rejected; identical for all documents rejected by the same rule."""


class CleaningStep:
    """Base class of the three types of cleaning steps."""

    @property
    def name(self) -> str:
        """Name of the step in the cleaning report."""
        return type(self).__name__

    @property
    def source_hash(self) -> str:
        """Hash of the source code that defines the step; a corpus is cleaned again if this code changes."""
        try:
            source: Any = inspect.getsource(sys.modules[type(self).__module__])
        except (TypeError, OSError):  # the step is defined in a notebook or an interactive session
            source = [
                (name, function.__code__.co_code, function.__code__.co_consts)
                for name, function in vars(type(self)).items()
                if inspect.isfunction(function)
            ]
        return hashlib.sha256(repr(source).encode()).hexdigest()[:16]


class PerDocumentStep(CleaningStep, ABC):
    """Cleaning step that edits or rejects each document independently of all others."""

    @abstractmethod
    def __call__(self, document: Document) -> Document | RejectionReason:
        """Return the document, or the reason for rejecting it.

        The text of the returned document may be edited, but its id must not change.
        """


class DeduplicationStep(CleaningStep, ABC):
    """Cleaning step that rejects duplicates of earlier documents.

    Several processes compute a sketch of each document in parallel; the sketches are then compared sequentially, in
    document order.
    """

    cheap: ClassVar[bool] = False
    """Whether computing a sketch is cheaper than sending the document to another process."""

    @abstractmethod
    def sketch(self, document: Document) -> Any:
        """Return the sketch: the data that represents the document when it is compared with other documents."""

    @abstractmethod
    def build_filter(self, folder: Path) -> AbstractContextManager[Callable[[Any], RejectionReason | None]]:
        """Return a context manager that yields a filter for sketches.

        The filter compares a sketch with all sketches that it has already accepted. It returns None to accept the
        document, or the reason for rejecting it. The filter may store files in ``folder``.
        """


class DecontaminationStep(CleaningStep, ABC):
    """Cleaning step, run after the split, that rejects training documents that overlap with validation documents."""

    @abstractmethod
    def build_filter(self, held_out: Iterable[Document]) -> Callable[[Document], RejectionReason | None]:
        """Return a filter for training documents.

        The filter returns None to accept a document or the reason for rejecting it.

        Args:
            held_out: Validation documents.
        """


@dataclass(frozen=True)
class UnicodeNormalization(PerDocumentStep):
    """Cleaning step that applies Unicode normalization.

    Args:
        form: Unicode normalization form (https://unicode.org/reports/tr15). ``NFC`` composes characters; ``NFKC`` also
            replaces ligatures and full-width letters.
    """

    form: Literal["NFC", "NFD", "NFKC", "NFKD"] = "NFC"

    def __call__(self, document: Document) -> Document:
        """Return the document with normalized text."""
        return replace(document, text=unicodedata.normalize(self.form, document.text))


CONTROL_CHARACTERS: Final = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\u200b\u2060\ufeff\ufffe\uffff]")


@dataclass(frozen=True)
class ControlCharacters(PerDocumentStep):
    """Cleaning step that removes C0 and C1 control characters, zero-width characters and byte order marks.

    Tabs, line feeds, carriage returns, form feeds and U+0085 are kept, as are the joiners U+200C and U+200D, which
    occur in words and emoji.
    """

    def __call__(self, document: Document) -> Document:
        """Return the document without invisible characters."""
        return replace(document, text=CONTROL_CHARACTERS.sub("", document.text))


@dataclass(frozen=True)
class Whitespace(PerDocumentStep):
    r"""Cleaning step that converts line endings to ``\n``, strips trailing whitespace and limits blank lines.

    Leading spaces are kept because they are significant in source code and poems.

    Args:
        blank_lines: Maximum number of consecutive blank lines.
        spaces: Whether to collapse runs of spaces and tabs within a line to one space.
    """

    blank_lines: int = 1
    spaces: bool = False

    def __post_init__(self) -> None:
        if self.blank_lines < 0:
            raise UserError(f"data.cleaning: Whitespace.blank_lines is {self.blank_lines}; it must be 0 or more")

    def __call__(self, document: Document) -> Document:
        """Return the document with normalized whitespace."""
        text = re.sub(r"\r\n?|[\u2028\u2029\u0085]", "\n", document.text)
        text = "\n".join(line.rstrip() for line in text.split("\n"))
        text = re.sub(rf"\n{{{self.blank_lines + 2},}}", "\n" * (self.blank_lines + 1), text)
        if self.spaces:
            text = re.sub(r"(?<=\S)[^\S\n]+", " ", text)
        return replace(document, text=text)


@dataclass(frozen=True)
class Length(PerDocumentStep):
    """Cleaning step that rejects documents that are too short or too long.

    Args:
        at_least: Minimum number of characters.
        at_most: Maximum number of characters; None disables the limit.
    """

    at_least: int = 1
    at_most: int | None = None

    def __post_init__(self) -> None:
        if self.at_most is not None and self.at_most < self.at_least:
            raise UserError(
                f"data.cleaning: Length.at_most is {self.at_most}; it must not be less than at_least ({self.at_least})"
            )

    def __call__(self, document: Document) -> Document | RejectionReason:
        """Return the document, or the reason for rejecting it."""
        if len(document.text) < self.at_least:
            return f"fewer than {self.at_least:,} characters"
        if self.at_most is not None and len(document.text) > self.at_most:
            return f"more than {self.at_most:,} characters"
        return document


EMAIL: Final = re.compile(
    r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,63}\b"
)
OCTET: Final = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
IPV4: Final = re.compile(rf"(?<![\d.]){OCTET}(?:\.{OCTET}){{3}}(?![\d.]*\d)")
IPV6: Final = re.compile(r"(?<![\w:.])(?=[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:)[0-9A-Fa-f:]{2,39}(?![\w:])")


@dataclass(frozen=True)
class MaskContacts(PerDocumentStep):
    """Cleaning step that replaces e-mail and IP addresses with placeholders.

    The addresses are masked as in FineWeb (https://arxiv.org/abs/2406.17557, section 3.7).

    Args:
        email: Placeholder for an e-mail address.
        ip: Placeholder for an IPv4 or IPv6 address.
    """

    email: str = "email@example.com"
    ip: str = "192.0.2.1"

    def __call__(self, document: Document) -> Document:
        """Return the document with all addresses replaced."""
        text = EMAIL.sub(lambda _: self.email, document.text) if "@" in document.text else document.text
        text = IPV4.sub(lambda _: self.ip, text)
        return replace(document, text=IPV6.sub(lambda match: self.ip if _is_ipv6(match[0]) else match[0], text))


def _is_ipv6(candidate: str) -> bool:
    """Return whether a string is likely an IPv6 address, and not source code such as ``10::20`` or ``ace::Face``."""
    try:
        groups = [group for group in ipaddress.IPv6Address(candidate).compressed.split(":") if group]
    except ValueError:
        return False
    return len(groups) >= 3 or groups[:1] == ["fe80"]


def validate_steps(steps: Sequence[CleaningStep]) -> None:
    """Check that all entries are cleaning steps with valid settings, and that decontamination steps come last.

    A setting may be None only if its default is None.

    Raises:
        UserError: A step is invalid; the message names the step.
    """
    for step in steps:
        if not isinstance(step, PerDocumentStep | DeduplicationStep | DecontaminationStep):
            raise UserError(
                f"data.cleaning: {step.name} is not a PerDocumentStep, DeduplicationStep or DecontaminationStep"
            )
        settings: tuple[Field[Any], ...] = fields(step) if is_dataclass(step) else ()
        for setting in settings:
            if getattr(step, setting.name) is None and setting.default is not None:
                raise UserError(f"data.cleaning: {step.name}.{setting.name} is null; remove it to use the default")
    first = next((index for index, step in enumerate(steps) if isinstance(step, DecontaminationStep)), None)
    for step in steps[first:] if first is not None else ():
        if not isinstance(step, DecontaminationStep):
            raise UserError(f"data.cleaning: {step.name} must come before {steps[first or 0].name}; reorder the steps")
