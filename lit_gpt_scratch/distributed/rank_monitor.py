"""Detect unresponsive and failed ranks, and terminate a process that would wait for them.

A collective operation blocks in C++ code until all ranks join it or its timeout expires, by default after half an hour.
In the meantime, Python runs no signal handlers in the main thread, so the process ignores Ctrl-C and SIGTERM, and does
not notice that another rank has failed.
"""

import json
import logging
import os
import re
import select
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lit_gpt_scratch.checkpoint.checkpoint_io import is_saving
from lit_gpt_scratch.distributed.flight_record import (
    Collective,
    enable_flight_record,
    find_absent_ranks,
    latest_collectives,
    read_flight_record,
    save_flight_record,
)
from lit_gpt_scratch.errors import UserError, describe_environment_error, exception_chain

log = logging.getLogger(__name__)

INTERVAL: Final = 0.5
"""Interval in seconds at which each rank stores a heartbeat."""
UNRESPONSIVE_SECONDS: Final = 8.0
"""Time in seconds without a new heartbeat after which a rank counts as unresponsive."""
STORE_SECONDS: Final = 3.0
"""Timeout in seconds for accessing the store. An access may take longer than this if rank 0 is suspended."""
GRACE_SECONDS: Final = 3.0
"""Seconds after a signal before the monitor terminates a process that is still waiting for other ranks."""
ACKNOWLEDGE_SECONDS: Final = 10.0
"""Time in seconds that a failed rank gives the rank that prints its error."""
STUCK_SECONDS: Final = 60.0
"""Idle time in seconds after which a process that has received a signal is assumed to wait for a rank that hangs.

A process is idle if it uses no CPU time and no rank is writing a checkpoint. A rank whose last heartbeat is older
than this no longer counts as writing.
"""
IDLE_SHARE: Final = 0.02
"""Maximum CPU use of a process that counts as idle, as a fraction of one core."""
CONNECT_SECONDS: Final = {True: 5.0, False: 30.0}
"""Time in seconds to wait for other ranks before logging a warning, keyed by whether there are several machines."""
LOST_RANK: Final = r"gloo/|clients joined|NCCL.*(abort|timeout|remote)"
"""Pattern that matches error messages caused by a rank that has exited or does not respond."""
LOST_CONNECTION: Final = r"[Tt]imed? ?out|[Cc]onnection (closed|reset|refused)|[Bb]roken pipe"
"""Pattern that matches such messages of ``DistError``, which also reports local errors, such as a port in use."""
DONE: Final = b"done"
SAVING: Final = b"saving"
"""Prefix of the heartbeats of a rank that is writing a checkpoint."""


class Failure(NamedTuple):
    """Error that ends a run.

    Attributes:
        rank: The rank that failed.
        exit_code: Exit code of all ranks.
        message: What to print.
    """

    rank: int
    exit_code: int
    message: str

    def __str__(self) -> str:
        """The message after the rank, as another rank prints it."""
        prefix = f"rank {self.rank}: "
        message = self.message if self.message.startswith(prefix) else prefix + self.message
        return f"error: {message}" if self.exit_code == 2 else message


