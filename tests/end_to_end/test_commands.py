"""The commands together: train, resume, generate, evaluate; help and configs."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from lit_gpt_scratch.__main__ import COMMANDS, main
from lit_gpt_scratch.checkpoint.loading import load_model
from lit_gpt_scratch.cli import entrypoint
from tests.end_to_end.conftest import Command, Trained

RUN = Path("runs/pretrain/version_0")


def scalars(run: Path) -> dict[str, list[int]]:
    events = EventAccumulator(str(run)).Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def test_a_run_leaves_the_documented_files_and_metrics(command: Command, small: list[str]) -> None:
    outcome = command("fit", *small)
    assert outcome.code == 0, outcome.err
    for name in ("config.yaml", "tokenizer.json", "summary.json", "checkpoints/last.ckpt"):
        assert (RUN / name).is_file()
    found = scalars(RUN)
    assert found["val/loss"] == found["val/bits_per_byte"] == found["val/perplexity"]
    assert {
        "train/loss", "train/learning_rate", "train/gradient_norm", "tokens", "tokens_per_second", "val/loss",
    } <= found.keys()  # fmt: skip
    texts = EventAccumulator(str(RUN)).Reload()
    assert len(texts.Tensors("sample/1/text_summary")) == 2
    summary = json.loads((RUN / "summary.json").read_text())
    assert summary["tokens"] == 12 * 4 * 32
    assert summary["step"] == 12
    assert summary["tokens_per_second"] > 0
    assert list(summary["baselines"]) == ["uniform", "unigram", "bigram", "xz"]
    assert found["baselines/xz"] == found["val/loss"]
    assert {"val/loss", "val/bits_per_byte", "val/perplexity", "seconds", "tokens_per_second"} <= summary.keys()
    assert f"{summary['val/bits_per_byte']:.3f}" in outcome.err
    best = [path for path in (RUN / "checkpoints").iterdir() if path.name != "last.ckpt"]
    assert len(best) == 1
    tokenizer = (RUN / "tokenizer.json").read_text()
    assert load_model(best[0])[1].to_json() == tokenizer


ALWAYS = {"config.yaml", "tokenizer.json", "tokenizer.json.sha256", "provenance.json", "summary.json", "doctor.json"}
PROJECTOR = {"projector", "projector_config.pbtxt"}
PLAN = ["device", "model", "optimizer", "data", "run", "cost", "baselines", "folder", "time"]


def test_a_plan_is_printed_and_nothing_is_left(command: Command, small: list[str]) -> None:
    outcome = command("fit", *small, "--plan")
    assert outcome.code == 0, outcome.err
    labels = [line[:11].strip() for line in outcome.err.splitlines()]
    assert [label for label in labels if label in PLAN] == PLAN
    assert "12 steps of 128 tokens" in outcome.err
    assert "ms per step" in outcome.err
    assert "for 12 steps and 2 validation runs" in outcome.err
    assert "ms per step" in command("fit", *small, "--plan", "--trainer.max_steps=3").err
    assert not Path("runs").exists()
    assert command("fit", *small).code == 0  # the same flags without --plan train
    resumed = command("fit", "--plan", "--ckpt_path=last", "--trainer.max_steps=20")
    assert resumed.code == 0, resumed.err
    assert "20 steps (12 done) of 128 tokens" in resumed.err
    assert "for 8 steps and 2 validation runs" in resumed.err
    assert "for 12 steps and 0 validation runs" in command("fit", *small, "--plan", "--trainer.limit_val_batches=0").err
    assert not list(Path("runs/pretrain").glob("version_1"))


def test_log_lines_are_printed_above_the_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    def say() -> None:
        with tqdm(total=3, file=sys.stderr) as bar:
            bar.update()
            logging.getLogger("lit_gpt_scratch").info("a line")

    entrypoint.run(say)
    assert "\ra line\n" in capsys.readouterr().err


def test_each_run_has_its_own_folder(command: Command, small: list[str]) -> None:
    for _ in range(2):
        assert command("fit", *small, "--trainer.max_steps=2").code == 0
    assert command("fit", *small, "--trainer.max_steps=2", "--experiment=other", "--runs=elsewhere").code == 0
    assert sorted(path.name for path in Path("runs/pretrain").iterdir()) == ["version_0", "version_1"]
    assert Path("elsewhere/other/version_0/summary.json").is_file()


@pytest.mark.parametrize("how", ["last", *(pytest.param(how, marks=pytest.mark.slow) for how in ("folder", "file"))])
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    command: Command, small: list[str], trained: Trained, how: str
) -> None:
    """In the same folder and on the same curve; only changed flags need to be given."""
    trained(*small, "--trainer.max_steps=20", "--model.schedule.decay=constant", "--runs=uninterrupted")
    trained(*small, "--trainer.max_steps=12", "--model.schedule.decay=constant")
    given = {"last": "last", "folder": RUN, "file": RUN / "checkpoints" / "last.ckpt"}[how]
    again = command("fit", "--ckpt_path", given, "--trainer.max_steps=20")
    assert again.code == 0, again.err
    assert [path.name for path in Path("runs/pretrain").iterdir()] == ["version_0"]
    assert scalars(RUN)["train/loss"] == [3, 7, 11, 15, 19]
    assert yaml.safe_load((RUN / "config.yaml").read_text())["ckpt_path"] is None  # so that the config starts a new run
    uninterrupted, resumed = (
        weights(Path("uninterrupted/pretrain/version_0/checkpoints/last.ckpt")),
        weights(RUN / "checkpoints/last.ckpt"),
    )
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)
    assert json.loads((RUN / "summary.json").read_text())["tokens"] == 20 * 4 * 32


def test_a_resumed_run_rejects_another_folder(command: Command, small: list[str], trained: Trained) -> None:
    """``--experiment`` and ``--runs`` find a run for ``last``, and must not contradict a path."""
    trained(*small)
    for flag, value in (("experiment", "other"), ("runs", "elsewhere")):
        for checkpoint in (RUN, RUN / "checkpoints/last.ckpt"):
            rejected = command("fit", "--ckpt_path", checkpoint, f"--{flag}={value}", "--trainer.max_steps=14")
            assert rejected.code == 2
            assert f"--{flag} is {value}, but --ckpt_path continues the run in" in rejected.err
    assert sorted(path.name for path in Path().iterdir()) == ["runs"]
    same = ["--experiment=pretrain", f"--runs={Path('runs').resolve()}", "--trainer.max_steps=14"]
    resumed = command("fit", "--ckpt_path", RUN, *same)
    assert resumed.code == 0, resumed.err


def test_a_folder_with_a_checkpoint_is_never_removed(
    command: Command, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the trainer of this process has counted no step, because other processes trained."""
    fit = L.Trainer.fit

    def fit_elsewhere(trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        fit(trainer, *args, **kwargs)
        trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.reset()
        assert trainer.global_step == 0

    monkeypatch.setattr(L.Trainer, "fit", fit_elsewhere)
    assert command("fit", *small).code == 2
    assert (RUN / "checkpoints/last.ckpt").is_file()


PRINTED = {
    "--trainer.profiler=simple": "run_training_batch",
    "--trainer.profiler=advanced": "ncalls",
    "--trainer.profiler=pytorch": "Self CPU",
    "--trainer.enable_model_summary=true": "Trainable params",
    "--trainer.callbacks=ModelSummary": "Trainable params",
    "--trainer.barebones=true": "You are running in `Trainer(barebones=True)` mode",
    "--trainer.detect_anomaly=true": "will significantly slow down",
    "--trainer.fast_dev_run=true": "fast_dev_run",
}


@pytest.mark.parametrize("flag", [flag if "simple" in flag else pytest.param(flag, marks=pytest.mark.slow)
                                  for flag in PRINTED])  # fmt: skip
def test_requested_output_is_printed(command: Command, small: list[str], flag: str) -> None:
    outcome = command("fit", *small, "--trainer.max_steps=2", flag)
    assert outcome.code == 0, outcome.err
    assert PRINTED[flag] in outcome.err
    assert "GPU available" not in outcome.err
    assert "Tip" not in outcome.err


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_folder(command: Command, small: list[str], trained: Trained) -> None:
    trained(*small)
    before = sorted(path.stat().st_mtime_ns for path in RUN.rglob("*") if path.name != ".lock")
    with FileLock(RUN / ".lock"):
        rejected = command("fit", "--ckpt_path=last", "--trainer.max_steps=20")
        assert rejected.code == 2
        assert f"{RUN} is in use" in rejected.err
        assert sorted(path.stat().st_mtime_ns for path in RUN.rglob("*") if path.name != ".lock") == before
        assert command("fit", "--ckpt_path=last", "--trainer.max_steps=20", "--plan").code == 0
    assert command("fit", "--ckpt_path=last", "--trainer.max_steps=20").code == 0


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_used(command: Command, small: list[str]) -> None:
    assert command("fit", *small, "--checkpoint.keep_best=3").code == 0
    last = RUN / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    rejected = command("fit", "--ckpt_path", last, "--trainer.max_steps=20")
    assert rejected.code == 2
    assert f"{last} is not a checkpoint, or is corrupted" in rejected.err
    resumed = command("fit", "--ckpt_path=last", "--trainer.max_steps=20")
    assert resumed.code == 0, resumed.err
    assert f"{last} is not a checkpoint, or is corrupted" in resumed.err
    assert json.loads((RUN / "summary.json").read_text())["step"] == 20


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("stop", "limit"),
    [
        *((stop, "1.0") for stop in ("max_steps=8", "max_epochs=1")),
        pytest.param("max_steps=8", "0", marks=pytest.mark.slow),
        *(pytest.param(stop, "1.0", marks=pytest.mark.slow) for stop in ("max_steps=7", "max_steps=9")),
        *(pytest.param(stop, "0", marks=pytest.mark.slow) for stop in ("max_steps=7", "max_steps=9", "max_epochs=1")),
    ],
)
def test_resuming_near_the_end_of_an_epoch(
    command: Command, small: list[str], trained: Trained, stop: str, limit: str, num_workers: int
) -> None:
    """Epochs of 8 batches; a run stopped just before, at or after the end of one trains on the same batches.

    Without validation, the positions within an epoch are slow: validation is only the reason for a save there.
    """
    flags = [*small, "--trainer.max_steps=-1", "--trainer.max_epochs=3", "--trainer.limit_train_batches=8",
             f"--data.num_workers={num_workers}", "--model.schedule.decay=constant", "--trainer.val_check_interval=5",
             f"--trainer.limit_val_batches={limit}"]  # fmt: skip
    trained(*flags, "--runs=uninterrupted")
    assert command("fit", *flags, f"--trainer.{stop}").code == 0
    again = command("fit", "--ckpt_path=last", "--trainer.max_steps=-1", "--trainer.max_epochs=3")
    assert again.code == 0, again.err
    uninterrupted, resumed = (
        weights(Path(runs, "pretrain/version_0/checkpoints/last.ckpt")) for runs in ("uninterrupted", "runs")
    )
    assert json.loads((RUN / "summary.json").read_text())["step"] == 24
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def test_resuming_a_finished_run_explains_how_to_extend_it(
    command: Command, small: list[str], trained: Trained
) -> None:
    trained(*small)
    outcome = command("fit", "--ckpt_path=last")
    assert outcome.code == 2
    assert "has completed all 12 steps" in outcome.err
    assert "--trainer.max_steps 24" in outcome.err


