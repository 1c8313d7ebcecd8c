"""The spike guard, on faults planted in small real runs."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_gpt_scratch.callbacks import spike_guard as guard_module
from lit_gpt_scratch.callbacks.checkpointing import Checkpointing
from lit_gpt_scratch.callbacks.diagnostics import DiagnosticsCallback
from lit_gpt_scratch.callbacks.spike_guard import SpikeGuard
from lit_gpt_scratch.data import LabelledText, Preferences, Prompts
from lit_gpt_scratch.diagnostics.spike_detector import PATIENCE
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.optim import AdamW, Schedule
from lit_gpt_scratch.tasks import DPO, GRPO, PPO, Classification, LanguageModel, Reward

STEPS = 40
Build = Callable[..., Any]


class Faulty(LanguageModel):
    """Corrupts the loss of some steps: ``faults`` maps a step to a factor of its loss."""

    faults: dict[int, float] = {}  # noqa: RUF012 - each test sets its own
    seen: list[int]

    def loss_and_count(self, batch: Any) -> Any:
        loss, counted = super().loss_and_count(batch)
        if self.training and torch.is_grad_enabled():
            loss = loss * self.faults.get(self.trainer.global_step, 1.0)
        return loss, counted


class Weights(Callback):
    """The weights, averages and optimizer state after each step."""

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if len(self.after) < trainer.global_step:
            state = trainer.optimizers[0].state
            kept = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
            for name, p in pl_module.named_parameters():
                kept |= {f"{name} {k}": v.detach().clone() for k, v in state[p].items() if torch.is_tensor(v)}
            self.after.append(kept)


def all_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def run(
    packed_text: Build, trainer: Build, task: Build, tmp_path: Path
) -> Callable[..., tuple[L.Trainer, Faulty, SpikeGuard, Weights, DiagnosticsCallback]]:
    """A run with faults."""

    def build(mode: str, faults: dict[int, float], folder: str = "run", **changes: Any) -> Any:
        task_changes = {name: changes.pop(name) for name in ("optimizer", "ema_decay", "schedule") if name in changes}
        data, checkpoint = changes.pop("data", {}), changes.pop("ckpt_path", None)
        L.seed_everything(changes.pop("seed", 1), verbose=False)
        torch.manual_seed(0)
        model = Faulty(gpt=task()._gpt, compile=False, **task_changes)
        model.faults = faults
        guard, weights, doctor = SpikeGuard(mode, 10), Weights(), DiagnosticsCallback()
        logger = TensorBoardLogger(tmp_path, folder, "version_0", default_hp_metric=False)
        settings = {"max_steps": STEPS, "gradient_clip_val": 1.0, "log_every_n_steps": 5, "val_check_interval": 1000}
        own = trainer(
            **(settings | changes),
            check_val_every_n_epoch=None,
            enable_checkpointing=True,
            logger=logger,
            callbacks=[guard, weights, doctor, Checkpointing(every_n_steps=10, keep_best=0)],
        )
        own.fit(model, packed_text(**data), ckpt_path=checkpoint)
        return own, model, guard, weights, doctor

    return build


@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("optimizer", ["Muon", "AdamW"])
def test_a_step_that_is_not_finite_leaves_no_trace(run: Build, what: float, optimizer: str) -> None:
    recipe = {"optimizer": AdamW()} if optimizer == "AdamW" else {}
    _, _, guard, weights, doctor = run("act", {7: what}, ema_decay=0.9, max_steps=12, **recipe)
    assert guard.n_skipped == 1
    assert all_equal(weights.after[6], weights.after[7])  # step 7 is the eighth
    assert not all_equal(weights.after[7], weights.after[8])
    assert [(d.name, d.step) for d in doctor.engine.diagnoses if d.name == "not finite"] == [("not finite", 7)]


def test_without_faults_the_guard_changes_nothing(run: Build) -> None:
    ends = [run(mode, {}, folder=mode, max_steps=25)[3].after[-1] for mode in ("off", "warn", "act")]
    assert all_equal(ends[0], ends[1])
    assert all_equal(ends[0], ends[2])


@pytest.mark.parametrize("mode", ["off", "warn"])
def test_without_act_the_guard_only_reports(run: Build, mode: str) -> None:
    _, model, guard, _, doctor = run(mode, {7: math.nan}, folder=mode, max_steps=12)
    assert guard.n_skipped == 0
    assert not all(p.isfinite().all() for p in model.parameters())
    found = [d for d in doctor.engine.diagnoses if d.name == "not finite"]
    assert found[0].step == (7 if mode == "warn" else 9)
    assert found[0].flag == "--guard act"
    if mode == "warn":
        assert "in all gradients" in found[0].symptom


def test_a_spike_is_skipped_and_its_documents_are_named(run: Build) -> None:
    _, _, guard, weights, doctor = run("act", {30: 40.0}, data={"validation_share": 0.2})
    assert guard.n_skipped == 1
    assert all_equal(weights.after[29], weights.after[30])
    (found,) = [d for d in doctor.engine.diagnoses if d.name == "loss spike"]
    assert found.step == 30
    assert "document" in found.symptom


def test_accumulated_gradients_are_one_step(run: Build) -> None:
    _, _, guard, weights, _ = run("act", {5: math.nan}, max_steps=8, accumulate_grad_batches=3)
    assert guard.n_skipped == 1
    assert all_equal(weights.after[4], weights.after[5])


def test_when_skipping_does_not_help_the_run_is_rewound(run: Build, tmp_path: Path) -> None:
    faults = dict.fromkeys(range(34, 34 + PATIENCE), 40.0)
    own, model, guard, weights, _ = run("act", faults, max_steps=50)
    folder = tmp_path / "run" / "version_0" / "checkpoints"
    assert guard.n_skipped == PATIENCE
    rewound = weights.after[34 + PATIENCE - 1]
    assert [path.name for path in folder.glob("good-*")] == [f"good-{guard.good}.ckpt"]
    assert all_equal(rewound, weights.after[29])  # the thirtieth
    assert own.global_step == 50
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_run_that_stays_non_finite_is_rewound_then_stopped_and_reported(
    run: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guard_module, "MAX_SKIPPED_IN_A_ROW", 12)
    faults = dict.fromkeys(range(34, 100), math.nan)
    own, model, guard, weights, doctor = run("act", faults, max_steps=100)
    assert all_equal(weights.after[34 + PATIENCE - 1], weights.after[29])
    assert own.global_step == 34 + guard_module.MAX_REWINDS * PATIENCE + 12
    assert all(p.isfinite().all() for p in model.parameters())
    rewound = [d.step for d in doctor.engine.diagnoses if d.name == "rewound"]
    assert rewound == [34 + PATIENCE * n - 1 for n in range(1, guard_module.MAX_REWINDS + 1)]
    skipped = doctor.engine.history["guard/refused"]
    assert (skipped.step, skipped.last) == (own.global_step - 1, guard.n_skipped)
    assert caplog.text.count("consecutive outliers; rewinding to the weights of step 30") == guard_module.MAX_REWINDS
    assert "12 consecutive steps were skipped after 3 rewinds; stopping the run" in caplog.text
    assert guard.gave_up
    last = Path(own.loggers[0].log_dir or "") / "checkpoints" / "last.ckpt"
    assert run("act", faults, max_steps=100, ckpt_path=last)[2].gave_up
    assert not run("act", {}, max_steps=100, ckpt_path=last)[2].gave_up


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(run: Build, tmp_path: Path) -> None:
    faults = dict.fromkeys(range(34, 34 + PATIENCE), 40.0) | {12: math.nan, 47: 30.0}
    uninterrupted = run("act", faults, folder="uninterrupted", max_steps=50, ema_decay=0.9)[3]
    for stop in (33, 37, 44):
        run("act", faults, folder=f"part{stop}", max_steps=stop, ema_decay=0.9, schedule=Schedule(decay="constant"))
    kept = run("act", faults, folder="constant", max_steps=50, ema_decay=0.9, schedule=Schedule(decay="constant"))[3]
    for stop in (33, 37, 44):
        folder = tmp_path / f"part{stop}" / "version_0"
        rest = run(
            "act", faults, folder=f"part{stop}", max_steps=50, ema_decay=0.9, schedule=Schedule(decay="constant"),
            ckpt_path=folder / "checkpoints" / "last.ckpt",
        )[3]  # fmt: skip
        assert all_equal(rest.after[-1], kept.after[-1]), stop
    assert not all_equal(uninterrupted.after[-1], kept.after[-1])


REPLIES = {"reward": "tests.custom_reward.even_tokens", "steps_per_phase": 2}
KINDS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "language model": (LanguageModel, {}, None),
    "classes": (Classification, {}, LabelledText),
    "reward": (Reward, {}, Preferences),
    "DPO": (DPO, {}, Preferences),
    "PPO": (PPO, REPLIES, Prompts),
    "GRPO": (GRPO, {**REPLIES, "group": 4}, Prompts),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_gets_a_report_and_no_run_ends(kind: str, packed_text: Build, trainer: Build, cache: Path) -> None:
    """A batch may be windows, texts with a class, pairs of rows, or replies that no data module has."""
    base, settings, data_class = KINDS[kind]

    def loss_and_count(self: Any, batch: Any) -> Any:
        loss, counted = base.loss_and_count(self, batch)
        return loss * (math.nan if torch.is_grad_enabled() and self.trainer.global_step == 2 else 1.0), counted

    L.seed_everything(1, verbose=False)
    faulty = type("Faulty", (base,), {"loss_and_count": loss_and_count})
    model = faulty(gpt=GPTConfig(n_layer=1, n_head=2, n_embd=32), compile=False, **settings)
    shape = {"cache": str(cache), "vocab_size": 300, "batch_size": 4}
    reply = {"reply_tokens": 8, "block_size": 96} if data_class in (Preferences, Prompts) else {"block_size": 128}
    data = packed_text() if data_class is None else data_class(**shape, **reply)
    doctor, noted, modes = DiagnosticsCallback(), [], []

    class After(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            noted.append(dict(getattr(model, "_noted", {})))
            modes.append({module.training for module in model.net.modules()})

    own = trainer(max_steps=4, limit_val_batches=0, log_every_n_steps=1, callbacks=[SpikeGuard("act"), After(), doctor])
    own.fit(model, data)
    assert own.global_step == 4
    report = doctor.engine.history.text("guard/non_finite/where", 2)
    assert "in all gradients" in report
    assert (report.count("- loss"), "record" in report) == {
        "language model": (3, False), "classes": (3, True), "reward": (3, True), "DPO": (3, True),
    }.get(kind, (0, False))  # fmt: skip
    assert not any(noted)  # the inspected step is not a logging step
    assert modes == [{True}] * 4


def test_a_gradient_scaler_may_overflow_but_large_gradients_are_still_seen() -> None:
    guard = SpikeGuard("warn")
    guard._scales, guard._reads_at_once = True, False
    guard._trainer = SimpleNamespace(loggers=[])
    for norm, row in [(1.0, 0)] * 30 + [(math.inf, 0), (math.nan, 0), (100.0, 1), (1.0, 0)]:
        guard._unread.append((0, torch.tensor([4.0, norm])))
        guard._read()
        assert guard.detector.in_a_row == row


def test_a_missing_good_checkpoint_is_noticed_and_none_is_left_behind(run: Build, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "version_0" / "checkpoints"
    guard = run("act", {}, max_steps=31)[2]
    assert guard.good == 30
    own = folder / "good-30.ckpt"
    own.rename(folder / "good-37.ckpt")  # as after a kill between writing it and writing last.ckpt
    faults = dict.fromkeys(range(31, 31 + PATIENCE), 40.0)
    guard = run("act", faults, max_steps=39, ckpt_path=folder / "last.ckpt")[2]
    assert guard.good is None
    assert guard.n_skipped == PATIENCE
    assert not list(folder.glob("good-*"))


@pytest.mark.slow
def test_two_hundred_faults_leave_no_trace(run: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half are not finite, half are spikes; every checkpoint is checked when it is written."""
    steps = list(range(30, 430, 2))
    faults = {step: (math.nan, 40.0, math.inf, 60.0)[place % 4] for place, step in enumerate(steps)}
    saved = []
    save = L.Trainer.save_checkpoint

    def looked_at(self: L.Trainer, path: Any, *args: Any, **kwargs: Any) -> None:
        save(self, path, *args, **kwargs)
        state = torch.load(path, weights_only=True)["state_dict"]
        saved.append(all(value.isfinite().all() for value in state.values() if torch.is_tensor(value)))

    monkeypatch.setattr(L.Trainer, "save_checkpoint", looked_at)
    _, _, guard, weights, doctor = run("act", faults, max_steps=440, ema_decay=0.9)
    poisoned = [step for step in steps if not all_equal(weights.after[step - 1], weights.after[step])]
    print(f"{len(steps)} faults: {guard.n_skipped} left out, {len(poisoned)} in the weights, {saved.count(False)} of "
          f"{len(saved)} checkpoints not finite")  # fmt: skip
    assert (guard.n_skipped, poisoned, saved.count(False)) == (200, [], 0)
    assert {d.name for d in doctor.engine.diagnoses} >= {"not finite", "loss spike"}
    _, model, guard, _, _ = run("off", faults, folder="off", max_steps=40)
    assert guard.n_skipped == 0
    assert not all(p.isfinite().all() for p in model.parameters())
