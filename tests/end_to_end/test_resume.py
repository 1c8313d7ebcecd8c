"""Resuming: sessions, changes since the run started, ends of runs, and exactness of every stage."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lit_gpt_scratch.checkpoint.checkpoint_io import save_checkpoint
from lit_gpt_scratch.checkpoint.compare_checkpoints import compare_checkpoints, read_curves
from lit_gpt_scratch.checkpoint.config_diff import diff_configs, flatten
from lit_gpt_scratch.checkpoint.loading import load_checkpoint
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.cli.resume import ResumedRun
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.optim import Muon
from lit_gpt_scratch.tasks import Classification
from tests.end_to_end import forked
from tests.end_to_end.conftest import STAGES, Command, Trained

RUN = Path("runs/pretrain/version_0")


def test_config_differences_have_flat_names() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": []}) == {"a.b": 1, "a.c.d": 2, "e": []}
    before, now = {"a": {"b": 1, "c": 2}, "gone": 1}, {"a": {"b": 1, "c": 3}, "new": 2}
    assert diff_configs(before, now) == {"a.c": (2, 3), "gone": (1, None), "new": (None, 2)}


def test_every_session_is_recorded(command: Command, small: list[str]) -> None:
    assert command("fit", *small, "--seed_everything=5").code == 0
    again = command("fit", "--ckpt_path=last", "--trainer.max_steps=20")
    assert again.code == 0, again.err
    assert "since the run started, trainer.max_steps changed from 12 to 20" in again.err
    first, second = json.loads((RUN / "provenance.json").read_text())["sessions"]
    assert (first["from_step"], second["from_step"]) == (0, 12)
    assert first["changed"] == {}
    assert second["changed"] == {"trainer.max_steps": [12, 20]}
    assert first["seed"] == second["seed"] == 5
    assert first["data"] == second["data"]
    assert first["versions"]["torch"] == torch.__version__
    assert len(first["code"]["sources"]) == 64
    assert first["hardware"]["processes"] == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("--seed_everything=7", "seed_everything changed from 0 to 7"),
        ("--model.optimizer.lr=0.001", "model.optimizer.lr"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("--data.batch_size=2", "data.batch_size changed from 4 to 2"),
                ("--model.schedule.decay=constant", "model.schedule.decay changed from wsd to constant"),
                ("--trainer.precision=bf16-mixed", "trainer.precision changed from 32-true to bf16-mixed"),
            )
        ),
    ],
)
def test_a_change_that_matters_is_rejected_unless_forced(
    command: Command, small: list[str], trained: Trained, change: str, expected: str
) -> None:
    trained(*small)
    rejected = command("fit", "--ckpt_path=last", "--trainer.max_steps=14", change)
    assert rejected.code == 2
    [line] = rejected.err.splitlines()
    assert expected in line
    assert line.endswith("--force")
    forced = command("fit", "--ckpt_path=last", "--trainer.max_steps=14", change, "--force")
    assert forced.code == 0, forced.err
    assert expected in forced.err


@pytest.mark.parametrize(
    "stage",
    [
        "classes",
        *(
            pytest.param(stage, marks=pytest.mark.slow)
            for stage in ("on-policy", "instructions", "rewards", "preferences", "on-policy, groups, adapters")
        ),
    ],
)
@pytest.mark.slow
def test_lightnings_weight_averaging(command: Command, staged: Callable[[str], list[str]], stage: str) -> None:
    """It builds the model before the task is set up; kills of such a run are tested in test_resume_stress.py."""
    average = ["--trainer.callbacks=EMAWeightAveraging", "--trainer.callbacks.decay=0.9"]
    average += ["--experiment=average", "--trainer.max_steps=4", "--trainer.limit_val_batches=2"]
    started = command("fit", *staged(stage), *average)
    assert started.code == 0, started.err
    again = command("fit", "--experiment=average", "--ckpt_path=last", "--trainer.max_steps=6")
    assert again.code == 0, again.err


@pytest.mark.slow
def test_weight_averaging_keeps_the_size_of_tokens(command: Command, small: list[str]) -> None:
    """The averaged model is validated: another loss, but the same bits per byte for each nat per token."""
    average = ["--trainer.callbacks=EMAWeightAveraging", "--trainer.callbacks.decay=0.9"]
    found = []
    for name, flags in (("plain", []), ("average", average)):
        assert command("fit", *small, *flags, f"--experiment={name}").code == 0
        summary = json.loads(Path(f"runs/{name}/version_0/summary.json").read_text())
        found.append((summary["val/loss"], summary["val/bits_per_byte"] / summary["val/loss"]))
    (plain, ratio), (averaged, same) = found
    assert plain != averaged
    assert same == pytest.approx(ratio, rel=1e-6)


def test_a_forced_learning_rate_is_used(command: Command, small: list[str]) -> None:
    flags = ["--model.schedule.warmup_steps=0", "--model.schedule.decay=constant"]
    assert command("fit", *small, *flags, "--model.optimizer=AdamW", "--model.optimizer.lr=0.004").code == 0
    again = command("fit", "--ckpt_path=last", "--trainer.max_steps=14", "--model.optimizer.lr=0.001", "--force")
    assert again.code == 0, again.err
    state = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)
    assert {group["lr"] for group in state["optimizer_states"][0]["param_groups"]} == {0.001}
    assert set(state["lr_schedulers"][0]["base_lrs"]) == {0.001}


def test_another_optimizer_is_rejected_even_with_force(command: Command, small: list[str], trained: Trained) -> None:
    trained(*small)
    rejected = command("fit", "--ckpt_path=last", "--trainer.max_steps=14", "--model.optimizer=AdamW", "--force")
    assert rejected.code == 2
    assert "AdamW: the states of different optimizers are incompatible" in rejected.err


def test_a_default_that_changed_between_versions_is_reported(
    command: Command, small: list[str], trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of 0.1 stored no learning rate; a run of this version stores the one it used, and keeps it."""
    trained(*small)
    monkeypatch.setattr(Muon, "default_arguments", classmethod(lambda cls, _: {"lr": 0.05, "weight_decay": 0.0}))
    config, again = RUN / "config.yaml", ["fit", "--ckpt_path=last", "--trainer.max_steps=14"]
    resolved = config.read_text()
    assert "lr: 0.02\n" in resolved
    config.write_text(resolved.replace("lr: 0.02\n", "lr: null\n"))
    rejected = command(*again)
    assert rejected.code == 2
    assert "model.optimizer.lr changed from 0.02 to 0.05" in rejected.err
    config.write_text(resolved)
    resumed = command(*again)
    assert resumed.code == 0, resumed.err
    assert "lr: 0.02\n" in config.read_text()


