"""Write TensorBoard events, plots and reports; write errors are logged and do not stop the run."""

import io
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter
from typing_extensions import override

from lit_gpt_scratch.checkpoint.run_folder import EVENTS_PREFIX

log = logging.getLogger(__name__)

FLUSH_SECONDS: Final = 120
"""A new event flushes all pending events to disk if the last write was at least this many seconds ago."""

_numbers = count()
_reported: set[str] = set()
"""Names of the outputs for which a write error has already been logged in this run."""


@contextmanager
def tolerate_write_errors(name: str) -> Iterator[None]:
    """Context manager that suppresses an ``OSError``, or an exception raised from one, and logs it once per output.

    Args:
        name: Name of the output, for the warning.
    """
    try:
        yield
    except Exception as error:
        cause = next((cause for cause in (error, error.__cause__) if isinstance(cause, OSError)), None)
        if cause is None:
            raise
        _report(name, cause)


def tolerate_logger_errors(logger: Logger) -> None:
    """Wrap a logger's methods to suppress every ``OSError``; only the first one is logged."""
    for name in ("log_metrics", "log_hyperparams", "save", "finalize"):
        setattr(logger, name, partial(_call_tolerantly, logger, name))  # not a closure, because loggers are pickled


def _call_tolerantly(logger: Logger, method: str, *args: Any, **kwargs: Any) -> None:
    with tolerate_write_errors(f"the output of {type(logger).__name__}"):
        getattr(type(logger), method)(logger, *args, **kwargs)


def _report(name: str, error: OSError) -> None:
    if name not in _reported:
        _reported.add(name)
        log.warning("cannot write %s: %s; the run continues without it", name, error.strerror or error)


class EventFile:
    """TensorBoard event file whose write errors are not raised; only the first error is logged.

    Events that could not be written are dropped. The file is truncated to its last complete event, so that later events
    can be read once the disk has free space again. Events are encoded and written in a background thread.

    Args:
        folder: Folder of the file, created if missing.
    """

    def __init__(self, folder: Path) -> None:
        # The format of the name determines the order in which TensorBoard reads the files.
        name = f"{EVENTS_PREFIX}{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self.path = folder / name
        self._thread = ThreadPoolExecutor(1)
        self._pending = io.BytesIO()
        self._n_bytes = 0
        self._flushed_at = -math.inf  # the first event is written immediately
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self.flush()

    def get_logdir(self) -> str:
        """Return the folder of the file."""
        return str(self.path.parent)

    def add_event(self, event: Event) -> None:
        """Add an event; write all pending events if the last write was ``FLUSH_SECONDS`` or more ago."""
        self._thread.submit(self._append, event.SerializeToString())

    def flush(self) -> None:
        """Write all events to disk."""
        self._thread.submit(self._write).result()

    def close(self) -> None:
        """Write all events to disk."""
        self.flush()

    def _append(self, event: bytes) -> None:
        RecordWriter(self._pending).write(event)
        if time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
            self._write()

    def _write(self) -> None:
        self._flushed_at = time.monotonic()
        pending, self._pending = self._pending.getbuffer(), io.BytesIO()
        if not pending or (self._n_bytes and not self.path.parent.is_dir()):  # folder was deleted; saving reports it
            return
        with tolerate_write_errors("the TensorBoard events"):
            if not self._n_bytes:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                try:
                    left = pending
                    while left:
                        left = left[file.write(left) :]
                except OSError:
                    with suppress(OSError):
                        file.truncate(self._n_bytes)
                    raise
            self._n_bytes += len(pending)


class EventFileWriter(FileWriter):
    """``FileWriter`` that writes to an ``EventFile``."""

    def __init__(self, folder: str) -> None:
        self.event_writer = EventFile(Path(folder))


class EventSummaryWriter(SummaryWriter):
    """``SummaryWriter`` that writes to an ``EventFile``."""

    file_writer: Any
    all_writers: Any
    purge_step: Any

    @override
    def _get_file_writer(self) -> EventFileWriter:
        if self.file_writer is None:
            self.file_writer = EventFileWriter(self.log_dir)
            self.all_writers = {self.log_dir: self.file_writer}
            if self.purge_step is not None:  # only once: TensorBoard discards earlier points at this step and later
                start = SessionLog(status=SessionLog.START)
                self.file_writer.add_event(Event(step=self.purge_step, session_log=start))
                self.purge_step = None
        writer: EventFileWriter = self.file_writer
        return writer


class RunLogger(TensorBoardLogger):
    """TensorBoard logger whose write errors do not stop the run.

    Args:
        folder: The run folder, ``<runs>/<experiment>/version_N``.
        first_step: Step from which the run continues; TensorBoard discards the points that earlier sessions have logged
            at or after this step.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        super().__init__(folder.parent.parent, folder.parent.name, folder.name, default_hp_metric=False)
        self._folder, self._first_step = folder, first_step
        self._writer: EventSummaryWriter | None = None
        _reported.clear()

    @property
    @rank_zero_experiment
    @override
    def experiment(self) -> SummaryWriter:
        if self._writer is None:
            self._writer = EventSummaryWriter(str(self._folder), purge_step=self._first_step)
        return self._writer

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_writer": None}

    @override
    def finalize(self, status: str) -> None:
        if self._writer is not None:  # rank 0
            self.save() if status == "success" else self._writer.flush()
