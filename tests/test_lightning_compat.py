"""What this package relies on in Lightning: private attributes (``lightning_compat.py``) and undocumented behaviour.

A new version of Lightning that changes one of them fails here. Facts tested elsewhere: the order of ranks
(``end_to_end/test_multi_process.py``), counters and hooks of a resumed run (``checkpoint/test_loop_state.py``), the
copy that a background save works on (``checkpoint/test_checkpoint_io.py``), a swapped class that keeps same-named
arguments (``end_to_end/test_commands.py``).
"""

import ast
import importlib
import inspect
import pkgutil
import random
import re
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.strategies.launchers import subprocess_script
from lightning.pytorch.callbacks import Checkpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

import lit_gpt_scratch
from lit_gpt_scratch import lightning_compat
from lit_gpt_scratch.cli.fit import FitCLI
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.tasks import LanguageModel

Build = Callable[..., Any]


class Hooks(L.Callback):
    """Records hooks and the trainer's state in them."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append(("start", signal.getsignal(signal.SIGTERM)))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append(("batch", trainer.fit_loop.epoch_loop.total_batch_idx))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen.append(("accumulating", lightning_compat.is_accumulating(trainer)))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append(("validation", trainer.global_step))
        self.seen.append(("between steps", lightning_compat.is_validating_between_steps(trainer)))

    def of(self, name: str) -> list[Any]:
        return [value for hook, value in self.seen if hook == name]


# The private attributes behind lightning_compat


def test_only_lightning_compat_touches_private_attributes_of_lightning() -> None:
    pytest.importorskip("optuna")  # the scan imports every module
    assert list(_private_uses()) == []


def _private_uses() -> Iterator[str]:
    """``file:line name`` of each private name of Lightning that a module other than ``lightning_compat`` uses.

    These are private names imported from it; attributes of objects other than ``self`` that Lightning defines and this
    module does not; and, in subclasses of its classes, attributes and methods that those define.
    """
    root = Path(inspect.getfile(lit_gpt_scratch)).parent
    defined = _private_names(Path(inspect.getfile(L)).parent.glob("**/*.py"))
    for path in sorted(root.glob("**/*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name == "lightning_compat.py" or ("lightning" not in text and "trainer" not in text):
            continue
        own = _private_names([path])
        where = path.relative_to(root)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
                yield from (f"{where}:{node.lineno} {alias.name}" for alias in node.names if alias.name[0] == "_")
            elif isinstance(node, ast.Attribute) and node.attr in defined - own - TORCH_NAMES:
                if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                    yield f"{where}:{node.lineno} {node.attr}"
            elif isinstance(node, ast.Constant) and node.value in defined - own - TORCH_NAMES:  # getattr, dictionaries
                yield f"{where}:{node.lineno} {node.value!r}"
    for module in pkgutil.walk_packages([str(root)], "lit_gpt_scratch."):
        if module.name.endswith(".__main__") or module.name.count(".") == 1 or "lm_eval" in module.name:
            continue  # commands; an optional library
        for name, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if cls.__module__ == module.name and any(base.__module__.startswith("lightning.") for base in cls.__mro__):
                own = set(re.findall(r"(?:self\.|def )(_[a-z]\w*)", inspect.getsource(cls)))
                theirs = set[str]()
                for base in cls.__mro__:
                    if base.__module__.startswith("lightning."):
                        theirs |= set(re.findall(r"(?:self\.|def )(_[a-z]\w*)", inspect.getsource(base)))
                yield from (f"{module.name}.{name} {used}" for used in sorted(own & theirs))


TORCH_NAMES = {"_foreach_mul_", "_compiled_call_impl", "_replace", "_fields", "_asdict"}
"""Private names of torch and of named tuples that Lightning uses, too."""


def _private_names(paths: Any) -> set[str]:
    found: set[str] = set()
    for path in paths:
        text = path.read_text(encoding="utf-8")
        found |= set(re.findall(r"(?:self\.|def |^class |^)(_[A-Za-z]\w*)", text, re.MULTILINE))
    return found


def test_accumulation_ends_with_a_step_and_with_an_epoch(trainer: Build, task: Build, packed_text: Build) -> None:
    hooks = Hooks()
    flags = {"val_check_interval": 4, "check_val_every_n_epoch": None, "accumulate_grad_batches": 3, "max_epochs": 1}
    trainer(callbacks=[hooks], limit_train_batches=7, **flags | {"max_steps": -1}).fit(task(), packed_text())
    assert hooks.of("accumulating") == [True, True, False, True, True, False, False]
    assert hooks.of("between steps") == [False]  # after the fourth batch


def test_a_run_can_stop_early_from_min_steps_on(trainer: Build, task: Build, packed_text: Build) -> None:
    found = []

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = True
            found.append(lightning_compat.can_stop_early(trainer))

    trainer(callbacks=[Stop()], min_epochs=0, min_steps=3, max_steps=5, limit_val_batches=0).fit(task(), packed_text())
    assert found == [False, False, True]


def test_the_logging_step_can_be_set(trainer: Build, task: Build, packed_text: Build, tmp_path: Path) -> None:
    steps = []

    class Shift(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
            lightning_compat.set_logging_step(trainer, 100 + trainer.global_step)

    class Steps(CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            steps.append(step)

    logger = Steps(tmp_path)
    run = trainer(callbacks=[Shift()], logger=logger, max_steps=2, limit_val_batches=0, log_every_n_steps=1)
    run.fit(task(), packed_text())
    assert steps == [100, 101]
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["loops"]["fit_loop"]
    before = saved["epoch_loop.state_dict"].copy()
    lightning_compat.set_saved_logging_step(saved, 7)
    assert saved["epoch_loop.state_dict"].keys() == before.keys()
    assert 7 in saved["epoch_loop.state_dict"].values()


def test_lightning_installs_its_signal_handlers_and_restores_the_former(
    trainer: Build, task: Build, packed_text: Build
) -> None:
    hooks, before = Hooks(), signal.getsignal(signal.SIGTERM)
    trainer(max_steps=1, callbacks=[hooks]).fit(task(), packed_text())
    assert hooks.of("start") != [before]
    assert signal.getsignal(signal.SIGTERM) == before


def test_signal_handlers_can_be_disabled(trainer: Build, task: Build, packed_text: Build) -> None:
    hooks, before = Hooks(), signal.getsignal(signal.SIGTERM)
    run = trainer(max_steps=1, callbacks=[hooks])
    lightning_compat.disable_signal_handlers(run)
    run.fit(task(), packed_text())
    assert hooks.of("start") == [before]


def test_weights_and_optimizers_are_restored_during_training(
    trainer: Build, task: Build, packed_text: Build, tmp_path: Path
) -> None:
    kept: dict[str, Any] = {}

    class Rewind(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, model: L.LightningModule, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "good.ckpt")
                kept["state"] = {name: value.clone() for name, value in model.state_dict().items()}
            if trainer.global_step == 4:
                lightning_compat.restore_weights_and_optimizers(trainer, tmp_path / "good.ckpt")
                kept["path"] = trainer.ckpt_path
                kept["same"] = all(
                    torch.equal(value, kept["state"][name]) for name, value in model.state_dict().items()
                )

    run = trainer(max_steps=6, callbacks=[Rewind()], limit_val_batches=0)
    run.fit(task(), packed_text())
    assert kept["same"]
    assert kept["path"] is None
    assert run.global_step == 6


def test_child_processes_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = []
    launcher = object.__new__(_SubprocessScriptLauncher)
    monkeypatch.setattr(_SubprocessScriptLauncher, "kill", lambda self, signum: killed.append(signum))
    lightning_compat.kill_child_processes(SimpleNamespace(strategy=SimpleNamespace(launcher=launcher)))  # type: ignore[arg-type]
    lightning_compat.kill_child_processes(SimpleNamespace(strategy=SimpleNamespace(launcher=None)))  # type: ignore[arg-type]
    assert killed == [signal.SIGKILL]


def test_the_timeout_of_collective_operations_is_that_of_the_strategy(trainer: Build) -> None:
    limited = trainer(strategy=DDPStrategy(timeout=timedelta(seconds=7)))
    assert lightning_compat.collective_timeout(limited) == timedelta(seconds=7)
    for strategy in ("auto", "ddp", "fsdp2"):
        assert lightning_compat.collective_timeout(trainer(strategy=strategy)) == timedelta(minutes=30)


@pytest.mark.parametrize(
    ("strategy", "expected"), [("auto", True), ("ddp", True), ("fsdp2", True), ("ddp_spawn", False)]
)
def test_only_some_strategies_train_in_this_process(trainer: Build, strategy: str, expected: bool) -> None:
    assert lightning_compat.trains_in_this_process(trainer(strategy=strategy, devices=2)) == expected


def test_the_launcher_kills_all_processes_when_one_fails() -> None:
    """So it is replaced; its replacement repeats the rest of ``launch``."""
    source = inspect.getsource(subprocess_script._ChildProcessObserver._run)
    assert "if proc.returncode:" in source
    assert "self._terminate_all()" in source
    lines = [line.strip() for line in inspect.getsource(_SubprocessScriptLauncher.launch).splitlines()]
    assert lines[lines.index("self._call_children_scripts()") :] == [
        "self._call_children_scripts()",
        "_launch_process_observer(self.procs)",
        "",
        "_set_num_threads_if_needed(num_processes=self.num_processes)",
        "return function(*args, **kwargs)",
    ]


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "fsdp2"])
def test_launcher_of_fit_is_replaced(strategy: str) -> None:
    """After ``ddp_spawn`` has been replaced, which configures another launcher."""
    cli = FitCLI([f"--trainer.strategy={strategy}", "--trainer.devices=2", "--trainer.accelerator=cpu"])
    assert isinstance(cli.trainer.strategy.launcher, lightning_compat.UnobservedLauncher)


def test_failed_children_are_found(trainer: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    built = trainer(strategy="ddp", devices=4)
    lightning_compat.replace_launcher(built.strategy)
    launcher = built.strategy.launcher
    assert isinstance(launcher, lightning_compat.UnobservedLauncher)
    started = [SimpleNamespace(poll=lambda code=code: code) for code in (None, 0, -9)]
    monkeypatch.setattr(launcher, "_call_children_scripts", lambda: setattr(launcher, "procs", started))
    assert launcher.launch(lambda: "trained") == "trained"
    assert lightning_compat.failed_child_processes(built) == {3: -9}
    alone = trainer(devices=1)
    lightning_compat.replace_launcher(alone.strategy)
    assert lightning_compat.failed_child_processes(alone) == {}


def test_fetching_a_batch_is_a_profiler_action(trainer: Build, task: Build, packed_text: Build) -> None:
    profiler = SimpleProfiler()
    trainer(max_steps=3, profiler=profiler, limit_val_batches=0).fit(task(), packed_text())
    assert len(profiler.recorded_durations[lightning_compat.FETCH_BATCH_ACTION]) == 3


def test_model_parallel_sizes_are_read_when_processes_are_set_up() -> None:
    source = inspect.getsource(ModelParallelStrategy.setup_environment)
    assert source.index("self._setup_distributed()") < source.index(
        "self._data_parallel_size, self._tensor_parallel_size"
    )


def test_a_background_checkpoint_io_runs_in_order_and_raises_at_the_end(tmp_path: Path) -> None:
    plugin = lightning_compat.SingleThreadCheckpointIO(TorchCheckpointIO())
    for n in range(3):
        plugin.submit("save_checkpoint", {"n": n}, tmp_path / "x.ckpt")
    plugin.teardown()
    assert torch.load(tmp_path / "x.ckpt", weights_only=True) == {"n": 2}
    plugin.submit("load_checkpoint", tmp_path / "missing.ckpt").result()
    assert isinstance(plugin.error, FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        plugin.teardown()


# Behaviour that is public but undocumented


def test_a_timer_reports_its_limit_before_the_run_begins() -> None:
    assert Timer("00:00:01:00").time_remaining() == 60.0
    assert Timer().time_remaining() is None


def test_a_validation_interval_counts_micro_batches(trainer: Build, task: Build, packed_text: Build) -> None:
    hooks = Hooks()
    flags = {"val_check_interval": 4, "check_val_every_n_epoch": None, "accumulate_grad_batches": 2, "max_steps": 5}
    trainer(callbacks=[hooks], **flags).fit(task(), packed_text())
    assert hooks.of("validation") == [2, 4]
    assert hooks.of("batch") == list(range(10))


def test_random_states_are_not_saved(trainer: Build, packed_text: Build, task: Build, tmp_path: Path) -> None:
    """If they were, ``GPTModule`` would not have to seed each batch."""
    run = trainer(max_steps=2)
    run.fit(task(), packed_text())
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert not any("rng" in name or "random" in name for name in torch.load(tmp_path / "x.ckpt", weights_only=True))


def test_a_task_seeds_each_batch_by_its_position(
    trainer: Build, packed_text: Build, task: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[float, float, float]] = []
    step = LanguageModel.training_step

    def record(self: LanguageModel, *args: Any) -> torch.Tensor:
        drawn.append((torch.rand(()).item(), random.random(), float(np.random.rand())))  # noqa: NPY002 - the seeded generators
        return step(self, *args)

    monkeypatch.setattr(LanguageModel, "training_step", record)
    for _ in range(2):
        L.seed_everything(1)
        torch.rand(len(drawn))  # numbers drawn before
        trainer(max_steps=3).fit(task(), packed_text())
    assert drawn[:3] == drawn[3:]
    assert len(set(drawn)) == 3


def test_checkpoint_callbacks_run_last() -> None:
    order = L.Trainer(accelerator="cpu", logger=False, callbacks=[Checkpoint(), Hooks()]).callbacks
    assert isinstance(order[-1], Checkpoint)


def test_a_finished_run_calls_no_hook(trainer: Build, task: Build, packed_text: Build) -> None:
    """So a run that misses only its last validation has to allow one more step."""
    hooks, run = Hooks(), trainer(max_steps=2)
    run.fit(task(), packed_text())
    run.callbacks.append(hooks)
    run.fit(task(), packed_text())
    assert hooks.seen == []


def test_ckpt_path_last_finds_nothing_after_a_stopped_run(
    trainer: Build, task: Build, packed_text: Callable[..., PackedText], recwarn: pytest.WarningsRecorder
) -> None:
    """``fit --ckpt_path last`` therefore searches the run folders itself."""
    run = trainer(max_steps=1)
    run.fit(task(), packed_text(), ckpt_path="last")
    assert any("no last checkpoint available" in str(warning.message) for warning in recwarn)
    assert run.global_step == 1