def test_auto_starts_a_run_and_then_resumes_it(command: Command, small: list[str]) -> None:
    """One command for a job that may be restarted."""
    flags = [*small, "--ckpt_path=auto"]
    assert command("fit", *flags, "--trainer.max_steps=6").code == 0
    assert command("fit", *flags, "--trainer.max_steps=12").code == 0
    assert [path.name for path in RUN.parent.iterdir()] == ["version_0"]
    assert json.loads((RUN / "summary.json").read_text())["step"] == 12


@pytest.mark.slow
def test_the_time_limit_counts_all_sessions(command: Command, small: list[str]) -> None:
    flags = [flag for flag in small if "max_steps" not in flag]
    assert command("fit", *flags, "--trainer.max_time=00:00:00:02").code == 0
    assert (RUN / "checkpoints/last.ckpt").is_file()
    over = command("fit", "--ckpt_path=last")
    assert over.code == 2
    assert "reached its time limit after" in over.err
    assert "--trainer.max_time" in over.err
    step = json.loads((RUN / "summary.json").read_text())["step"]
    more = ["--trainer.max_time=00:00:05:00", f"--trainer.max_steps={step + 2}"]
    again = command("fit", "--ckpt_path=last", *more)
    assert again.code == 0, again.err
    assert json.loads((RUN / "summary.json").read_text())["step"] == step + 2


