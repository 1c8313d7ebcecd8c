"""Curves of two runs are compared without wall-clock measurements, and without diagnoses that follow from these."""

from dataclasses import replace
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from lit_gpt_scratch.callbacks.diagnostics import format_table
from lit_gpt_scratch.checkpoint.compare_checkpoints import compare_curves
from lit_gpt_scratch.diagnostics.rule_engine import Diagnosis
from lit_gpt_scratch.diagnostics.tensorboard_reader import DIAGNOSES_NAME

OVERFITTING = Diagnosis("overfitting: the validation loss rises", "repeated text", "--trainer.max_steps 10", 4)
SPIKE = Diagnosis("loss spike: 9.1 | 3 sigma", "a bad batch", "--guard act", 8)
SLOW = Diagnosis("slow loader: 45% of the step time is spent waiting", "the CPU is busy", "--data.num_workers 2", 6)


def write_run(folder: Path, *tables: list[Diagnosis]) -> Path:
    with SummaryWriter(str(folder)) as writer:
        for table in tables:
            writer.add_text(DIAGNOSES_NAME, format_table(table), table[-1].step)
    return folder


def test_diagnoses_of_timing_are_not_compared(tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain", [OVERFITTING], [OVERFITTING, SPIKE])
    slow = write_run(tmp_path / "slow", [OVERFITTING], [OVERFITTING, SLOW], [OVERFITTING, SLOW, SPIKE])
    assert compare_curves(plain, slow) == {}
    only_slow = write_run(tmp_path / "only_slow", [SLOW])
    assert compare_curves(write_run(tmp_path / "none"), only_slow) == {}


def test_other_diagnoses_are_compared(tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain", [OVERFITTING])
    spike = write_run(tmp_path / "spike", [OVERFITTING], [OVERFITTING, SPIKE])
    assert compare_curves(plain, spike) == {"curve doctor/text_summary": 1}
    other_flag = replace(OVERFITTING, flag="--trainer.max_steps 20")
    assert compare_curves(plain, write_run(tmp_path / "other", [other_flag])) == {"curve doctor/text_summary": 2}
