"""Failures of the environment are told apart from bugs."""

import errno
import os

import pytest

from lit_gpt_scratch.errors import UserError, describe_environment_error, exception_chain


def chained(outer: Exception, inner: Exception) -> Exception:
    try:
        try:
            raise inner
        except Exception:
            raise outer  # noqa: B904 - as in cleanup code that fails
    except Exception as error:
        return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/b"), "No space left on device (/a/b); free disk space"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "Disk quota exceeded; free disk space"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "Permission denied (/a); check the permissions"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "Too many open files; raise the open file limit"),
        (OSError("Caught OSError in DataLoader worker process 0.\n[Errno 24] Too many open files"), "ulimit -n"),
        (RuntimeError("unable to write to file </torch_1>: No space left on device (28)"), "No space left on device;"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/']"), "No space left on device;"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "worker (pid 7) is killed by signal"),
        (chained(RuntimeError("unexpected pos"), OSError(errno.ENOSPC, "x")), "No space left on device;"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300), f"({'a' * 80}...); use a shorter path"),
    ],
)
def test_failures_of_the_environment_are_one_line(error: Exception, expected: str) -> None:
    description = describe_environment_error(error)
    assert description is not None
    assert expected in description
    assert "\n" not in description


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/a"),
        PermissionError(errno.EPERM, "Operation not permitted"),  # e.g. a signal to another user's process
        RuntimeError("shape mismatch"),
        ValueError("No space left on device"),  # a text that a user wrote
    ],
)
def test_bugs_keep_their_traceback(error: Exception) -> None:
    assert describe_environment_error(error) is None
    assert describe_environment_error(chained(error, KeyError("y"))) is None


FULL = OSError(errno.ENOSPC, "x")


@pytest.mark.parametrize("bug", [KeyError("x"), ValueError("x"), AttributeError("x")])
def test_bug_while_an_error_is_handled_is_a_bug(bug: Exception) -> None:
    assert describe_environment_error(chained(bug, FULL)) is None
    assert describe_environment_error(chained(RuntimeError("a"), chained(bug, FULL))) is None


def test_only_causes_that_are_not_suppressed_count() -> None:
    stated = KeyError("x")
    stated.__cause__ = FULL
    assert list(exception_chain(stated)) == [stated, FULL]
    suppressed = chained(RuntimeError("a"), FULL)
    suppressed.__suppress_context__ = True  # raise ... from None
    assert list(exception_chain(suppressed)) == [suppressed]
    stated.__cause__ = stated
    assert list(exception_chain(stated)) == [stated]


def test_user_errors_are_no_failures_of_the_environment() -> None:
    assert describe_environment_error(UserError("too many open files")) is None


def test_the_chain_of_an_error_that_is_raised_from_itself_ends() -> None:
    error, cause = UserError("x"), ValueError("y")
    error.__cause__ = error
    assert list(exception_chain(error)) == [error]
    error.__cause__, cause.__cause__ = cause, error
    assert list(exception_chain(error)) == [error, cause]