@pytest.mark.slow
def test_another_number_of_processes_is_rejected(command: Command, small: list[str], trained: Trained) -> None:
    """A step would have half as many samples."""
    trained(*small)
    saved = load_checkpoint(RUN / "checkpoints/last.ckpt")
    saved["callbacks"]["Provenance"]["hardware"]["processes"] = saved["layout"]["replicas"] = 2
    save_checkpoint(saved, RUN / "checkpoints/last.ckpt")
    again = "--ckpt_path=last", "--trainer.max_steps=14"
    rejected = command("fit", *again)
    assert rejected.code == 2
    assert "processes changed from 2 to 1, samples per step changed from 8 to 4" in rejected.err
    assert "keep the number of samples per step with --data.tokens_per_step 256" in rejected.err
    shutil.copytree(RUN, RUN.parent / "version_1")
    forced = command("fit", f"--ckpt_path={RUN}", again[1], "--force")
    assert forced.code == 0, forced.err
    kept = command("fit", f"--ckpt_path={RUN.parent / 'version_1'}", again[1], "--data.tokens_per_step=256")
    assert kept.code == 0, kept.err
    assert "processes changed from 2 to 1" in kept.err


@pytest.mark.parametrize("more", ["--trainer.accumulate_grad_batches=2", "--data.tokens_per_step=128"])
def test_a_step_of_the_same_size_may_be_split_differently(
    command: Command, small: list[str], trained: Trained, more: str
) -> None:
    trained(*small)
    again = command("fit", "--ckpt_path=last", "--trainer.max_steps=14", "--data.batch_size=2", more)
    assert again.code == 0, again.err
    assert "since the run started, data.batch_size changed from 4 to 2" in again.err
    saved = load_checkpoint(RUN / "checkpoints/last.ckpt")
    assert saved["layout"] == {"batch_size": 2, "replicas": 1, "accumulate": 2}
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == 14 * 2


def test_an_epoch_limited_to_micro_batches_keeps_their_size(command: Command, small: list[str]) -> None:
    """It would end at another sample."""
    assert command("fit", *small, "--trainer.limit_train_batches=7").code == 0
    more = "--data.batch_size=2", "--trainer.accumulate_grad_batches=2"
    rejected = command("fit", "--ckpt_path=last", "--trainer.max_steps=14", *more)
    assert rejected.code == 2
    assert "data.batch_size changed from 4 to 2" in rejected.err


def test_a_checkpoint_without_a_batch_layout_is_resumed_with_the_same_one(
    command: Command, small: list[str], trained: Trained
) -> None:
    trained(*small)
    saved = load_checkpoint(RUN / "checkpoints/last.ckpt")
    del saved["layout"]
    save_checkpoint(saved, RUN / "checkpoints/last.ckpt")
    again = "--ckpt_path=last", "--trainer.max_steps=14"
    rejected = command("fit", *again, "--data.batch_size=2", "--data.tokens_per_step=128")
    assert rejected.code == 2
    assert "data.batch_size changed from 4 to 2" in rejected.err
    assert command("fit", *again).code == 0


def test_fast_dev_run_of_a_resumed_run_changes_nothing(command: Command, small: list[str], trained: Trained) -> None:
    trained(*small)
    before = {path: path.stat().st_mtime_ns for path in RUN.rglob("*")}
    command("fit", "--ckpt_path=last", "--trainer.fast_dev_run=20")
    assert {path: path.stat().st_mtime_ns for path in RUN.rglob("*")} == before


def test_a_time_limit_reached_within_a_step_ends_the_run_after_it(command: Command, small: list[str]) -> None:
    flags = [flag for flag in small if "max_steps" not in flag]
    flags += ["--trainer.max_time=00:00:00:01", "--trainer.accumulate_grad_batches=7", "--trainer.limit_val_batches=0"]
    assert command("fit", *flags).code == 0
    saved = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)
    batches = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert batches["current"]["completed"] % 7 == 0 or batches["is_last_batch"]


