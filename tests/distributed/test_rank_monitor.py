"""When a rank counts as unresponsive, and when the monitor ends a process that has received a signal."""

from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from lit_gpt_scratch.distributed import rank_monitor as module
from lit_gpt_scratch.distributed.rank_monitor import (
    GRACE_SECONDS,
    INTERVAL,
    STUCK_SECONDS,
    UNRESPONSIVE_SECONDS,
    Failure,
    RankMonitor,
)
from lit_gpt_scratch.errors import UserError

SIGTERM = 15


class Machine:
    """The store, the clock and the other ranks of a monitor, as a simulation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.values: dict[str, bytes] = {}
        self.is_down = self.is_blocked = self.saves = self.needs_others = self.is_busy = False
        self.aborted: list[Any] = []
        self.connected = 0
        monkeypatch.setattr(module, "TCPStore", self.connect)
        monkeypatch.setattr(module, "is_saving", lambda alone=False: self.saves and not (alone and self.needs_others))
        clock = SimpleNamespace(
            sleep=lambda _: None,
            monotonic=lambda: self.now,
            process_time=lambda: self.now if self.is_busy else 0.0,
        )
        monkeypatch.setattr(module, "time", clock)
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", "1")

    def monitor(self, rank: int, ranks: int = 3) -> Any:
        monitor: Any = RankMonitor(rank, ranks, 1, timedelta(minutes=30), [SIGTERM], lambda: None)
        monitor._abort = self.aborted.append
        monitor._leave = lambda: self.aborted.append(monitor._first_failure)
        monitor.connect("0")
        return monitor

    def connect(self, *_: object, **__: object) -> "Machine":
        self.connected += 1
        self._fail_if_down()
        return self

    def set(self, key: str, value: str) -> None:
        self._fail_if_down()
        self.values[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key]

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        assert expected == ""
        return self.values.setdefault(key, value.encode())

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.values[key] for key in keys]

    def _fail_if_down(self) -> None:
        if self.is_down:
            raise RuntimeError("Connection reset by peer")

    def run(self, monitor: Any, seconds: float, others: Callable[[float], dict[int, str]] = lambda _: {}) -> None:
        """Run the monitor; ``others`` returns the prefixes of the heartbeats of the other ranks at a time."""
        end = self.now + seconds
        while self.now < end and not self.aborted:
            for rank, prefix in others(self.now).items():
                self.values[f"lit_gpt_scratch/0/{rank}"] = f"{prefix}{self.now}".encode()
            if not self.is_blocked:
                monitor._beat()
            monitor._watch_ranks()
            self.now += INTERVAL


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def healthy(_: float) -> dict[int, str]:
    return {0: "", 1: "", 2: ""}


def test_one_failure_of_the_store_is_forgotten(machine: Machine) -> None:
    monitor = machine.monitor(1)
    machine.run(monitor, 5, healthy)
    machine.is_down = True
    machine.run(monitor, 1, healthy)
    machine.is_down, machine.is_busy = False, True
    machine.run(monitor, 5, healthy)
    assert machine.connected == 1 + 1 + 1  # again in the next interval, in vain, and in the one after that
    monitor._receive(bytes([SIGTERM]))
    machine.run(monitor, 100, healthy)
    assert monitor.unresponsive_ranks() == []
    assert machine.aborted == []


def test_other_ranks_are_not_late_while_the_store_fails(machine: Machine) -> None:
    monitor = machine.monitor(1)
    monitor._receive(bytes([SIGTERM]))
    machine.is_busy = True
    machine.run(monitor, 5, healthy)
    for _ in range(3):
        machine.is_down = True
        machine.run(monitor, UNRESPONSIVE_SECONDS - 1, healthy)
        assert monitor.unresponsive_ranks() == []
        machine.is_down = False
        machine.run(monitor, INTERVAL, healthy)
    assert machine.aborted == []


@pytest.mark.parametrize("failure", ["is_down", "is_blocked"])
def test_rank_0_is_unresponsive_if_the_store_fails_repeatedly(machine: Machine, failure: str) -> None:
    monitor = machine.monitor(1)
    machine.run(monitor, 5, healthy)
    setattr(machine, failure, True)
    monitor._receive(bytes([SIGTERM]))
    machine.run(monitor, UNRESPONSIVE_SECONDS, healthy)
    assert machine.aborted == []
    machine.run(monitor, 2, healthy)
    assert machine.aborted == ["while it waited for rank 0"]


def test_rank_0_does_not_wait_for_itself(machine: Machine) -> None:
    monitor = machine.monitor(0)
    machine.is_down = True
    machine.run(monitor, 60)
    assert monitor.unresponsive_ranks() == []


def test_rank_without_a_heartbeat_does_not_hide_another(machine: Machine) -> None:
    """Rank 1 has ended before its first heartbeat, and rank 2 stops later."""
    monitor = machine.monitor(0)
    machine.run(monitor, 5, lambda _: {2: ""})
    assert monitor.unresponsive_ranks() == []
    machine.run(monitor, 5, lambda _: {2: ""})
    assert monitor.unresponsive_ranks() == [1]
    machine.run(monitor, UNRESPONSIVE_SECONDS + 1)
    assert monitor.unresponsive_ranks() == [1, 2]


def test_process_that_writes_a_checkpoint_is_not_ended(machine: Machine) -> None:
    monitor = machine.monitor(0)
    machine.run(monitor, 2, healthy)
    machine.saves = True
    monitor._receive(bytes([SIGTERM]))
    machine.run(monitor, 10 * STUCK_SECONDS)
    assert machine.aborted == []
    machine.saves = False
    machine.run(monitor, GRACE_SECONDS)
    assert machine.aborted == ["while it waited for ranks 1, 2"]


def test_process_that_saves_with_a_lost_rank_is_ended(machine: Machine) -> None:
    """Its checkpoint can never be complete; a rank that only writes slowly still sends heartbeats."""
    monitor = machine.monitor(0)
    machine.saves = machine.needs_others = True
    monitor._receive(bytes([SIGTERM]))
    machine.run(monitor, 3 * STUCK_SECONDS, lambda beat: dict.fromkeys(range(3), f"saving{beat}"))
    assert machine.aborted == []
    machine.run(monitor, STUCK_SECONDS + 10, lambda beat: dict.fromkeys(range(2), f"saving{beat}"))
    assert machine.aborted[:1] == ["while it waited for rank 2"]


def test_rank_that_writes_a_checkpoint_has_more_time(machine: Machine) -> None:
    """Its heartbeats may be delayed, but not for ever."""
    monitor = machine.monitor(1)
    monitor._receive(bytes([SIGTERM]))
    machine.run(monitor, 2, lambda _: {0: "saving", 2: ""})
    machine.run(monitor, STUCK_SECONDS - 5, lambda _: {2: ""})
    assert machine.aborted == []
    machine.run(monitor, 10, lambda _: {2: ""})
    assert machine.aborted == ["while it waited for rank 0"]


def test_idle_process_waits_for_a_rank_that_hangs(machine: Machine) -> None:
    monitor = machine.monitor(1)
    monitor._receive(bytes([SIGTERM]))
    machine.is_busy = True
    machine.run(monitor, 2 * STUCK_SECONDS, healthy)
    assert machine.aborted == []
    machine.is_busy = False
    machine.run(monitor, STUCK_SECONDS - 5, healthy)
    assert machine.aborted == []
    machine.run(monitor, 10, healthy)
    assert [words.startswith("after it had been idle for 60 s") for words in machine.aborted] == [True]


def test_all_ranks_leave_with_the_first_failure(machine: Machine) -> None:
    first, second = Failure(1, 1, "KeyError: 'x'"), Failure(2, 2, "the disk is full")
    for failure in (first, second):
        failed = machine.monitor(failure.rank)
        failed._local_failure = failure
        failed._beat()
        assert failed._first_failure == first
        failed._watch_ranks()  # its main thread ends it
        assert machine.aborted == []
    other = machine.monitor(0)
    machine.run(other, GRACE_SECONDS, healthy)
    assert machine.aborted == []
    machine.run(other, 2 * INTERVAL, healthy)
    assert machine.aborted == [first]
    assert str(first) == "rank 1: KeyError: 'x'"
    assert str(second) == "error: rank 2: the disk is full"


def test_failure_of_an_earlier_attempt_is_ignored(machine: Machine) -> None:
    machine.values["lit_gpt_scratch/earlier/failure"] = b'[1, 2, "x"]'
    machine.run(machine.monitor(0), 60, healthy)
    assert machine.aborted == []


def test_rank_that_saves_a_checkpoint_does_not_leave(machine: Machine) -> None:
    machine.values["lit_gpt_scratch/0/failure"] = b'[1, 2, "x"]'
    machine.saves = True
    monitor = machine.monitor(0)
    machine.run(monitor, 60, healthy)
    assert machine.aborted == []
    machine.saves = False
    machine.run(monitor, 2 * INTERVAL, healthy)
    assert machine.aborted == [Failure(1, 2, "x")]


def test_killed_child_ends_the_run(machine: Machine) -> None:
    monitor = machine.monitor(0)
    codes: dict[int, int] = {}
    monitor._failed_children = lambda: codes
    machine.run(monitor, 5, healthy)
    codes[2] = -9
    machine.run(monitor, 10, healthy)
    [failure] = machine.aborted
    assert str(failure) == "error: rank 0: rank 2 was killed by signal 9; resume the run with --ckpt_path last"


def test_child_that_ended_regularly_is_no_failure(machine: Machine) -> None:
    """With an exit code, such as that of a signal, after the end of its training."""
    monitor = machine.monitor(0)
    monitor._failed_children = lambda: {2: 143}
    machine.run(monitor, 1, lambda _: {1: ""})
    machine.values["lit_gpt_scratch/0/2"] = b"done"
    machine.run(monitor, 60, lambda _: {1: ""})
    assert machine.aborted == []


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("no such file; create it"), 2, "no such file; create it"),
        (OSError(28, "No space left on device", "/x"), 2, "No space left on device (/x); free disk space"),
        (KeyError("x"), 1, "KeyError: 'x'"),
        (RuntimeError("DataLoader timed out after 30 seconds"), 1, "RuntimeError: DataLoader timed out"),
        (dist.DistNetworkError("address already in use"), 1, "address already in use"),
        (dist.DistNetworkError("Connection reset by peer"), 2, "some of the 3 processes"),
    ],
)
def test_own_failure_is_described(machine: Machine, error: Exception, code: int, message: str) -> None:
    failure = machine.monitor(1)._explain(error)
    assert failure.exit_code == code
    assert message in failure.message


def test_error_is_printed_by_the_first_rank_of_the_machine_only(machine: Machine) -> None:
    """The other one waits for it, unless the first rank has ended before."""
    machine.values["lit_gpt_scratch/0/failure"] = b'[1, 2, "x"]'
    other, leader = machine.monitor(1), machine.monitor(0)
    other._local_leader, other._local_failure = 0, Failure(1, 2, "x")
    leader._beat()
    other._beat()
    assert not other._leader_has_printed
    leader._is_printed = True
    leader._beat()
    other._beat()
    assert other._wait_until_printed()

    late = machine.monitor(1)
    late.connect("another run")
    late._local_leader, late._local_failure = 0, Failure(1, 2, "x")
    machine.values["lit_gpt_scratch/another run/0"] = b"done"
    late._beat()
    assert not late._wait_until_printed()
