"""Output streams that escape control characters, redact secrets, and handle failed writes.

Every command prints through these streams, so that text from files and models is always escaped.
"""

import copy
import errno
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, TextIO

from lit_gpt_scratch.errors import UserError

CONTROLS: Final = "\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff"
"""Regular expression character ranges of control characters other than tab and newline, line separators, bidirectional
controls (which reorder the text around them, see https://trojansource.codes) and surrogates (which cannot be encoded).
"""
_UNSAFE: Final = re.compile(f"(?!\r\n)[{CONTROLS}]")
_UNSAFE_IN_LINE: Final = re.compile(f"[\t\n{CONTROLS}]")
_UNSAFE_IN_JSON: Final = re.compile(f"[{CONTROLS}]")

HIDDEN: Final = "***"
_NAME: Final = (
    r"(?:(?:pg|ssl)?pass(?:word|wd|phrase|file)?|pwd|secret|(?:auth|access)?token|credentials?|signature|sig|sslkey|"
    r"(?:api|access|secret|private)[_-]?key(?:[_-]?id)?)"
)
"""Pattern that matches the last part of a secret's name, as in ``X-Amz-Signature`` or ``trainer.logger.api_key``."""
_QUOTED: Final = r"\"[^\"]*\"|'[^']*'"
_URL: Final = re.compile(r"(?<![\w+.-])([\w+.-]+://)(?:[^\s\"'/?#]*|[^\s\"'/?#@:\[]+:(?!\d+/)[^\s\"']{0,200})@")
"""Pattern that matches the scheme, user and password of a URL; the password may contain slashes."""
_SETTING: Final = re.compile(rf"(?<![^\W_])({_NAME}=)(?:{_QUOTED}|[^\s&\"']+)", re.IGNORECASE)
_JSON_FIELD: Final = re.compile(rf"(?<![^\W_])({_NAME}[\"']\s*:\s*)(?:{_QUOTED}|[^\s&;,\"'}}]+)", re.IGNORECASE)
_FLAG: Final = re.compile(rf"(--(?:[^=]*[._-])?{_NAME})(=.*)?", re.IGNORECASE | re.DOTALL)

VERBATIM: Final = {"is_sample": True}
"""``extra`` argument for log calls whose message is generated text, which is not redacted."""

CURSOR_MOVEMENT: Final = re.compile("\r|(?:\x1b\\[A)+")
"""Pattern that matches the control characters that ``tqdm`` writes before a progress bar to redraw it."""
CLOSED_PIPE_CODE: Final = 128 + getattr(signal, "SIGPIPE", 13)
"""Exit code, as used by shells, if the reader of standard output closes the pipe, e.g. ``generate | head -1``."""


def escape_terminal(text: str) -> str:
    r"""Replace control characters other than tabs and newlines with visible escapes such as ``\x1b``."""
    return _UNSAFE.sub(_visible, text)


def escape_line(text: str) -> str:
    r"""Replace control characters, tabs and newlines with visible escapes such as ``\n``, to get a single line."""
    return _UNSAFE_IN_LINE.sub(_visible, text)


def quote_short(text: str, length: int = 200) -> str:
    """Shorten text from a file or a library to one line of at most ``length`` characters for an error message."""
    line = escape_line(" ".join(text[: 2 * length].split()))
    return line if len(text) <= length and len(line) <= length else f"{line[: length - 3]}..."


def dump_json(value: Any) -> str:
    """Serialize a value as one line of readable JSON that is safe to print on a terminal."""
    return _UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def _visible(found: re.Match[str]) -> str:
    return repr(found[0])[1:-1]


def redact(text: str) -> str:
    """Replace URL credentials, and values whose name denotes a secret (e.g. ``token=...``), with ``***``."""
    text = _URL.sub(rf"\1{HIDDEN}@", text)
    return _JSON_FIELD.sub(rf"\1{HIDDEN}", _SETTING.sub(rf"\1{HIDDEN}", text))


def redact_command(arguments: Sequence[str]) -> list[str]:
    """Apply ``redact`` to command-line arguments, and hide the entire value of each flag that takes a secret."""
    shown, follows = [], False
    for argument in arguments:
        flag = _FLAG.fullmatch(argument)
        has_value = flag is not None and flag[2] is not None
        shown.append(HIDDEN if follows else f"{flag[1]}={HIDDEN}" if flag and has_value else redact(argument))
        follows = flag is not None and not has_value and not follows
    return shown


