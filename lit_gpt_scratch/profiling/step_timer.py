"""Time of a training step by phase: data, generation, forward, backward, optimizer."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch

STEP_PHASES = ("data", "generation", "forward", "backward", "optimizer", "rest")
"""Phases of a step: waiting for the batch, generating rollouts, the three compute phases, and the rest."""

COLLECT_EVERY = 32
"""Number of marks that are read together: one at a time, with cold caches, they would take twice as long."""


class TimerEvent(Protocol):
    """A point in time, with the interface of ``torch.cuda.Event``."""

    def record(self) -> Any:
        """Record the event: on a device, when all work submitted so far is done."""

    def query(self) -> bool:
        """Whether the event has happened."""

    def synchronize(self) -> None:
        """Wait until the event has happened."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this event to another."""


class HostTimerEvent:
    """An event on the host's clock."""

    def record(self) -> None:
        """Record the event now."""
        self._at = time.perf_counter()

    def query(self) -> bool:
        """A recorded event has always happened."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, end_event: "HostTimerEvent") -> float:
        """Milliseconds from this event to another."""
        return 1000 * (end_event._at - self._at)


# Not MPS: reading the time between two of its events waits for the device.
EVENT_TYPES: dict[str, Callable[[], TimerEvent]] = {
    "cpu": HostTimerEvent,
    "cuda": partial(torch.cuda.Event, enable_timing=True),
}


class StepTimer:
    """Accumulates the seconds between marks by the phase that each mark ends.

    On an accelerator, marks are events in its stream: they cost the host almost nothing, and the time between two of
    them is counted once the device has passed both. Only ``finish`` waits for the device.

    Args:
        device: Device of the computation; on one whose events cannot be read without waiting, nothing is counted.
    """

    def __init__(self, device: torch.device) -> None:
        self.running = False
        self._event = EVENT_TYPES.get(device.type)
        self._marks: deque[tuple[str | None, Mapping[str, float], TimerEvent]] = deque()
        self._last: TimerEvent | None = None
        self._seconds = dict.fromkeys(STEP_PHASES, 0.0)

    def start(self) -> None:
        """Start counting."""
        self.running = True
        self._record(None, {})

    def stop(self) -> None:
        """Stop counting; the time since the last mark is discarded."""
        self.running = False

    def mark(self, phase: str, waits: Mapping[str, float] | None = None) -> None:
        """End a phase: the time since the last mark belongs to ``phase``. Does nothing while stopped.

        Args:
            phase: One of ``STEP_PHASES``.
            waits: Seconds within it that count as other phases, by phase, e.g. while the host waited for data. They are
                limited to the phase's own time: an accelerator with work left has waited less than the host.
        """
        if self.running:
            self._record(phase, waits or {})

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, up to the last event that has happened."""
        self._collect()
        taken, self._seconds = self._seconds, dict.fromkeys(STEP_PHASES, 0.0)
        return taken

    def finish(self) -> dict[str, float]:
        """Stop, wait for the device, and return the remaining seconds by phase."""
        self.stop()
        if self._marks:
            self._marks[-1][2].synchronize()
        return self.take()

    def _record(self, phase: str | None, waits: Mapping[str, float]) -> None:
        if self._event is None:
            return
        event = self._event()
        event.record()
        self._marks.append((phase, waits, event))
        if len(self._marks) > COLLECT_EVERY:  # so that they do not accumulate in a run that never logs
            self._collect()

    def _collect(self) -> None:
        while self._marks and self._marks[0][2].query():
            phase, waits, event = self._marks.popleft()
            if phase is not None and self._last is not None:
                seconds = self._last.elapsed_time(event) / 1000
                for other, wait in waits.items():
                    taken = min(wait, seconds)
                    self._seconds[other] += taken
                    seconds -= taken
                self._seconds[phase] += seconds
            self._last = event
