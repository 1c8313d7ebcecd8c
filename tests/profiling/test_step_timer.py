"""Times of the phases of a step, on a simulated device."""

import time

import pytest
import torch

from lit_gpt_scratch.profiling import step_timer
from lit_gpt_scratch.profiling.step_timer import STEP_PHASES, StepTimer


class Device:
    """A host that submits work and a device that runs it in order, each with its own clock."""

    def __init__(self) -> None:
        self.host = self.busy_until = 0.0
        self.waits = 0

    def ask(self, seconds: float) -> None:
        """Submit work to the device; the host continues."""
        self.busy_until = max(self.busy_until, self.host) + seconds

    def event(self) -> "Moment":
        return Moment(self)


class Moment:
    """An event of the simulated device."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.at = max(self.device.busy_until, self.device.host)

    def query(self) -> bool:
        return self.at <= self.device.host

    def synchronize(self) -> None:
        self.device.waits += 1
        self.device.host = max(self.device.host, self.at)

    def elapsed_time(self, end_event: "Moment") -> float:
        assert self.query(), "reading an event that is to come waits for the device"
        assert end_event.query(), "reading an event that is to come waits for the device"
        return 1000 * (end_event.at - self.at)


def train(device: Device, clock: StepTimer, steps: int, loading: float, after: float = 0.0) -> None:
    """Steps of 1 + 2 + 1 seconds on the device."""
    clock.start()
    for step in range(steps):
        if step:
            device.host += loading + after
            clock.mark("rest", {"data": loading})
        for phase, seconds in (("forward", 1.0), ("backward", 2.0), ("optimizer", 1.0)):
            device.host += 0.01
            device.ask(seconds)
            clock.mark(phase)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setitem(step_timer.EVENT_TYPES, "cuda", device.event)
    return device


@pytest.mark.parametrize(
    ("loading", "after", "data", "rest"),
    [
        (0.5, 0.3, 0.0, 0.0),  # all hidden by the device's work
        (6.97, 0.0, 3.0, 0.0),  # of 7 s until the next forward pass, the device was busy for 4
        (2.0, 4.97, 2.0, 1.0),  # the same, but callbacks took most of it
    ],
)
def test_device_waits_for_data_only_while_idle(
    device: Device, loading: float, after: float, data: float, rest: float
) -> None:
    clock, steps = StepTimer(torch.device("cuda")), 5
    train(device, clock, steps, loading, after)
    assert device.waits == 0
    taken = clock.finish()
    assert device.waits == 1
    assert (taken["forward"], taken["backward"], taken["optimizer"]) == pytest.approx((5, 10, 5), abs=0.2)
    assert (taken["data"], taken["rest"]) == pytest.approx(((steps - 1) * data, (steps - 1) * rest), abs=0.2)


def test_events_not_reached_yet_count_later(device: Device) -> None:
    clock = StepTimer(torch.device("cuda"))
    train(device, clock, 5, loading=0.0)
    assert sum(clock.take().values()) == 0  # the host is 20 s ahead
    device.host = 10.5  # two steps, and half of the third
    assert sum(clock.take().values()) == pytest.approx(9, abs=0.1)
    assert sum(clock.finish().values()) == pytest.approx(11, abs=0.1)
    assert device.waits == 1


def test_marks_do_not_accumulate(device: Device) -> None:
    clock = StepTimer(torch.device("cuda"))
    clock.start()
    for _ in range(100):
        device.ask(0.1)
        clock.mark("forward")
        device.host += 0.1
    assert len(clock._marks) <= step_timer.COLLECT_EVERY


def test_nothing_is_counted_while_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([1.0, 3.0, 100.0, 107.0, 200.0, 207.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    clock = StepTimer(torch.device("cpu"))
    clock.mark("rest")
    clock.start()
    clock.mark("forward")
    clock.stop()
    clock.mark("backward")
    clock.start()
    clock.mark("rest", {"data": 3.0, "generation": 2.0})
    assert clock.take() == dict.fromkeys(STEP_PHASES, 0.0) | {
        "forward": 2.0,
        "data": 3.0,
        "generation": 2.0,
        "rest": 2.0,
    }


def test_device_without_suitable_events_is_not_timed() -> None:
    clock = StepTimer(torch.device("mps"))
    clock.start()
    clock.mark("forward")
    assert not any(clock.finish().values())
