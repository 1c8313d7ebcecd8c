"""Cleaning: steps from a document to a document, or to a reason for rejecting it.

A pipeline is a list of steps, chosen and ordered in a config; by default exact duplicates are dropped, and nothing else
is done to anybody's text. A step is a frozen dataclass: its arguments are what it does, and are part of a corpus' key.
"""

import hashlib
import inspect
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
"""Why a document is rejected: a few words that are the same for all documents of that fault."""


class CleaningStep:
    """A step of one of the three kinds below."""

    @property
    def name(self) -> str:
        """What the account calls it."""
        return type(self).__name__

    @property
    def code(self) -> str:
        """A hash of the module it is written in: a corpus is made anew when somebody changes a rule."""
        try:
            written: Any = inspect.getsource(sys.modules[type(self).__module__])
        except (TypeError, OSError):  # in a notebook, or on a prompt
            written = [
                (name, function.__code__.co_code, function.__code__.co_consts)
                for name, function in vars(type(self)).items()
                if inspect.isfunction(function)
            ]
        return hashlib.sha256(repr(written).encode()).hexdigest()[:16]


class PerDocumentStep(CleaningStep, ABC):
    """What is made of a document from that document alone."""

    @abstractmethod
    def __call__(self, document: Document) -> Document | RejectionReason:
        """The document, the same or another text under its id; or why it is rejected."""


class DeduplicationStep(CleaningStep, ABC):
    """A step that judges a document by those before it.

    Documents are sketched side by side, in several processes, and judged one after the other, in their order.
    """

    cheap: ClassVar[bool] = False
    """Whether a sketch costs less than to send the document to another process."""

    @abstractmethod
    def sketch(self, document: Document) -> Any:
        """What has to be known of a document to judge it."""

    @abstractmethod
    def judge(self, folder: Path) -> AbstractContextManager[Callable[[Any], RejectionReason | None]]:
        """A judge of sketches that remembers those that passed; ``folder`` takes what need not be in memory."""


class DecontaminationStep(CleaningStep, ABC):
    """A step that judges training documents by those held out: it comes after the split, and so after all others."""

    @abstractmethod
    def judge(self, held_out: Iterable[Document]) -> Callable[[Document], RejectionReason | None]:
        """A judge of training documents."""


@dataclass(frozen=True)
class UnicodeNormalization(PerDocumentStep):
    """One code for what looks the same: ``NFC`` composes, ``NFKC`` also makes ligatures and wide letters plain.

    Args:
        form: One of Unicode's normal forms (https://unicode.org/reports/tr15).
    """

    form: Literal["NFC", "NFD", "NFKC", "NFKD"] = "NFC"

    def __call__(self, document: Document) -> Document:
        """Normalise."""
        return replace(document, text=unicodedata.normalize(self.form, document.text))


CONTROL_CHARACTERS: Final = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\u200b\u2060\ufeff\ufffe\uffff]")


@dataclass(frozen=True)
class ControlCharacters(PerDocumentStep):
    """Drop what no one sees: C0 and C1 controls but tab, line feeds, form feed and U+0085; zero-width marks, and BOMs.

    The joiners U+200C and U+200D stay: words and emoji are written with them.
    """

    def __call__(self, document: Document) -> Document:
        """Drop them."""
        return replace(document, text=CONTROL_CHARACTERS.sub("", document.text))


@dataclass(frozen=True)
class Whitespace(PerDocumentStep):
    """One kind of line end, no space at the end of a line, no more than ``blank_lines`` in a row.

    Spaces at the start of a line stay: they are Python's grammar and a poem's shape.

    Args:
        blank_lines: Empty lines to keep between two that are not.
        spaces: Make a row of spaces and tabs inside a line one space.
    """

    blank_lines: int = 1
    spaces: bool = False

    def __post_init__(self) -> None:
        if self.blank_lines < 0:
            raise UserError(f"data.cleaning: Whitespace.blank_lines is {self.blank_lines}; it must be 0 or more")

    def __call__(self, document: Document) -> Document:
        """Tidy."""
        text = re.sub(r"\r\n?|[\u2028\u2029\u0085]", "\n", document.text)
        text = "\n".join(line.rstrip() for line in text.split("\n"))
        text = re.sub(rf"\n{{{self.blank_lines + 2},}}", "\n" * (self.blank_lines + 1), text)
        if self.spaces:
            text = re.sub(r"(?<=\S)[^\S\n]+", " ", text)
        return replace(document, text=text)


@dataclass(frozen=True)
class Length(PerDocumentStep):
    """Reject what is too short or too long.

    Args:
        at_least: Characters that a document has at least.
        at_most: Characters that it has at most; none by default.
    """

    at_least: int = 1
    at_most: int | None = None

    def __post_init__(self) -> None:
        if self.at_most is not None and self.at_most < self.at_least:
            raise UserError(f"data.cleaning: Length.at_most ({self.at_most}) is below at_least ({self.at_least})")

    def __call__(self, document: Document) -> Document | RejectionReason:
        """Measure."""
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
    """Put words in place of e-mail and IP addresses (https://arxiv.org/abs/2406.17557, section 3.7).

    Args:
        email: Stands for an e-mail address.
        ip: Stands for an IPv4 or IPv6 address.
    """

    email: str = "email@example.com"
    ip: str = "192.0.2.1"

    def __call__(self, document: Document) -> Document:
        """Mask."""
        text = EMAIL.sub(lambda _: self.email, document.text) if "@" in document.text else document.text
        text = IPV4.sub(lambda _: self.ip, text)
        return replace(document, text=IPV6.sub(lambda match: self.ip if _is_ipv6(match[0]) else match[0], text))


def _is_ipv6(found: str) -> bool:
    """Whether it is an address that could be somebody's; ``10::20`` and ``ace::Face`` in code are not taken for one."""
    import ipaddress

    try:
        groups = [group for group in ipaddress.IPv6Address(found).compressed.split(":") if group]
    except ValueError:
        return False
    return len(groups) >= 3 or groups[:1] == ["fe80"]


def validate_steps(steps: Sequence[CleaningStep]) -> None:
    """Refuse steps that are none, miss a setting, or stand where they cannot.

    Raises:
        UserError: One of them does; it is named.
    """
    for step in steps:
        if not isinstance(step, PerDocumentStep | DeduplicationStep | DecontaminationStep):
            raise UserError(f"data.cleaning: {step.name} is none of the three kinds of CleaningStep")
        settings: tuple[Field[Any], ...] = fields(step) if is_dataclass(step) else ()
        for setting in settings:
            if getattr(step, setting.name) is None and setting.default is not None:
                raise UserError(f"data.cleaning: {step.name}.{setting.name} is null; leave it out for its default")
    first = next((place for place, step in enumerate(steps) if isinstance(step, DecontaminationStep)), None)
    for step in steps[first:] if first is not None else ():
        if not isinstance(step, DecontaminationStep):
            raise UserError(f"data.cleaning: put {step.name} before {steps[first or 0].name}")
