"""Speed and shares of a run, against parts of a step that take known times."""

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lit_gpt_scratch.callbacks import throughput
from lit_gpt_scratch.callbacks.throughput import STEP_PHASES, TIME_SHARE_TAGS, HostTimerEvent, StepTimer, Throughput
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.lightning_compat import FETCH_BATCH_ACTION
from lit_gpt_scratch.tasks import LanguageModel

MILLISECONDS = {"data": 20, "generation": 0, "forward": 10, "backward": 30, "optimizer": 25, "rest": 15}
"""Of a micro-batch; the optimizer's of a step."""


now = [0.0]
"""Seconds, on a clock that only ``sleep`` advances, so that other load does not count."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])


def sleep(part: str) -> None:
    now[0] += MILLISECONDS[part] / 1000


class Slow(IterableDataset[Any]):
    """Batches that keep training waiting."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            sleep("data")
            yield {"input_ids": torch.zeros(2, 8, dtype=torch.int64)}


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        sleep("backward")
        return gradient


class SlowSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        sleep("optimizer")
        return loss


class Sleeping(L.LightningModule):
    """A task that is not a language model and only takes time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        sleep("forward")
        return SlowBackward.apply(self.weight)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        now[0] += 0.2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SlowSGD(self.parameters(), lr=0.1)


class Busy(L.Callback):
    """Another callback that takes time."""

    def on_train_batch_end(self, *_: Any) -> None:
        sleep("rest")


class RecordingLogger(Logger):
    """Keeps the logged metrics by name and step."""

    name, version = "notes", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, dict[int, float]] = {}

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        return None

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.logged.setdefault(name, {})[step or 0] = value

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.usefixtures("clock")
def test_shares_are_those_of_the_time_that_parts_take(trainer: Callable[..., L.Trainer], accumulate: int) -> None:
    watch, notes, profiler = Throughput(), RecordingLogger(), SimpleProfiler()
    batches, between_validations = 16, 8
    steps = batches // accumulate
    run = trainer(
        callbacks=[watch, Busy()], logger=notes, profiler=profiler, max_steps=steps,
        accumulate_grad_batches=accumulate, val_check_interval=between_validations, check_val_every_n_epoch=None,
        limit_val_batches=1, log_every_n_steps=steps,  # the first log point takes long
    )  # fmt: skip
    run.fit(Sleeping(), DataLoader(Slow(), batch_size=None), DataLoader(Slow(), batch_size=None))

    timed = range(accumulate, batches)  # the first step is not
    # Time before a batch counts, except where the clock starts: after the first step and after validations.
    gaps = [batch for batch in timed if batch != accumulate and batch % between_validations]
    times = {"data": len(gaps), "generation": 0, "rest": len(gaps), "forward": len(timed), "backward": len(timed)}
    times["optimizer"] = len(timed) // accumulate
    seconds = {part: times[part] * MILLISECONDS[part] / 1000 for part in STEP_PHASES}
    expected = {part: seconds[part] / sum(seconds.values()) for part in STEP_PHASES}
    assert {part: watch.figures[part] for part in STEP_PHASES} == pytest.approx(expected)
    assert sum(watch.figures[part] for part in STEP_PHASES) == pytest.approx(1)
    for step in notes.logged[TIME_SHARE_TAGS[0]]:
        assert sum(notes.logged[share][step] for share in TIME_SHARE_TAGS) == pytest.approx(1)
    assert watch.mean is not None
    assert watch.mean == pytest.approx(16 * len(timed) / sum(seconds.values()))
    assert watch.tokens == 16 * batches

    assert watch.figures["model_flops_utilisation"] == {}  # unknown for a task that is not a language model
    assert "throughput/model_flops_utilisation" not in notes.logged
    assert run.profiler is profiler
    assert len(profiler.recorded_durations[FETCH_BATCH_ACTION]) >= batches


def test_utilisation_is_the_paper_formula_of_the_speed(
    trainer: Callable[..., L.Trainer],
    task: Callable[..., LanguageModel],
    packed_text: Callable[..., PackedText],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(throughput, "peak_flops", lambda device, dtype: {"nominal": 3e12, "measured": 2e12})
    watch, notes, model = Throughput(), RecordingLogger(), task()
    trainer(callbacks=[watch], logger=notes, log_every_n_steps=2, limit_val_batches=0).fit(model, packed_text())

    matrices = sum(p.numel() for p in model.net.parameters() if p.ndim == 2)
    operations = 6 * (matrices - model.net.embedding.weight.numel()) + 12 * 2 * 32 * 32  # 6 N + 12 L d T
    speeds, logged = notes.logged["tokens_per_second"], notes.logged["throughput/model_flops_utilisation"]
    assert list(logged) == list(speeds) == [1, 3, 5, 7]
    for step, utilization in logged.items():
        assert utilization == pytest.approx(speeds[step] * operations / 3e12, rel=1e-5)
    assert watch.mean is not None
    assert watch.figures["model_flops_utilisation"] == pytest.approx(
        {"nominal": watch.mean * operations / 3e12, "measured": watch.mean * operations / 2e12}
    )
    assert watch.figures["peak_teraflops"] == {"nominal": 3, "measured": 2}
    assert notes.logged["throughput/peak_memory_gigabytes"][7] <= watch.figures["peak_memory_gigabytes"] < 1000


def test_a_peak_is_that_of_the_runs_precision(
    trainer: Callable[..., L.Trainer],
    task: Callable[..., LanguageModel],
    packed_text: Callable[..., PackedText],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(throughput, "peak_flops", lambda device, dtype: asked.append(dtype) or {"measured": 1e12})
    for precision in ("32-true", "bf16-mixed", "bf16-true", "64-true"):
        trainer(callbacks=[Throughput()], precision=precision, fast_dev_run=1).fit(task(), packed_text())
    assert asked == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float64]


def test_ranks_that_share_their_batch_count_it_once() -> None:
    watch = Throughput()
    ranks = SimpleNamespace(
        global_step=0, log_every_n_steps=0, world_size=4, distributed_sampler_kwargs={"num_replicas": 2, "rank": 1}
    )
    batch = {"input_ids": torch.zeros(3, 5, dtype=torch.int64)}
    watch.on_train_batch_end(ranks, None, None, batch, 0)  # type: ignore[arg-type]
    assert watch.tokens == 2 * 3 * 5


def test_no_one_waits_for_the_device_before_the_end(
    trainer: Callable[..., L.Trainer],
    task: Callable[..., LanguageModel],
    packed_text: Callable[..., PackedText],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits = []

    class Device(HostTimerEvent):
        def synchronize(self) -> None:
            waits.append(run.global_step)

        def query(self) -> bool:
            return bool(waits)  # it is behind by the whole run

    monkeypatch.setitem(throughput.EVENT_TYPES, "cpu", Device)
    watch, notes = Throughput(), RecordingLogger()
    run = trainer(callbacks=[watch], logger=notes, log_every_n_steps=1, limit_val_batches=0)
    run.fit(task(), packed_text())
    assert waits == [8]
    assert len(notes.logged["tokens_per_second"]) == 7
    assert not notes.logged.keys() & set(TIME_SHARE_TAGS)  # no shares were known at any log point
    assert sum(watch.figures[part] for part in STEP_PHASES) == pytest.approx(1)


class SimulatedDevice:
    """A host that submits work and a device that runs it in order, each with its own timer."""

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

    def __init__(self, device: SimulatedDevice) -> None:
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


def train(device: SimulatedDevice, timer: StepTimer, steps: int, loading: float, after: float = 0.0) -> None:
    """Steps of 1 + 2 + 1 seconds on the device."""
    timer.start()
    for step in range(steps):
        if step:
            device.host += loading + after
            timer.mark("rest", {"data": loading})
        for phase, seconds in (("forward", 1.0), ("backward", 2.0), ("optimizer", 1.0)):
            device.host += 0.01
            device.ask(seconds)
            timer.mark(phase)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimulatedDevice:
    device = SimulatedDevice()
    monkeypatch.setitem(throughput.EVENT_TYPES, "cuda", device.event)
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
    device: SimulatedDevice, loading: float, after: float, data: float, rest: float
) -> None:
    timer, steps = StepTimer(torch.device("cuda")), 5
    train(device, timer, steps, loading, after)
    assert device.waits == 0
    taken = timer.finish()
    assert device.waits == 1
    assert (taken["forward"], taken["backward"], taken["optimizer"]) == pytest.approx((5, 10, 5), abs=0.2)
    assert (taken["data"], taken["rest"]) == pytest.approx(((steps - 1) * data, (steps - 1) * rest), abs=0.2)


def test_events_not_reached_yet_count_later(device: SimulatedDevice) -> None:
    timer = StepTimer(torch.device("cuda"))
    train(device, timer, 5, loading=0.0)
    assert sum(timer.take().values()) == 0  # the host is 20 s ahead
    device.host = 10.5  # two steps, and half of the third
    assert sum(timer.take().values()) == pytest.approx(9, abs=0.1)
    assert sum(timer.finish().values()) == pytest.approx(11, abs=0.1)
    assert device.waits == 1


def test_marks_do_not_accumulate(device: SimulatedDevice) -> None:
    timer = StepTimer(torch.device("cuda"))
    timer.start()
    for _ in range(100):
        device.ask(0.1)
        timer.mark("forward")
        device.host += 0.1
    assert len(timer._marks) <= throughput.COLLECT_EVERY


def test_nothing_is_counted_while_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([1.0, 3.0, 100.0, 107.0, 200.0, 207.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    timer = StepTimer(torch.device("cpu"))
    timer.mark("rest")
    timer.start()
    timer.mark("forward")
    timer.stop()
    timer.mark("backward")
    timer.start()
    timer.mark("rest", {"data": 3.0, "generation": 2.0})
    assert timer.take() == dict.fromkeys(STEP_PHASES, 0.0) | {
        "forward": 2.0,
        "data": 3.0,
        "generation": 2.0,
        "rest": 2.0,
    }


def test_device_without_suitable_events_is_not_timed() -> None:
    timer = StepTimer(torch.device("mps"))
    timer.start()
    timer.mark("forward")
    assert not any(timer.finish().values())
