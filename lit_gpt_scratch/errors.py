"""Define the exception for user errors, and describe invalid YAML and environment errors, such as a full disk."""

import errno
import os
import re
from collections.abc import Iterator
from typing import Final


class UserError(ValueError):
    """Raised for a mistake in a flag, file or config. The message is one line: what is wrong, where, and what to do.

    Every command prints the message without a traceback and exits with code 2. Any other exception is a bug, and its
    traceback is printed, unless ``describe_environment_error`` attributes it to the environment.
    """


ENVIRONMENT_ERRORS: Final[dict[int, str]] = {
    errno.ENOSPC: "free disk space, or use another disk",
    errno.EDQUOT: "free disk space, or use another disk",
    errno.EFBIG: "raise the file size limit with ulimit -f, or use another disk",
    errno.EROFS: "use another folder",
    errno.EACCES: "check the permissions, or use another folder",
    errno.EPERM: "check the permissions, or use another folder",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the network file system",
    errno.EMFILE: "raise the open file limit with ulimit -n, or lower --data.num_workers",
    errno.ENFILE: "raise the system-wide open file limit, or lower --data.num_workers",
    errno.ENAMETOOLONG: "use a shorter path",
}
"""Advice for operating system errors that are not caused by a bug, keyed by error number."""
MESSAGES: Final[dict[str, int]] = {
    r"No space left on device|database or disk is full|No usable temporary directory": errno.ENOSPC,
    r"Disk quota exceeded": errno.EDQUOT,
    r"File too large": errno.EFBIG,
    r"Too many open files|received \d+ items of ancdata": errno.EMFILE,
}
"""Error numbers, keyed by message pattern, for exceptions from libraries and workers that have no ``errno``."""
NEED_FILE: Final = (errno.EACCES, errno.EPERM)
"""Error numbers that indicate an environment error only if the exception names a file."""
LOST_CONNECTION: Final = re.compile(r"timed out|connection (closed|reset|refused|aborted)", re.IGNORECASE)
"""Pattern that matches the messages of network errors in library exceptions other than ``OSError``."""
KILLED_WORKER: Final = r"DataLoader worker .*?(killed by signal: [\w ]+|exited unexpectedly)"
LIBRARY_ERRORS: Final = (OSError, RuntimeError)
"""Exceptions that libraries may raise while cleaning up after a failed operation, such as an incomplete write."""


def exception_chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, its cause, the cause of that, and so on.

    The exception that was being handled when ``error`` was raised counts as its cause only if ``error`` is one of the
    ``LIBRARY_ERRORS``. Any other exception, such as a ``KeyError`` in an ``except`` block, is a separate bug, unless
    it states its cause (``raise ... from``, or ``inner_exception`` of a failed compiler).
    """
    seen: list[BaseException] = []
    inside: BaseException | None = error
    while inside is not None and inside not in seen:  # an error may be stated as its own cause
        yield inside
        seen.append(inside)
        is_implicit = isinstance(inside, LIBRARY_ERRORS) and not inside.__suppress_context__
        stated = inside.__cause__ or getattr(inside, "inner_exception", None)
        inside = inside.__context__ if is_implicit and stated is None else stated


def describe_environment_error(error: BaseException) -> str | None:
    """Return a one-line description of an environment error, such as a full disk, with advice for the user.

    Returns:
        The description, or None if neither the exception nor any of its causes is an environment error.
    """
    for cause in exception_chain(error):
        if not isinstance(cause, OSError | RuntimeError):
            continue
        number, name = getattr(cause, "errno", None), str(getattr(cause, "filename", None) or "")
        if number not in ENVIRONMENT_ERRORS:
            number = next((number for pattern, number in MESSAGES.items() if re.search(pattern, str(cause))), None)
        if number in ENVIRONMENT_ERRORS and (name or number not in NEED_FILE):
            where = f" ({name if len(name) <= 200 else name[:80] + '...'})" if name else ""
            return f"{os.strerror(number)}{where}; {ENVIRONMENT_ERRORS[number]}"
        if killed := re.search(KILLED_WORKER, str(cause)):
            return f"a {killed[0]}, possibly for lack of memory; lower --data.num_workers"
    return None


def is_environment_failure(error: BaseException) -> bool:
    """Return whether an exception was caused by the machine, its disks or the network, so a retry may succeed.

    In addition to the errors that ``describe_environment_error`` recognizes, this includes every ``OSError`` (such as a
    missing file), ``MemoryError``, and exceptions whose message reports a lost connection.
    """
    return describe_environment_error(error) is not None or any(
        isinstance(cause, OSError | MemoryError) or LOST_CONNECTION.search(str(cause))
        for cause in exception_chain(error)
    )


def describe_yaml_error(error: Exception) -> str:
    """Return the line number and reason of a YAML error, but not the text of the line, which may be confidential."""
    mark = getattr(error, "problem_mark", None)
    return str(error).partition("\n")[0] if mark is None else f"line {mark.line + 1}: {getattr(error, 'problem', '')}"
