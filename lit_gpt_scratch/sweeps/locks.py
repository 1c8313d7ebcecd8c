"""Who does what, among processes and machines: a claim is a lock that a kill frees."""

import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy
from filelock import FileLock, Timeout


class StudyLocks(ABC):
    """Locks by name, each of one process at a time, and within the process of whoever took it."""

    def __init__(self) -> None:
        self._one_thread = threading.RLock()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody else looks at the study, and keep others from it meanwhile."""
        with self._one_thread:
            self._enter()
            try:
                yield
            finally:
                self._leave()

    @abstractmethod
    def take(self, name: str) -> bool:
        """Take a claim, unless somebody has it."""

    @abstractmethod
    def release(self, name: str) -> None:
        """Give it back."""

    @abstractmethod
    def _enter(self) -> None: ...

    @abstractmethod
    def _leave(self) -> None: ...


class FileLocks(StudyLocks):
    """Locked files, for processes that share a disk.

    Args:
        folder: Where they lie.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._study = FileLock(folder / "study", thread_local=False)
        self._held: dict[str, FileLock] = {}

    def take(self, name: str) -> bool:
        """Lock its file."""
        if name in self._held:
            return False
        lock = FileLock(self._folder / name, thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        self._held[name] = lock
        return True

    def release(self, name: str) -> None:
        """Unlock it."""
        self._held.pop(name).release()

    def _enter(self) -> None:
        self._study.acquire()

    def _leave(self) -> None:
        self._study.release()


class PostgresLocks(StudyLocks):
    """Advisory locks of a PostgreSQL session, which the server frees when the connection ends.

    A machine that vanishes without closing it is noticed after about a minute.

    Args:
        url: Of the database.
        study: Name of the study; it keeps the locks of several apart.
    """

    KEEP_ALIVE = "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3"

    def __init__(self, url: str, study: str) -> None:
        super().__init__()
        engine = sqlalchemy.create_engine(
            url,
            isolation_level="AUTOCOMMIT",  # locks are the session's, and no transaction is to stay open beside them
            poolclass=sqlalchemy.pool.NullPool,
            connect_args={"options": self.KEEP_ALIVE, "connect_timeout": 10},
        )
        self._connection = engine.connect()
        self._study = study
        self._held: set[str] = set()

    def take(self, name: str) -> bool:
        """Lock its number; the server would give a lock to its own session twice."""
        with self._one_thread:
            if name in self._held or not self._ask("pg_try_advisory_lock", name):
                return False
            self._held.add(name)
            return True

    def release(self, name: str) -> None:
        """Unlock it."""
        with self._one_thread:
            self._ask("pg_advisory_unlock", name)
            self._held.remove(name)

    def _enter(self) -> None:
        self._ask("pg_advisory_lock", "study")

    def _leave(self) -> None:
        self._ask("pg_advisory_unlock", "study")

    def _ask(self, function: str, name: str) -> bool:
        keys = {key: zlib.crc32(word.encode()) - 2**31 for key, word in (("a", self._study), ("b", name))}
        return bool(self._connection.execute(sqlalchemy.text(f"SELECT {function}(:a, :b)"), keys).scalar())


def reason(error: BaseException) -> str:
    """The first line of what a database said."""
    said = str(getattr(error, "orig", None) or error).strip().splitlines()
    return said[0] if said else type(error).__name__
