"""Detect unresponsive ranks, and terminate a process that is still waiting for them after a termination signal.

A collective operation blocks in C++ code until all ranks join it or its timeout expires, by default after half an hour.
In the meantime, Python runs no signal handlers in the main thread, so the process ignores Ctrl-C and SIGTERM.
"""

import logging
import os
import re
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Final

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lit_gpt_scratch.checkpoint.checkpoint_io import is_saving
from lit_gpt_scratch.errors import UserError, exception_chain

log = logging.getLogger(__name__)

INTERVAL: Final = 0.5
"""Interval in seconds at which each rank stores a heartbeat."""
UNRESPONSIVE_SECONDS: Final = 8.0
"""Time in seconds without a new heartbeat after which a rank counts as unresponsive."""
STORE_SECONDS: Final = 3.0
"""Timeout in seconds for accessing the store. An access may take longer than this if rank 0 is suspended."""
GRACE_SECONDS: Final = 3.0
"""Seconds after a signal before the monitor terminates a process that is still waiting for other ranks."""
STUCK_SECONDS: Final = 60.0
"""Idle time in seconds after which a process that has received a signal is assumed to wait for a rank that hangs.

A process is idle if it uses no CPU time and no rank is writing a checkpoint. A rank whose last heartbeat is older
than this no longer counts as writing.
"""
IDLE_SHARE: Final = 0.02
"""Maximum CPU use of a process that counts as idle, as a fraction of one core."""
CONNECT_SECONDS: Final = {True: 5.0, False: 30.0}
"""Time in seconds to wait for other ranks before logging a warning, keyed by whether there are several machines."""
LOST_RANK: Final = (
    r"gloo/transport|[Cc]onnection (closed|reset)|[Tt]imed out|clients joined|NCCL.*(abort|timeout|remote)"
)
"""Pattern that matches error messages caused by a rank that has exited or does not respond."""
DONE: Final = b"done"
SAVING: Final = b"saving"
"""Prefix of the heartbeats of a rank that is writing a checkpoint."""


class RankMonitor:
    """Context manager whose threads report unresponsive ranks and can terminate this process after a signal.

    One thread exchanges heartbeats through a store on rank 0. The other thread watches the heartbeats, because
    accessing the store may block.

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
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        nodes: int,
        timeout: timedelta,
        signals: Sequence[int],
        on_abort: Callable[[], None],
    ) -> None:
        self.rank, self.ranks, self.nodes, self.timeout = rank, ranks, nodes, timeout
        self._signals, self._on_abort = signals, on_abort
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
        self._failing = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank monitor", daemon=True)
        self._heart = threading.Thread(target=self._exchange_heartbeats, name="heartbeats", daemon=True)
        self._wakeup: tuple[socket.socket, socket.socket] | None = None

    def __enter__(self) -> "RankMonitor":
        if self.ranks > 1:
            if threading.current_thread() is threading.main_thread():
                self._wakeup = socket.socketpair()
                self._wakeup[1].setblocking(False)
                self._fd_before = signal.set_wakeup_fd(self._wakeup[1].fileno(), warn_on_full_buffer=False)
            self._thread.start()
            self._heart.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.ranks == 1:
            return
        chain = exception_chain(error) if isinstance(error, RuntimeError) else ()
        lost = next((str(cause) for cause in chain if re.search(LOST_RANK, str(cause))), None)
        if lost:
            self._failing = True
            time.sleep(4 * INTERVAL)  # a responsive rank stores several heartbeats in this time
        self._stopped.set()
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._fd_before)
        self._thread.join()
        self._heart.join(STORE_SECONDS)
        for end in self._wakeup or ():
            end.close()
        if lost:
            raise UserError(self._describe_loss(lost, self.unresponsive_ranks(2 * INTERVAL))) from error

    def unresponsive_ranks(self, seconds: float = UNRESPONSIVE_SECONDS) -> list[int]:
        """Return the other ranks that have not updated their heartbeat for more than ``seconds``."""
        known = self._answered_at or time.monotonic()
        if time.monotonic() - known > seconds:
            late = {0}  # the heartbeats of other ranks are unknown
        else:
            late = {rank for rank, (value, at) in self._seen.items() if known - at > seconds and value != DONE}
        return sorted(late - {self.rank})

    def _describe_loss(self, message: str, ranks: list[int]) -> str:
        if not dist.is_initialized():
            return f"{self._missing_processes()} did not connect within {self.timeout}"
        which = f"{_name_ranks(ranks)} exited or stopped responding" if ranks else "another rank failed"
        reason = f"{message.splitlines()[0][:200]}; timeout {self.timeout}"
        return f"rank {self.rank}: {which} ({reason}); resume the run with --ckpt_path last"

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
            if dist.is_initialized():
                self._beat()
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.set(f"lit_gpt_scratch/{self.rank}", DONE.decode())

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
            self._store.set(f"lit_gpt_scratch/{self.rank}", f"{SAVING.decode() if is_saving() else ''}{self._beats}")
            if self.rank == 0 or self._signum or self._failing:
                self._read_heartbeats(self._store)
        except RuntimeError:  # rank 0, which holds the store, has exited or does not respond
            self._store = None
        else:
            self._answered_at = time.monotonic()

    def _read_heartbeats(self, store: TCPStore) -> None:
        now = time.monotonic()
        self._seen = dict.fromkeys(range(self.ranks), (b"", now)) | self._seen
        keys = {rank: f"lit_gpt_scratch/{rank}" for rank in range(self.ranks)}
        stored = [rank for rank, (value, _) in self._seen.items() if value or store.check([keys[rank]])]
        for rank, value in zip(stored, store.multi_get([keys[rank] for rank in stored]), strict=True):
            if self._seen[rank][0] != value:
                self._seen[rank] = value, now

    def _watch_connecting(self) -> None:
        now = time.monotonic()
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

    def _abort(self, circumstances: str) -> None:
        name = signal.Signals(self._signum).name
        log.warning("rank %d stopped by %s %s; resume from the last checkpoint", self.rank, name, circumstances)
        self._on_abort()
        os._exit(128 + self._signum)  # the main thread cannot exit


def _name_ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