@pytest.mark.slow
def test_a_run_that_stopped_early_is_finished(command: Command, small: list[str]) -> None:
    """The third validation does not improve on the first by 100."""
    stop = ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    stop += ["--trainer.callbacks.patience=2", "--trainer.callbacks.min_delta=100", "--trainer.max_steps=50"]
    again = [*small, *stop, "--ckpt_path=auto"]
    assert command("fit", *again).code == 0
    assert load_checkpoint(RUN / "checkpoints/last.ckpt")["global_step"] == 24
    over = command("fit", *again)
    assert over.code == 2
    assert "stopped early by a callback, at step 24" in over.err
    assert command("fit", *again, "--force").code == 0
    assert load_checkpoint(RUN / "checkpoints/last.ckpt")["global_step"] > 24


def test_a_run_below_its_minimum_of_steps_is_not_finished(
    command: Command, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Early stopping triggers at step 16 but must wait for step 30; the run is killed at step 20."""
    (tmp_path / "ends.py").write_text(
        "import lightning\n"
        "class Ends(lightning.Callback):\n"
        "    def on_train_batch_end(self, trainer, *_):\n"
        "        if trainer.global_step == 20: raise SystemExit(9)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    stop = ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    stop += ["--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=100", "--trainer.callbacks+=ends.Ends"]
    assert command("fit", *small, *stop, "--trainer.max_steps=50", "--trainer.min_steps=30").code == 9
    saved = load_checkpoint(RUN / "checkpoints/last.ckpt")
    assert saved["global_step"] >= 16
    assert not saved["callbacks"]["Checkpoints"]["stopped"]


def test_the_checkpoint_is_read_while_the_folder_is_locked(
    command: Command, small: list[str], trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(*small)
    read = ResumedRun.steps_done

    def steps_done(*args: object) -> int:
        with pytest.raises(UserError, match="is in use by another training process"), RunFolder(RUN.resolve()).lock():
            pass
        return read(*args)  # type: ignore[arg-type]  # forwarded

    monkeypatch.setattr(ResumedRun, "steps_done", steps_done)
    assert command("fit", "--ckpt_path=last", "--trainer.max_steps=14").code == 0


def test_an_interrupted_validation_is_not_repeated_if_validation_is_off(
    command: Command, small: list[str], trained: Trained
) -> None:
    trained(*small)
    last = RUN / "checkpoints/last.ckpt"
    saved = load_checkpoint(last)
    saved["callbacks"]["Checkpoints"]["validation_due"] = True
    save_checkpoint(saved, last)
    assert command("fit", "--ckpt_path=last", "--trainer.limit_val_batches=0", "--trainer.max_steps=16").code == 0
    assert not load_checkpoint(last)["callbacks"]["Checkpoints"]["validation_due"]


ENDS = {
    "steps": ["--trainer.max_steps=8"],
    "epochs": ["--trainer.max_steps=-1", "--trainer.max_epochs=2", "--trainer.limit_train_batches=4"],
    "a callback": [
        "--trainer.max_steps=80", "--trainer.val_check_interval=4", "--trainer.callbacks=EarlyStopping",
        "--trainer.callbacks.monitor=val/loss", "--trainer.callbacks.min_delta=100", "--trainer.callbacks.patience=1",
    ],
}  # fmt: skip
"""Flags that end a run after eight steps, by the kind of limit."""


@pytest.mark.parametrize(
    ("step", "end"),
    [
        ("validation_step", "steps"),
        *(pytest.param("test_step", end, marks=pytest.mark.slow) for end in ENDS),
    ],
)
@pytest.mark.slow
def test_a_run_killed_in_its_last_validation_or_test_is_tested_when_resumed(
    command: Command, staged: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch, step: str, end: str
) -> None:
    """Once, with the same step and epoch."""
    flags = [*staged("classes"), *ENDS[end]]
    assert command("fit", *flags, "--experiment=uninterrupted").code == 0

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Classification, step, die)
        assert command("fit", *flags, "--experiment=again").code != 0
    assert load_checkpoint(Path("runs/again/version_0/checkpoints/last.ckpt"))["global_step"] == 8
    ended = command("fit", "--ckpt_path=last", "--experiment=again")
    assert ended.code == 0, ended.err
    uninterrupted, again = (read_curves(Path(f"runs/{name}/version_0")) for name in ("uninterrupted", "again"))
    assert "test/accuracy" in uninterrupted
    for name in (name for name in uninterrupted if name.startswith(("val/", "test/"))):
        assert again[name] == uninterrupted[name]
    assert again["epoch"][-1] == uninterrupted["epoch"][-1]
    path = Path("runs/again/version_0")
    summaries = [
        json.loads(Path(f"runs/{name}/version_0/summary.json").read_text()) for name in ("uninterrupted", "again")
    ]
    known = [{name for name in summary if not name.startswith("train/")} for summary in summaries]
    assert known[0] == known[1]
    assert not compare_checkpoints(
        *(load_checkpoint(Path(f"runs/{name}/version_0/checkpoints/last.ckpt")) for name in ("uninterrupted", "again"))
    )
    assert command("fit", f"--ckpt_path={path}").code == 2


def test_a_validation_that_stops_the_run_within_a_step_lets_the_step_finish(command: Command, small: list[str]) -> None:
    """It runs after 10 batches, in the middle of a step of four."""
    flags = ["--trainer.accumulate_grad_batches=4", "--trainer.val_check_interval=5", "--trainer.max_steps=50"]
    stop = ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    stop += ["--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=100"]
    assert command("fit", *small, *flags, *stop).code == 0
    saved = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == 12


def test_a_copy_of_only_the_checkpoints_is_compared(
    command: Command, small: list[str], trained: Trained, tmp_path: Path
) -> None:
    """Whatever the name of the folder they are copied to."""
    trained(*small)
    shutil.copytree(RUN / "checkpoints", tmp_path / "backup/version_7/checkpoints")
    more = [f"--ckpt_path={tmp_path}/backup/version_7", "--trainer.max_steps=14", "--seed_everything=7"]
    rejected = command("fit", *small, *more)
    assert rejected.code == 2
    assert "seed changed from 0 to 7" in rejected.err


def test_a_checkpoint_that_cannot_be_loaded_is_not_overwritten(
    command: Command, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "import lightning, numpy\n"
        "class Mine(lightning.Callback):\n"
        "    def state_dict(self): return {'x': numpy.float64(1)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    done = command("fit", *small, "--trainer.callbacks=mine.Mine")
    assert done.code == 2
    assert "last.ckpt: it would contain numpy." in done.err
    assert not list(RUN.glob("checkpoints/*"))


@pytest.mark.parametrize("change", ["--seed_everything=7", "--data.validation_share=0.3"])
def test_a_single_checkpoint_file_stores_its_seed_and_its_text(
    command: Command, small: list[str], trained: Trained, tmp_path: Path, change: str
) -> None:
    trained(*small)
    alone = tmp_path / "alone.ckpt"
    shutil.copy(RUN / "checkpoints/last.ckpt", alone)
    shutil.rmtree(RUN)
    again = [*small, f"--ckpt_path={alone}", "--trainer.max_steps=18", "--checkpoint.keep_best=3"]
    rejected = command("fit", *again, change)
    assert rejected.code == 2
    assert ("seed changed from 0 to 7" if "seed" in change else "data changed from ") in rejected.err
    done = command("fit", *again)
    assert done.code == 0, done.err
    assert "is not in a run folder" in done.err
    best = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["Checkpoints"]["best"]
    assert best
    assert all((RUN / "checkpoints" / name).is_file() for name in best)


QUICK_STAGES = ("pretraining", "pretraining, several tokens")


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=[pytest.mark.slow] * (stage not in QUICK_STAGES)) for stage in STAGES]
)
def test_every_stage_resumes_exactly(command: Command, staged: Callable[[str], list[str]], stage: str) -> None:
    flags = [*staged(stage), "--model.schedule.decay=constant", "--inspect.every_n_steps=3"]
    if not stage.startswith(("preferences", "on-policy")):  # these stages have no dropout
        flags.append("--model.gpt.dropout=0.1")
    for experiment, steps in (("uninterrupted", 12), ("halves", 5)):
        assert command("fit", *flags, f"--experiment={experiment}", f"--trainer.max_steps={steps}").code == 0
    ended = command("fit", "--ckpt_path=last", "--experiment=halves", "--trainer.max_steps=12")
    assert ended.code == 0, ended.err
    uninterrupted, halves = (
        load_checkpoint(Path(f"runs/{name}/version_0/checkpoints/last.ckpt")) for name in ("uninterrupted", "halves")
    )
    different = compare_checkpoints(uninterrupted, halves)
    assert not [name for name in different if name.startswith(("state_dict", "optimizer_states", "lr_schedulers"))]
    figures = [
        json.loads(Path(f"runs/{name}/version_0/summary.json").read_text()) for name in ("uninterrupted", "halves")
    ]
    measured = [{name: value for name, value in each.items() if name.startswith(("val/", "test/"))} for each in figures]
    assert measured[0] == measured[1]
    assert any(name.startswith("test/") for name in measured[0]) == (not stage.startswith("pretraining"))

    shown = [read_curves(Path(f"runs/{name}/version_0")) for name in ("uninterrupted", "halves")]
    inside = [{n: points for n, points in each.items() if n.startswith(("dynamics/", "attention/"))} for each in shown]
    assert inside[0] == inside[1]
    assert "dynamics/gradient_norm/head" in inside[0]
    if stage.startswith("on-policy"):  # no text is generated before the first rollout
        return
    assert [step for step, _ in inside[0]["attention/sink/most"]] == [0, 2, 5, 8, 11]
    everywhere = {
        "dynamics/gradient_norm/head", "dynamics/dead_units", "dynamics/logit_norm",
        "views/attention_sink", "views/attention/layer_1", "views/logit_lens/text_summary", "weights/head",
        "activations/stream/layer_2", "run/plan/text_summary", "run/longest_tokens/text_summary",
        "custom_scalars__config__",
    }  # fmt: skip
    of_language = {"views/loss_by_position", "views/hardest_passages/text_summary", "loss_by_frequency/1-10"}
    of_logits = {"dynamics/logit_norm", "views/logit_lens/text_summary"}
    assert everywhere - of_logits <= shown[0].keys()
    assert (of_logits <= shown[0].keys()) == (stage != "rewards")
    assert (of_language <= shown[0].keys()) == stage.startswith(("pretraining", "instructions"))
    # Validations at the same step give the same metrics.
    for name in everywhere & {n for n in shown[0] if n.startswith(("views/", "weights/", "activations/"))}:
        assert dict(shown[0][name])[11] == dict(shown[1][name])[11]


@pytest.mark.slow
def test_one_of_four_automatic_runs_trains(small: list[str], tmp_path: Path) -> None:
    """A new run is started once, and a run with a checkpoint is resumed once; the others are refused in one line."""
    runs = tmp_path / "runs"
    for steps in (20, 40):
        flags = [*small, "--ckpt_path=auto", f"--trainer.max_steps={steps}", f"--runs={runs}"]
        flags += ["--trainer.limit_val_batches=0", "--inspect.every_n_steps=0"]
        folders = [tmp_path / f"{steps} {n}" for n in range(4)]
        for folder in folders:
            folder.mkdir()
        with ThreadPoolExecutor(4) as threads:
            outcomes = list(threads.map(lambda folder, flags=flags: forked.run(["fit"], folder, *flags), folders))
        assert sorted(outcome.code for outcome in outcomes) == [0, 2, 2, 2]
        assert all("Traceback" not in outcome.err for outcome in outcomes)
        assert [path.name for path in (runs / "pretrain").iterdir()] == ["version_0"]
        assert json.loads((runs / "pretrain" / "version_0" / "summary.json").read_text())["step"] == steps