@pytest.mark.slow
def test_resuming_a_run_with_finished_epochs_keeps_its_summary(command: Command, small: list[str]) -> None:
    flags = [*small, "--trainer.max_steps=-1", "--trainer.max_epochs=1", "--trainer.limit_train_batches=4"]
    ended = command("fit", *flags)
    assert ended.code == 0
    assert "--trainer.max_epochs 2\n" in ended.err  # the suggested next command
    before = (RUN / "summary.json").read_text()
    outcome = command("fit", "--ckpt_path=last")
    assert outcome.code == 2
    assert "has completed all 1 epochs" in outcome.err
    assert (RUN / "summary.json").read_text() == before
    assert command("fit", "--ckpt_path=last", "--trainer.max_epochs=2").code == 0
    after = json.loads((RUN / "summary.json").read_text())
    assert after["step"] == 8
    assert after["seconds"] > json.loads(before)["seconds"]


def test_a_diverged_run_has_no_best_checkpoint(command: Command, small: list[str]) -> None:
    outcome = command("fit", *small, "--model.optimizer.adamw_lr=1e30", "--trainer.gradient_clip_val=null")
    assert outcome.code == 0, outcome.err
    summary = json.loads((RUN / "summary.json").read_text())
    assert summary["val/loss"] is summary["val/bits_per_byte"] is None
    assert [path.name for path in (RUN / "checkpoints").iterdir()] == ["last.ckpt"]
    outcome = command("generate")
    assert outcome.code == 2
    assert "diverged" in outcome.err


