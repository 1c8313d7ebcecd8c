"""Locks that coordinate the processes and machines working on a study; locks of killed processes are released."""

import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy
from filelock import FileLock, Timeout


class StudyLocks(ABC):
    """Named locks, each held by at most one process, and a lock on the whole study.

    Named locks are not reentrant: no thread of a process can acquire a lock that the process already holds.
    """

    def __init__(self) -> None:
        self._thread_lock = threading.RLock()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Acquire the study lock, waiting while another thread, process or machine holds it, and release it on exit."""
        with self._thread_lock:
            self._acquire_study()
            try:
                yield
            finally:
                self._release_study()

    @abstractmethod
    def try_acquire(self, name: str) -> bool:
        """Try to acquire a named lock without blocking; return False if it is already held."""

    @abstractmethod
    def release(self, name: str) -> None:
        """Release a named lock."""

    @abstractmethod
    def _acquire_study(self) -> None: ...

    @abstractmethod
    def _release_study(self) -> None: ...


class FileLocks(StudyLocks):
    """File locks for processes that share a file system.

    Args:
        folder: Folder for the lock files; created if missing.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._study = FileLock(folder / "study", thread_local=False)
        self._held: dict[str, FileLock] = {}

    def try_acquire(self, name: str) -> bool:
        """Try to acquire a file lock without blocking; return False if it is already held."""
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
        """Release a file lock."""
        self._held.pop(name).release()

    def _acquire_study(self) -> None:
        self._study.acquire()

    def _release_study(self) -> None:
        self._study.release()


class PostgresLocks(StudyLocks):
    """PostgreSQL session-level advisory locks, which the server releases when the connection ends.

    If a machine disappears without closing its connection, the server notices after about a minute.

    Args:
        url: SQLAlchemy URL of the database.
        study: Name of the study, which is part of every lock key so that studies do not share locks.
    """

    KEEP_ALIVE = "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3"

    def __init__(self, url: str, study: str) -> None:
        super().__init__()
        engine = sqlalchemy.create_engine(
            url,
            isolation_level="AUTOCOMMIT",  # so that no transaction stays open while a lock is held
            poolclass=sqlalchemy.pool.NullPool,
            connect_args={"options": self.KEEP_ALIVE, "connect_timeout": 10},
        )
        self._connection = engine.connect()
        self._study = study
        self._held: set[str] = set()

    def try_acquire(self, name: str) -> bool:
        """Try to acquire an advisory lock without blocking; return False if it is already held.

        The names of held locks are recorded, because the server would grant this connection the same lock again.
        """
        with self._thread_lock:
            if name in self._held or not self._call("pg_try_advisory_lock", name):
                return False
            self._held.add(name)
            return True

    def release(self, name: str) -> None:
        """Release an advisory lock."""
        with self._thread_lock:
            self._call("pg_advisory_unlock", name)
            self._held.remove(name)

    def _acquire_study(self) -> None:
        self._call("pg_advisory_lock", "study")

    def _release_study(self) -> None:
        self._call("pg_advisory_unlock", "study")

    def _call(self, function: str, name: str) -> bool:
        keys = {key: zlib.crc32(word.encode()) - 2**31 for key, word in (("a", self._study), ("b", name))}
        return bool(self._connection.execute(sqlalchemy.text(f"SELECT {function}(:a, :b)"), keys).scalar())