class OutputStream:
    """Text stream that writes control characters as visible escapes, and handles failed writes.

    A failed write may be due to a closed terminal, a closed pipe or a full disk.

    Args:
        stream: The stream to write to, or None if it was closed when the process started (``>&-``).
        is_result: Whether the stream is standard output, which receives the result of a command. If so, a failed write
            raises ``UserError``, or ``SystemExit`` if the stream is a closed pipe. Otherwise, the stream receives
            messages and progress bars, and a failed write is ignored, because lost messages must not stop a run.
    """

    def __init__(self, stream: TextIO | None, is_result: bool) -> None:
        self.stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115,PTH123 - kept open
        self.is_result = is_result
        self.escapes = True
        self._is_closed = stream is None
        self._failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write text with its control characters escaped."""
        head = found[0] if not self.is_result and (found := CURSOR_MOVEMENT.match(text)) else ""
        self.write_exact(head + escape_terminal(text[len(head) :]) if self.escapes else text)
        return len(text)

    def write_exact(self, text: str) -> None:
        """Write text without escaping it."""
        self._try(lambda: self.stream.write(text), writes=bool(text))

    def flush(self) -> None:
        """Flush the stream."""
        self._try(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _try(self, operation: Any, writes: bool = False) -> None:
        try:
            if self._is_closed and writes:
                raise OSError(errno.EBADF, "it is closed")
            operation()
        except OSError as error:
            self._redirect_to_null()
            if self.is_result:
                self._failure = error
        if self._failure is None:
            return
        if isinstance(self._failure, BrokenPipeError):
            raise SystemExit(CLOSED_PIPE_CODE)
        raise UserError(f"cannot write to standard output: {self._failure.strerror}") from self._failure

    def _redirect_to_null(self) -> None:
        """Discard buffered output, which the interpreter would otherwise try to flush again at exit."""
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)


class EscapingFormatter(logging.Formatter):
    """Log formatter that redacts secrets, except in ``VERBATIM`` messages, and escapes line breaks in the arguments.

    Line breaks in arguments could otherwise be used to forge log lines. Line breaks in the message itself are kept, and
    all other control characters are escaped.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Format a log record."""
        record = copy.copy(record)
        if isinstance(record.args, tuple):
            record.args = tuple(a if hasattr(a, "__float__") else escape_line(str(a)) for a in record.args)
        text = super().format(record)
        return escape_terminal(text if getattr(record, "is_sample", False) else redact(text))


@contextmanager
def output_streams() -> Iterator[None]:
    """Context manager that wraps ``sys.stdout`` and ``sys.stderr`` in ``OutputStream`` objects.

    After an unexpected exception, the streams are not restored, so that control characters in the traceback are also
    escaped.
    """
    before = sys.stdout, sys.stderr
    _reserve_standard_descriptors()
    for stream in before:
        if reconfigure := getattr(stream, "reconfigure", None):  # a pipe's encoding may lack characters
            reconfigure(encoding="utf-8", errors="backslashreplace")
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115,PTH123 - kept open
    sys.stdout, sys.stderr = OutputStream(before[0], True), OutputStream(before[1], False)
    try:
        yield
    except SystemExit:
        sys.stdout, sys.stderr = before
        raise
    sys.stdout, sys.stderr = before


@contextmanager
def training_output() -> Iterator[None]:
    """Context manager for training that disables escaping of standard output and ignores failed writes to it.

    Callbacks may print to standard output, and progress bars of libraries move the cursor and print colors. ``fit``
    itself prints only to standard error.
    """
    stream = sys.stdout
    if not isinstance(stream, OutputStream):
        yield
        return
    stream.escapes = stream.is_result = False
    try:
        yield
    finally:
        stream.flush()
        stream.escapes = stream.is_result = True


def write_exact(text: str) -> None:
    """Write text to standard output without escaping it, and flush it."""
    if isinstance(sys.stdout, OutputStream):
        sys.stdout.write_exact(text)
    else:
        sys.stdout.write(text)
    sys.stdout.flush()


def write_generated(text: str) -> None:
    """Write generated text to standard output; control characters are escaped only if it is a terminal."""
    write_exact(escape_terminal(text) if sys.stdout.isatty() else text)


def _reserve_standard_descriptors() -> None:
    """Open the null device on each closed standard descriptor, so that no file opened later reuses it.

    Otherwise, the output of a library or a child process could be written to that file.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