def test_the_last_step_is_always_saved(command: Command, small: list[str]) -> None:
    flags = ["--trainer.limit_val_batches=0", "--checkpoint.every_n_steps=5", "--data.tokens_per_step=256"]
    assert command("fit", *small, *flags).code == 0
    assert torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 12
    assert command("generate", "--max_new_tokens=1").code == 0


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_without_a_command_all_commands_are_listed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lit-gpt", *args])
    main()
    out = capsys.readouterr().out
    assert "lit-gpt <command>" in out
    assert all(f"\n  {name} " in out for name in COMMANDS)


def test_a_command_is_dispatched_by_its_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lit-gpt", "generate", "--samples", "0"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err == "error: argument --samples is 0; it must be 1 or more\n"
    monkeypatch.setattr(sys, "argv", ["lit-gpt", "train"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "unknown command train; choose from fit" in capsys.readouterr().err


def test_help_lists_common_flags_and_how_to_list_all(command: Command) -> None:
    outcome = command("fit", "--help")
    assert outcome.code == 0
    for word in ("--trainer.devices", "--model.gpt.n_layer", "--data.source", "--ckpt_path", "--help all"):
        assert word in outcome.out
    for name in ("model", "data"):
        shown = command("fit", f"--{name}.help")
        assert shown.code == 0
    for name in ("generate", "evaluate"):
        assert command(name, "--help").code == 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--model.gpt.n_layer=3"], "n_layer is 2 in the checkpoint, but 3 in this run"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (["--data.block_size=16"], "block_size is 32 in the checkpoint, but 16 in this run"),
                (["--data.vocab_size=290"], "vocab_size is 300 in the checkpoint, but 290 in this run"),
            )
        ),
    ],
)
def test_resuming_another_architecture_is_rejected_by_field(
    command: Command, small: list[str], trained: Trained, change: list[str], expected: str
) -> None:
    trained(*small)
    outcome = command("fit", "--ckpt_path=last", "--trainer.max_steps=20", *change)
    assert outcome.code == 2
    assert expected in outcome.err
    again = command("fit", "--ckpt_path=last", "--trainer.max_steps=20")  # the failed call changed nothing
    assert again.code == 0, again.err