class RankMonitor:
    """Context manager whose threads report unresponsive ranks and can terminate this process.

    One thread exchanges heartbeats through a store on rank 0. The other thread watches the heartbeats, because
    accessing the store may block.

    If a rank fails, all ranks exit with the code of the first failure, and the first rank of each machine prints it. If
    the cause is a collective operation that another rank did not enter, the error names that rank, and each rank saves
    its flight record.

    After a signal, the monitor terminates the process if it is still waiting for other ranks to connect, if a rank is
    unresponsive, or if the process has been idle for ``STUCK_SECONDS``. Otherwise, the callbacks end the run. The
    monitor does not terminate the process while it is writing a checkpoint.

    Args:
        rank: Rank of this process.
        ranks: Number of ranks; with a single rank, the monitor does nothing.
        nodes: Number of machines.
        timeout: Timeout for collective operations, and for connecting to the other ranks.
        signals: Signals that terminate the process.
        on_abort: Cleanup callback that is called before the process exits, e.g. to terminate its child processes.
        local_rank: Rank of this process on its machine.
        failed_children: Function that returns the exit codes of the ranks that this process launched and that have
            exited with a code other than 0, keyed by rank.
        folder: Run folder in which all ranks save their flight records; only required on rank 0.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        nodes: int,
        timeout: timedelta,
        signals: Sequence[int],
        on_abort: Callable[[], None],
        local_rank: int = 0,
        failed_children: Callable[[], dict[int, int]] = dict,
        folder: Path | None = None,
    ) -> None:
        self.rank, self.ranks, self.nodes, self.timeout = rank, ranks, nodes, timeout
        self._signals, self._on_abort = signals, on_abort
        self._local_leader = rank - local_rank
        """First rank of this machine, which prints the errors of the others."""
        self._failed_children, self._folder = failed_children, folder
        self._run_id: str | None = None
        """Part of the keys in the store, which may contain the keys of an earlier attempt; None before ``connect``."""
        self._signum = 0
        self._signaled_at = self._busy_at = 0.0
        self._started = time.monotonic()
        self._connecting_reported = False
        self._reported: set[int] = set()
        self._store: TCPStore | None = None
        self._seen: dict[int, tuple[bytes, float]] = {}
        """Last heartbeat of each rank, and the time at which this heartbeat was first read."""
        self._beats = 0
        self._answered_at: float | None = None
        """Time of the last successful access to the store; before the first one, the time of the first attempt."""
        self._lost_peer = False
        """Whether a collective operation of this rank has failed because of another rank."""
        self._local_failure: Failure | None = None
        """Failure of this rank, which the heartbeat thread stores."""
        self._child_failure: Failure | None = None
        """Failure of a rank that this process launched and that could not store it."""
        self._first_failure: Failure | None = None
        """First failure of any rank, as stored."""
        self._noticed_at = 0.0
        self._latest: dict[int, dict[str, Collective]] = {}
        """Latest collective operations of each rank."""
        self._failed_children_since: dict[int, float] = {}
        self._is_printed = False
        """Whether this rank, as the first of its machine, prints the first failure."""
        self._leader_has_printed = False
        self._folder_is_stored = False
        self._record_file: Path | None = None
        """The flight record of this rank, once it is saved."""
        self._record_thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._watch_thread = threading.Thread(target=self._run, name="rank monitor", daemon=True)
        self._heartbeat_thread = threading.Thread(target=self._exchange_heartbeats, name="heartbeats", daemon=True)
        self._wakeup: tuple[socket.socket, socket.socket] | None = None

    def connect(self, run_id: str) -> None:
        """Begin to exchange heartbeats; called once the process group exists.

        Args:
            run_id: Identifier of this attempt to run, the same on all ranks and different from those of other attempts.
        """
        self._run_id = run_id

    def __enter__(self) -> "RankMonitor":
        if self.ranks > 1:
            enable_flight_record()
            if threading.current_thread() is threading.main_thread():
                self._wakeup = socket.socketpair()
                self._wakeup[1].setblocking(False)
                self._fd_before = signal.set_wakeup_fd(self._wakeup[1].fileno(), warn_on_full_buffer=False)
            self._watch_thread.start()
            self._heartbeat_thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.ranks == 1:
            return
        failed = isinstance(error, Exception)  # neither a signal nor a regular exit
        is_main_thread = self._wakeup is not None
        before = (
            {number: signal.signal(number, signal.SIG_IGN) for number in self._signals}
            if is_main_thread and failed
            else {}
        )
        is_printed = False
        try:
            if isinstance(error, Exception):
                self._local_failure = self._explain(error)
                self._is_printed = self.rank == self._local_leader
                is_printed = self._wait_until_printed()
        finally:
            self._stop()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._local_failure is None:
            return
        first = self._first_failure or self._local_failure
        if first.rank != self.rank and self.rank == self._local_leader:
            _print(first)
            is_printed = True
        if is_printed:
            raise SystemExit(first.exit_code) from error
        if self._lost_peer:
            raise UserError(self._local_failure.message) from error

    def _stop(self) -> None:
        """End both threads; the last heartbeat says that this rank is done."""
        self._stopped.set()
        if self._record_thread is not None:
            self._record_thread.join(STORE_SECONDS)
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._fd_before)
        self._watch_thread.join()
        self._heartbeat_thread.join(STORE_SECONDS)
        if self._local_failure and self.rank == 0:
            time.sleep(2 * INTERVAL)  # for the others to read the error, because the store may end with this process
        for end in self._wakeup or ():
            end.close()

    def _explain(self, error: Exception) -> Failure:
        """Describe an error of this rank; if another rank caused it, give all ranks the time to answer."""
        chain = [*exception_chain(error)]
        lost = next((cause for cause in chain if _is_lost_rank(cause)), None)
        if lost is not None:
            self._lost_peer = True
            time.sleep(4 * INTERVAL)  # a responsive rank stores several heartbeats in this time
            return Failure(self.rank, 2, self._describe_loss(str(lost), self.unresponsive_ranks(2 * INTERVAL)))
        mistake = next((str(cause) for cause in chain if isinstance(cause, UserError)), None)
        message = mistake or describe_environment_error(error)
        if message is None:
            return Failure(self.rank, 1, "".join(traceback.format_exception(error)))
        return Failure(self.rank, 2, message)

    def _wait_until_printed(self) -> bool:
        """Wait for the first rank of this machine to print the error of this rank; return whether it has done so."""
        began = time.monotonic()
        while self.rank != self._local_leader and self._run_id is not None and not self._leader_has_printed:
            beat, _ = self._seen.get(self._local_leader, (b"", 0.0))
            limit = STUCK_SECONDS if beat.startswith(SAVING) else ACKNOWLEDGE_SECONDS
            if time.monotonic() - began > limit or beat == DONE or self._local_leader in self.unresponsive_ranks():
                break
            time.sleep(INTERVAL / 5)
        return self._leader_has_printed

    def unresponsive_ranks(self, seconds: float = UNRESPONSIVE_SECONDS) -> list[int]:
        """Return the other ranks that have not updated their heartbeat for more than ``seconds``."""
        known = self._answered_at or time.monotonic()
        if time.monotonic() - known > seconds:
            late = {0}  # the heartbeats of other ranks are unknown
        else:
            late = {rank for rank, (value, at) in self._seen.items() if known - at > seconds and value != DONE}
        return sorted(late - {self.rank})

    def _describe_loss(self, message: str, ranks: list[int]) -> str:
        message = message.splitlines()[0][:200]
        if not dist.is_initialized():
            return f"{self._missing_processes()} did not connect within {self.timeout} ({message})"
        if ranks:
            which = f"{_name_ranks(ranks)} exited or stopped responding"
        else:
            absent = find_absent_ranks(dict(self._latest))
            which = f"{_name_ranks(absent[0])} did not enter {absent[1]}" if absent else "another rank failed"
        reason = f"{message}; timeout {self.timeout}"
        record = f" (flight record: {self._record_file})" if self._record_file else ""
        return f"rank {self.rank}: {which} ({reason}); resume the run with --ckpt_path last{record}"

    def _missing_processes(self) -> str:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        hint = "; run the same command on each machine with its NODE_RANK" if self.nodes > 1 else ""
        machines = f" on {self.nodes} machines" if self.nodes > 1 else ""
        return f"some of the {self.ranks} processes{machines} (rendezvous at {address}{hint})"

    def _run(self) -> None:
        while not self._stopped.is_set():
            if self._wakeup is None:
                self._stopped.wait(INTERVAL)
            elif select.select([self._wakeup[0]], [], [], INTERVAL)[0]:
                self._receive(self._wakeup[0].recv(64))
            if dist.is_initialized():
                self._watch_ranks()
            else:
                self._watch_connecting()

    def _exchange_heartbeats(self) -> None:
        while not self._stopped.wait(INTERVAL):
            if self._run_id is not None:
                self._beat()
        if self._store is not None:
            with suppress(RuntimeError):
                self._exchange_failures(self._store)  # a failure of the first rank of a machine is not stored yet
                self._store.set(self._key(self.rank), DONE.decode())

    def _receive(self, signums: bytes) -> None:
        stops = [signum for signum in signums if signum in self._signals]
        if stops and not self._signum:
            self._signum = stops[0]
            self._signaled_at = self._busy_at = time.monotonic()
            self._cpu_seconds = time.process_time()

    def _beat(self) -> None:
        """Store a heartbeat of this rank, and read the heartbeats of all ranks if they are needed.

        After a failure, the next call connects to the store again.
        """
        self._answered_at = self._answered_at or time.monotonic()
        try:
            if self._store is None:
                self._store = TCPStore(
                    os.environ["MASTER_ADDR"],
                    int(os.environ["MASTER_PORT"]),
                    is_master=False,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=STORE_SECONDS),
                )
            self._beats += 1
            self._store.set(self._key(self.rank), f"{SAVING.decode() if is_saving() else ''}{self._beats}")
            self._exchange_failures(self._store)
            failed = self._local_failure or self._first_failure or self._lost_peer
            if self.rank == self._local_leader or self._signum or failed:
                self._read_heartbeats(self._store)
        except RuntimeError:  # rank 0, which holds the store, has exited or does not respond
            self._store = None
        else:
            self._answered_at = time.monotonic()

    def _save_record(self, record: list[dict[str, Any]], folder: Path) -> None:
        if folder.is_dir():  # not on a machine that does not share the disk
            file = folder / "flight_record" / f"rank_{self.rank}.json"
            with suppress(OSError):
                save_flight_record(record, file)
                self._record_file = file

    def _key(self, name: int | str) -> str:
        return f"lit_gpt_scratch/{self._run_id}/{name}"

    def _exchange_failures(self, store: TCPStore) -> None:
        """Store or read the first failure, and answer a rank that asks where the others are."""
        if self.rank == 0 and self._folder and not self._folder_is_stored:
            store.set(self._key("folder"), str(self._folder.absolute()))
            self._folder_is_stored = True
        if self._is_printed:
            store.set(self._key(f"printed/{self.rank}"), "")
        elif self._local_failure or self._first_failure:
            self._leader_has_printed = store.check([self._key(f"printed/{self._local_leader}")])
        if self._lost_peer:
            store.set(self._key("asked"), "")
        if self.rank not in self._latest and store.check([self._key("asked")]):
            try:
                record = read_flight_record()
                latest = latest_collectives(record)
            except (KeyError, IndexError, TypeError, ValueError):  # its format may differ between versions of torch
                record, latest = [], {}
            store.set(self._key(f"latest/{self.rank}"), json.dumps(latest))
            self._latest[self.rank] = latest
            if store.check([self._key("folder")]):
                folder = Path(store.get(self._key("folder")).decode())
                # In a thread of its own, because a slow disk must not delay heartbeats.
                self._record_thread = threading.Thread(target=self._save_record, args=(record, folder), daemon=True)
                self._record_thread.start()
        if self._lost_peer:
            for rank in set(range(self.ranks)) - self._latest.keys():
                if store.check([self._key(f"latest/{rank}")]):
                    found = json.loads(store.get(self._key(f"latest/{rank}")))
                    self._latest[rank] = {group: Collective(*values) for group, values in found.items()}
        if self._first_failure is not None:
            return
        key = self._key("failure")
        if (own := self._local_failure or self._child_failure) is not None:
            stored = store.compare_set(key, "", json.dumps(own))
        elif store.check([key]):
            stored = store.get(key)
        else:
            return
        self._noticed_at = time.monotonic()
        self._first_failure = Failure(*json.loads(stored))

    def _read_heartbeats(self, store: TCPStore) -> None:
        now = time.monotonic()
        self._seen = dict.fromkeys(range(self.ranks), (b"", now)) | self._seen
        keys = {rank: self._key(rank) for rank in range(self.ranks)}
        stored = [rank for rank, (value, _) in self._seen.items() if value or store.check([keys[rank]])]
        for rank, value in zip(stored, store.multi_get([keys[rank] for rank in stored]), strict=True):
            if self._seen[rank][0] != value:
                self._seen[rank] = value, now

    def _watch_connecting(self) -> None:
        now = time.monotonic()
        if (failure := self._find_failed_child()) is not None:
            self._first_failure = failure
            self._leave()
        if self._signum and now - self._signaled_at > GRACE_SECONDS:
            self._abort(f"while it waited for {self._missing_processes()}")
        if not self._connecting_reported and now - self._started > CONNECT_SECONDS[self.nodes > 1]:
            self._connecting_reported = True
            log.warning("waiting up to %s for %s", self.timeout, self._missing_processes())

    def _watch_ranks(self) -> None:
        now = time.monotonic()
        ranks = self.unresponsive_ranks()
        new = set(ranks) - self._reported
        if new and self.rank == 0:
            log.warning("no heartbeat from %s; waiting up to %s", _name_ranks(sorted(new)), self.timeout)
        self._reported |= new
        if self._child_failure is None:
            self._child_failure = self._find_failed_child()  # the heartbeat thread stores it
        noticed = self._first_failure is not None and self._local_failure is None
        if noticed and now - self._noticed_at > GRACE_SECONDS and not is_saving(alone=True):
            self._leave()
        if not self._signum:
            return
        saving = {
            rank for rank, (value, at) in self._seen.items() if value.startswith(SAVING) and now - at < STUCK_SECONDS
        }
        lost = [rank for rank in ranks if rank not in saving]
        if lost and not is_saving(alone=True) and now - self._signaled_at > GRACE_SECONDS:
            self._abort(f"while it waited for {_name_ranks(lost)}")
        cpu_seconds = time.process_time()
        if cpu_seconds - self._cpu_seconds > IDLE_SHARE * INTERVAL or saving or is_saving():
            self._busy_at = now
        self._cpu_seconds = cpu_seconds
        if now - self._busy_at > STUCK_SECONDS:
            self._abort(f"after it had been idle for {STUCK_SECONDS:.0f} s, probably because another rank hangs")

    def _find_failed_child(self) -> Failure | None:
        """Return the failure of a rank that this process launched and that has exited without storing its failure."""
        now = time.monotonic()
        for rank, code in self._failed_children().items():
            since = self._failed_children_since.setdefault(rank, now)
            # Its last heartbeat may not have been read yet; after a regular end, such as by a signal, it is DONE.
            if now - since > 4 * INTERVAL and self._seen.get(rank, (b"", 0.0))[0] != DONE:
                how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
                return Failure(self.rank, 2, f"rank {rank} {how}; resume the run with --ckpt_path last")
        return None

    def _leave(self) -> None:
        """Exit because another rank has failed; the main thread may be waiting for that rank."""
        assert self._first_failure is not None
        if self.rank == self._local_leader:
            _print(self._first_failure)
            self._is_printed = True
        else:
            self._wait_until_printed()  # a launcher terminates the other ranks of a machine as soon as one has exited
        self._stopped.set()
        self._heartbeat_thread.join(STORE_SECONDS)
        if self._record_thread is not None:
            self._record_thread.join(STORE_SECONDS)
        if self.rank == 0:
            time.sleep(2 * INTERVAL)  # the store may end with this process
        self._on_abort()
        os._exit(self._first_failure.exit_code)

    def _abort(self, circumstances: str) -> None:
        name = signal.Signals(self._signum).name
        log.warning("rank %d stopped by %s %s; resume from the last checkpoint", self.rank, name, circumstances)
        self._on_abort()
        os._exit(128 + self._signum)  # the main thread cannot exit


def _is_lost_rank(error: BaseException) -> bool:
    """Return whether an exception was caused by a rank that has exited or does not respond."""
    pattern = f"{LOST_RANK}|{LOST_CONNECTION}" if isinstance(error, dist.DistError) else LOST_RANK
    return isinstance(error, RuntimeError) and re.search(pattern, str(error)) is not None


def _print(failure: Failure) -> None:
    for line in str(failure).splitlines():
        log.error("%s", line)


def _name_ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
