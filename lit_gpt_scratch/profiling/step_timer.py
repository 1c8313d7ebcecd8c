"""Where the time of a training step goes."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch

STEP_PHASES = ("data", "generation", "forward", "backward", "optimizer", "rest")
"""Of a step: waiting for the batch, writing what is in it, the three stages of its computation, and all else."""

COLLECT_EVERY = 32
"""Marks that are read at once: one by one, each between two cold caches, they would take twice as long."""


class TimerEvent(Protocol):
    """A moment, as ``torch.cuda.Event`` has it."""

    def record(self) -> Any:
        """It is now: for a device, when all that it was asked for so far is done."""

    def query(self) -> bool:
        """Whether the moment has come."""

    def synchronize(self) -> None:
        """Wait until it has."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from here to there."""


class HostTimerEvent:
    """A moment on the host's own clock."""

    def record(self) -> None:
        """It is now."""
        self._at = time.perf_counter()

    def query(self) -> bool:
        """What is recorded is past."""
        return True

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def elapsed_time(self, end_event: "HostTimerEvent") -> float:
        """Milliseconds from here to there."""
        return 1000 * (end_event._at - self._at)


# Not Apple's: to read the time between two of its events waits for the device.
EVENT_TYPES: dict[str, Callable[[], TimerEvent]] = {
    "cpu": HostTimerEvent,
    "cuda": partial(torch.cuda.Event, enable_timing=True),
}


class StepTimer:
    """Adds up the seconds between marks by the part of the step that each mark ends.

    On an accelerator marks are events in its stream: they cost the host next to nothing, and the time between two of
    them is counted once the device has come past both. Only ``finish`` waits for it.

    Args:
        device: Where the computation runs; on one whose events cannot be read in passing nothing is counted.
    """

    def __init__(self, device: torch.device) -> None:
        self.running = False
        self._event = EVENT_TYPES.get(device.type)
        self._marks: deque[tuple[str | None, Mapping[str, float], TimerEvent]] = deque()
        self._last: TimerEvent | None = None
        self._seconds = dict.fromkeys(STEP_PHASES, 0.0)

    def start(self) -> None:
        """Count from now on."""
        self.running = True
        self._record(None, {})

    def stop(self) -> None:
        """Count nothing from the last mark on."""
        self.running = False

    def mark(self, part: str, apart: Mapping[str, float] | None = None) -> None:
        """What came since the last mark was ``part``; while stopped, this is nothing.

        Args:
            part: One of ``STEP_PHASES``.
            apart: Seconds of it that count as other parts, as those in which the host waited for data. An accelerator
                that had still work to do has not waited as long: together they are no more than all.
        """
        if self.running:
            self._record(part, apart or {})

    def take(self) -> dict[str, float]:
        """Seconds by part since the last time, as far as the device has come."""
        self._collect()
        taken, self._seconds = self._seconds, dict.fromkeys(STEP_PHASES, 0.0)
        return taken

    def finish(self) -> dict[str, float]:
        """Wait for the device, and take what is left."""
        self.stop()
        if self._marks:
            self._marks[-1][2].synchronize()
        return self.take()

    def _record(self, part: str | None, apart: Mapping[str, float]) -> None:
        if self._event is None:
            return
        event = self._event()
        event.record()
        self._marks.append((part, apart, event))
        if len(self._marks) > COLLECT_EVERY:  # so that a run without log points does not heap them up
            self._collect()

    def _collect(self) -> None:
        while self._marks and self._marks[0][2].query():
            part, apart, event = self._marks.popleft()
            if part is not None and self._last is not None:
                seconds = self._last.elapsed_time(event) / 1000
                for other, its in apart.items():
                    taken = min(its, seconds)
                    self._seconds[other] += taken
                    seconds -= taken
                self._seconds[part] += seconds
            self._last = event
