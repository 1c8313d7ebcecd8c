"""Where a study is kept: a file on one machine or a shared disk, a database for many machines."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock  # the type of a public argument

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.sweeps.locks import FileLocks, PostgresLocks, StudyLocks, reason

JOURNAL = "study.journal"
POSTGRES = ("postgresql", "postgres", "postgresql+psycopg")


def open_storage(given: str | None, folder: Path, study: str) -> tuple[BaseStorage, StudyLocks]:
    """The storage that a user means, and the locks that go with it.

    Args:
        given: A file for a journal, ``sqlite:///FILE`` or ``postgresql://...``; None is a journal in the folder.
        folder: Of the sweep.
        study: Its name in the storage.

    Raises:
        UserError: It cannot be reached, or is of another kind.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kind, separator, rest = (given or str(folder / JOURNAL)).partition("://")
    with storage_errors(given):
        if not separator:
            path = _made_room(Path(kind).expanduser())
            repair_journal(path)
            return JournalStorage(JournalFileBackend(str(path), lock_obj=_Lock(path))), _beside(path)
        if kind == "sqlite":
            claims = _beside(_made_room(Path(rest.removeprefix("/"))))
            with claims.alone():  # its tables are made by one
                return RDBStorage(f"sqlite://{rest}", engine_kwargs={"connect_args": {"timeout": 60}}), claims
        if kind in POSTGRES:
            url = f"postgresql+psycopg://{rest}"
            database = PostgresLocks(url, study)
            with database.alone():
                options = {"connect_args": {"connect_timeout": 10}, "pool_pre_ping": True}
                return RDBStorage(url, engine_kwargs=options), database
    raise UserError(f"--storage is {kind}://...; it must be a file, sqlite:///FILE or postgresql://USER@HOST/DATABASE")


@contextmanager
def storage_errors(given: str | None) -> Iterator[None]:
    """Let a user read in one line what became of a database.

    Raises:
        UserError: It cannot be reached, or not any more.
    """
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, ImportError) as error:  # the last: no such driver
        inner = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
        raise UserError(f"--storage: cannot reach {_without_password(given or '')}: {reason(inner)}") from error


def repair_journal(journal: Path) -> None:
    """Cut off a line that a crash of the machine left half-written; what comes after it could not be read."""
    with suppress(FileNotFoundError), _Lock(journal).lock, journal.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _made_room(path: Path) -> Path:
    """The path of a file that can be written.

    Raises:
        UserError: It cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise UserError(f"--storage: cannot write {path}: {error.strerror}") from error
    return path


def _beside(path: Path) -> FileLocks:
    return FileLocks(path.with_name(f"{path.name}.claims"))


def _without_password(url: str) -> str:
    with suppress(sqlalchemy.exc.ArgumentError):
        return sqlalchemy.engine.make_url(url).render_as_string(hide_password=True)
    return url.partition("://")[0]


class _Lock(BaseJournalFileLock):
    """Optuna's own locks are files that a killed process leaves behind, and others wait half a minute for."""

    def __init__(self, journal: Path) -> None:
        self.lock = FileLock(journal.with_name(f"{journal.name}.lock"), thread_local=False)

    def acquire(self) -> bool:
        """Wait for it."""
        self.lock.acquire()
        return True

    def release(self) -> None:
        """Let others write."""
        self.lock.release()
