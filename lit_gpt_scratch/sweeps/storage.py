"""Optuna storage of a study: a journal or SQLite file on a local or shared disk, or a PostgreSQL database."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, quote_plus

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock  # private, but the type of a public argument

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.sweeps.locks import FileLocks, PostgresLocks, StudyLocks
from lit_gpt_scratch.terminal_output import HIDDEN

JOURNAL = "study.journal"
URL_SYNTAX = (
    "use postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with special characters in the password percent-encoded"
)
POSTGRES_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")
PUBLIC_OPTIONS = {"host", "hostaddr", "port", "dbname", "sslmode", "connect_timeout", "application_name"}
"""Options in the query of a PostgreSQL URL whose values may be printed; the values of other options may be secret."""


def open_storage(location: str | None, folder: Path, study: str) -> tuple[BaseStorage, StudyLocks]:
    """Open the Optuna storage of a study, creating it if it does not exist, and return it with the study's locks.

    Args:
        location: Path to a journal file, ``sqlite:///FILE`` or ``postgresql://...``; if None, a journal file in
            ``folder`` is used.
        folder: Folder of the sweep.
        study: Name of the study in the storage.

    Raises:
        UserError: The storage is not reachable or writable, or the URL scheme of ``location`` is not supported.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _reject_misspelled_url(location or "")
    scheme, separator, rest = (location or str(folder / JOURNAL)).partition("://")
    with storage_errors(location):
        if not separator:
            path = _ensure_writable(Path(scheme).expanduser())
            repair_journal(path)
            return JournalStorage(JournalFileBackend(str(path), lock_obj=_JournalLock(path))), _file_locks(path)
        if scheme == "sqlite":
            file_locks = _file_locks(_ensure_writable(Path(rest.removeprefix("/"))))
            with file_locks.exclusive():  # only one process may create the tables
                return RDBStorage(f"sqlite://{rest}", engine_kwargs={"connect_args": {"timeout": 60}}), file_locks
        if scheme in POSTGRES_SCHEMES:
            url = _parse_postgres_url(rest).render_as_string(hide_password=False)
            postgres_locks = PostgresLocks(url, study)
            with postgres_locks.exclusive():
                options = {"connect_args": {"connect_timeout": 10}, "pool_pre_ping": True}
                return RDBStorage(url, engine_kwargs=options), postgres_locks
    shown = f"{scheme}://..." if re.fullmatch(r"[\w+.-]+", scheme) else "invalid"
    raise UserError(f"--storage is {shown}; it must be a file path, sqlite:///FILE or postgresql://USER@HOST/DATABASE")


@contextmanager
def storage_errors(location: str | None) -> Iterator[None]:
    """Convert database errors raised in this context into a ``UserError`` with a one-line message.

    Raises:
        UserError: The database cannot be reached, the connection was closed, or a file cannot be read or written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot access the files of the sweep ({error}); repeat the command to resume") from error
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, ImportError) as error:  # ImportError: driver missing
        cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
        message = str(getattr(cause, "orig", None) or cause).strip().splitlines() or [type(cause).__name__]
        described, secrets = _describe_location(location or "")
        for secret in secrets:
            message[0] = message[0].replace(secret, HIDDEN)
        raise UserError(f"--storage: cannot reach {described}: {message[0]}") from error


def repair_journal(journal: Path) -> None:
    """Remove the last line of a journal if a machine crash left it incomplete; Optuna cannot read past such a line."""
    with suppress(FileNotFoundError), _JournalLock(journal).lock, journal.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _ensure_writable(path: Path) -> Path:
    """Create a file if it does not exist, and return its path.

    Raises:
        UserError: The file is not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise UserError(f"--storage: cannot write to {path}: {error.strerror}; check the path") from error
    return path


def _file_locks(path: Path) -> FileLocks:
    return FileLocks(path.with_name(f"{path.name}.claims"))  # as in version 0.1, whose processes may share it


def _reject_misspelled_url(location: str) -> None:
    """Reject a location that looks like a database URL or a connection string, but would be used as a file name.

    Raises:
        UserError: The location looks like a URL. The message does not quote it, because it may contain a password.
    """
    if "://" not in location and re.match(r"postgres|[\w+]+:[^/\\].*@|.*\bpassword\s*=", location, re.DOTALL):
        raise UserError(f"--storage is neither a file path nor a URL; {URL_SYNTAX}")


def _parse_postgres_url(rest: str) -> sqlalchemy.engine.URL:
    """Parse the part of a PostgreSQL URL after its scheme.

    Raises:
        UserError: The URL is invalid. The message does not quote it, because a special character in the password may
            cause a part of the password to be parsed as the host, port or database.
    """
    try:
        url = sqlalchemy.engine.make_url(f"postgresql+psycopg://{rest}")
    except (sqlalchemy.exc.ArgumentError, ValueError):  # ValueError: the port is not a number
        raise UserError(f"--storage is not a valid URL; {URL_SYNTAX}") from None
    if "@" in f"{url.host}{url.database}":
        raise UserError(f"--storage is not a valid URL, because it contains several @; {URL_SYNTAX}")
    return url


def _describe_location(location: str) -> tuple[str, list[str]]:
    """Return the location with secrets redacted, along with the list of secrets.

    Longer secrets come first, because a secret may contain a shorter secret.
    """
    scheme, _, rest = location.partition("://")
    if scheme not in POSTGRES_SCHEMES:
        return location.partition("?")[0], []
    url = _parse_postgres_url(rest)
    options = [value for name, value in url.normalized_query.items() if name not in PUBLIC_OPTIONS]
    secrets = {str(url.password or ""), *(text for values in options for text in values)}
    written = {quoted for text in secrets for quoted in (text, quote(text), quote_plus(text), repr(text)[1:-1])}
    shown = url.set(drivername=scheme, query={}).render_as_string(hide_password=True)
    return shown, sorted(written - {""}, key=len, reverse=True)


class _JournalLock(BaseJournalFileLock):
    """Lock on a journal that is released as soon as the process that holds it is killed.

    With Optuna's own locks, all other processes would wait for 30 seconds if a process is killed.
    """

    def __init__(self, journal: Path) -> None:
        self.lock = FileLock(journal.with_name(f"{journal.name}.lock"), thread_local=False)

    def acquire(self) -> bool:
        """Wait until the lock is free, and acquire it; always return True."""
        self.lock.acquire()
        return True

    def release(self) -> None:
        """Release the lock."""
        self.lock.release()