def test_resuming_on_another_text_is_rejected(
    command: Command, small: list[str], trained: Trained, tmp_path: Path
) -> None:
    trained(*small)
    (tmp_path / "other.txt").write_text("".join(f"{n} and {n * n} are other words. " for n in range(400)))
    outcome = command("fit", "--ckpt_path=last", "--trainer.max_steps=20", f"--data.source={tmp_path / 'other.txt'}")
    assert outcome.code == 2
    assert "data.source changed from" in outcome.err


def test_configs_compose_and_flags_override_them(command: Command, small: list[str]) -> None:
    Path("shape.yaml").write_text("model:\n  init_args:\n    gpt:\n      n_layer: 1\n      n_kv_head: 1\n")
    Path("short.yaml").write_text("trainer:\n  max_steps: 3\ndata:\n  init_args:\n    batch_size: 2\n")
    outcome = command("fit", *small, "--config=shape.yaml", "--config=short.yaml", "--data.batch_size=3")
    assert outcome.code == 0, outcome.err
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    assert (
        config["model"]["init_args"]["gpt"] | {"n_layer": 1, "n_kv_head": 1, "n_embd": 32}
        == (config["model"]["init_args"]["gpt"])
    )
    assert config["trainer"]["max_steps"] == 3
    assert config["data"]["init_args"]["batch_size"] == 3
    assert command("fit", f"--config={RUN / 'config.yaml'}").code == 0
    again = Path("runs/pretrain/version_1")
    assert (again / "config.yaml").read_text() == (RUN / "config.yaml").read_text()
    first, second = (weights(run / "checkpoints/last.ckpt") for run in (RUN, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    summary = json.loads((again / "summary.json").read_text())
    assert summary["val/loss"] == json.loads((RUN / "summary.json").read_text())["val/loss"]


def test_print_config_prints_a_usable_config(command: Command, small: list[str]) -> None:
    outcome = command("fit", *small, "--model.optimizer=AdamW", "--model.optimizer.lr=0.001", "--print_config")
    assert outcome.code == 0
    config = yaml.safe_load(outcome.out)
    assert config["model"]["init_args"]["optimizer"]["class_path"].endswith("AdamW")
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.001
    assert config["model"]["init_args"]["optimizer"]["init_args"]["weight_decay"] == 0.1
    Path("printed.yaml").write_text(outcome.out)
    assert command("fit", "--config=printed.yaml").code == 0


def test_swapping_the_optimizer_swaps_the_default_learning_rate(command: Command, small: list[str]) -> None:
    outcome = command("fit", *small, "--model.optimizer=AdamW", "--trainer.max_steps=1")
    assert outcome.code == 0, outcome.err
    state = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)
    assert state["lr_schedulers"][0]["base_lrs"] == [3e-3, 3e-3]


@pytest.mark.parametrize("length", [["--trainer.max_epochs=1"], ["--trainer.max_time=00:00:00:01"]])
def test_epoch_and_time_limits_replace_the_default_number_of_steps(
    command: Command, small: list[str], length: list[str]
) -> None:
    flags = [flag for flag in small if "max_steps" not in flag]
    outcome = command("fit", *flags, *length, "--trainer.limit_train_batches=5")
    assert outcome.code == 0, outcome.err
    assert yaml.safe_load((RUN / "config.yaml").read_text())["trainer"]["max_steps"] == -1
    if "epochs" in length[0]:
        assert json.loads((RUN / "summary.json").read_text())["step"] == 5


@pytest.mark.parametrize(
    ("flags", "left"),
    [
        (["--trainer.fast_dev_run=true"], set()),
        (["--trainer.logger=false"], {*ALWAYS, "checkpoints"}),
        (["--trainer.enable_checkpointing=false"], {*ALWAYS, *PROJECTOR}),
        (["--trainer.enable_progress_bar=false"], {*ALWAYS, *PROJECTOR, "checkpoints"}),
        (
            ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=csv"],
            {*ALWAYS, "checkpoints"},
        ),
    ],
)
def test_trainer_flags_keep_their_meaning(command: Command, small: list[str], flags: list[str], left: set[str]) -> None:
    outcome = command("fit", *small, *flags)
    assert outcome.code == 0, outcome.err
    found = {path.name for path in RUN.glob("*") if "tfevents" not in path.name}
    assert found - {"hparams.yaml", ".lock"} == left
    assert {path.name for path in Path().iterdir()} <= {"runs", "csv"}
    if "fast_dev_run" in flags[0]:
        assert not Path("runs").exists()


def test_generate_is_deterministic_for_a_seed(command: Command, small: list[str], trained: Trained) -> None:
    trained(*small)
    flags = ["--prompt", "the cat", "--max_new_tokens", "20"]
    first, second, other = (command("generate", *flags, "--seed", seed) for seed in ("1", "1", "2"))
    assert first.code == 0
    assert first.err == ""
    assert first.out.startswith("the cat")
    assert first.out == second.out != other.out
    assert command("generate", RUN, *flags, "--seed", "1").out == first.out
    assert command("generate", *flags, "--max_new_tokens", "0").out == "the cat\n"
    assert command("generate", *flags, "--temperature", "0", "--seed", "3").out == (
        command("generate", *flags, "--temperature", "0", "--seed", "4").out
    )


def test_generate_rejects_a_prompt_longer_than_the_context(
    command: Command, small: list[str], trained: Trained
) -> None:
    trained(*small)
    outcome = command("generate", "--prompt", "word " * 200)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "the context length is 32" in outcome.err


def test_evaluate_prints_one_json_object(command: Command, small: list[str], trained: Trained, corpus: Path) -> None:
    trained(*small)
    outcome = command("evaluate", RUN, "--data.source", corpus / "00.txt", "--json")
    assert outcome.code == 0, outcome.err
    figures = json.loads(outcome.out)
    assert figures.keys() == {"bits_per_byte", "perplexity", "loss", "tokens", "bytes"}
    assert figures["bytes"] == (corpus / "00.txt").stat().st_size
    plain = command("evaluate", RUN, "--data.source", corpus / "00.txt")
    assert f"{figures['bits_per_byte']:.4f}" in plain.out


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_default_run_beats_xz(command: Command) -> None:
    """The complete run without flags, on all cores: minutes."""
    outcome = command("fit")
    assert outcome.code == 0, outcome.err
    summary = json.loads((RUN / "summary.json").read_text())
    assert summary["val/bits_per_byte"] <= 0.84 * summary["baselines"]["xz"]
