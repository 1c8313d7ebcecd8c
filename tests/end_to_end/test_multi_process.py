"""Several processes on one machine train the same as one."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_gpt_scratch.checkpoint.compare_checkpoints import read_curves
from lit_gpt_scratch.checkpoint.loading import load_checkpoint
from tests.end_to_end import forked
from tests.end_to_end.conftest import STAGES

TOGETHER = ["--data.batch_size=2", "--trainer.devices=2", "--trainer.strategy=ddp"]


def fit(folder: Path, *flags: str) -> Path:
    """Folder of the single run that the flags create."""
    done = forked.fit(folder, *flags)
    assert done.code == 0, done.err
    [run] = (folder / "pretrain").iterdir()
    return run


UNEVEN = ["--data.packing=one_document", "--data.document_mask=true"]


QUICK = ("on-policy",)  # and uneven windows
ROWS = [pytest.param(stage, [], marks=[pytest.mark.slow] * (stage not in QUICK)) for stage in STAGES]


@pytest.mark.parametrize(("stage", "more"), [*ROWS, ("pretraining", UNEVEN)])
def test_two_processes_train_as_one(
    staged: Callable[[str], list[str]], tmp_path: Path, stage: str, more: list[str]
) -> None:
    """In ``uneven`` windows, and in packed replies, some ranks and micro-batches have fewer labels than others."""

    def figures(run: Path) -> dict[str, float]:
        summary: dict[str, float] = json.loads((run / "summary.json").read_text())
        # Texts are padded to the longest of their batch, so the number of positions and the time may differ.
        packed = stage.startswith(("pretraining", "instructions"))
        sides = ("train/loss", "val/", "test/", "step", *(["tokens"] if packed else []))
        return {name: value for name, value in summary.items() if name.startswith(sides) and "per_second" not in name}

    flags = [*staged(stage), "--trainer.max_steps=6"]
    width = max(int(flag.partition("=")[2]) for flag in flags if "block_size" in flag)
    step = f"--data.tokens_per_step={4 * width}"
    alone = figures(fit(tmp_path / "alone", *flags, *more, "--data.batch_size=2", step))
    together = figures(fit(tmp_path / "together", *flags, *more, *TOGETHER, step))
    assert together == pytest.approx(alone, rel=1e-5)
    there, here = (read_curves(tmp_path / name / "pretrain" / "version_0") for name in ("alone", "together"))
    for name in there:
        if re.match("dynamics|attention|loss_by", name):
            points = [{step: float(value.strip("[]")) for step, value in run[name]} for run in (there, here)]
            shared = points[0].keys() & points[1].keys()  # validations are scheduled by micro-batches
            assert max(shared) == max(points[0])
            for step in shared:
                assert points[1][step] == pytest.approx(points[0][step], rel=1e-3, abs=1e-5), name
    assert ("test/loss" in alone) == (not stage.startswith("pretraining"))


@pytest.mark.parametrize("more", [[], ["--trainer.limit_val_batches=0"]])
@pytest.mark.slow
def test_two_processes_stop_together_at_max_time(small: list[str], tmp_path: Path, more: list[str]) -> None:
    """Each has its own clock."""
    flags = [flag for flag in small if "max_steps" not in flag]
    limits = ["--trainer.max_time=00:00:00:02", "--checkpoint.every_minutes=0.005"]
    saved = load_checkpoint(fit(tmp_path, *flags, *TOGETHER, *limits, *more) / "checkpoints/last.ckpt")
    assert saved["global_step"] > 0
    assert not saved["callbacks"]["Checkpoints"]["stopped"]


WITNESS = """
import json, os, pathlib
import lightning

class Witness(lightning.Callback):
    def on_train_batch_start(self, trainer, model, batch, *_):
        windows = [str(window.tolist()) for window in batch["input_ids"]]
        with pathlib.Path(os.environ["WITNESS"], f"{trainer.world_size}-{trainer.global_rank}").open("a") as file:
            file.write(json.dumps([trainer.global_step, windows]) + "\\n")
"""


@pytest.mark.slow
def test_one_then_two_then_four_processes_see_the_windows_of_one(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 96 windows; an epoch of 401 ends at every fourth. Resuming only changes the hardware flags."""

    steps = 20

    def seen(folder: Path) -> dict[int, list[str]]:
        """Windows that all ranks saw, by step."""
        found: dict[int, list[str]] = {}
        for line in "".join(path.read_text() for path in folder.iterdir()).splitlines():
            step, windows = json.loads(line)
            found.setdefault(step, []).extend(windows)
        return {step: sorted(windows) for step, windows in found.items()}

    def losses(run: Path) -> list[float]:
        return [float(value.strip("[]")) for _, value in sorted(read_curves(run)["train/loss"])]

    (tmp_path / "witness.py").write_text(WITNESS)
    monkeypatch.syspath_prepend(tmp_path)
    flags = [
        *small, "--data.batch_size=24", "--data.tokens_per_step=3072", "--trainer.limit_val_batches=0",
        "--model.optimizer=AdamW", "--model.schedule.decay=constant", "--trainer.log_every_n_steps=1",
        "--trainer.callbacks+=witness.Witness",
    ]  # fmt: skip
    for name in ("alone", "in turn"):
        (tmp_path / name / "seen").mkdir(parents=True)
    monkeypatch.setenv("WITNESS", str(tmp_path / "alone/seen"))
    alone = fit(tmp_path / "alone/runs", *flags, f"--trainer.max_steps={3 * steps}")
    monkeypatch.setenv("WITNESS", str(tmp_path / "in turn/seen"))
    run = fit(tmp_path / "in turn/runs", *flags, f"--trainer.max_steps={steps}")
    for turn, processes in ((2, 2), (3, 4)):
        hardware = [f"--trainer.devices={processes}", "--trainer.strategy=ddp"]
        fit(run.parent.parent, "--ckpt_path=last", f"--trainer.max_steps={turn * steps}", *hardware)

    assert len(list((tmp_path / "in turn/seen").iterdir())) == 1 + 2 + 4
    assert seen(tmp_path / "in turn/seen") == seen(tmp_path / "alone/seen")
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    assert len(losses(run)) == 3 * steps
