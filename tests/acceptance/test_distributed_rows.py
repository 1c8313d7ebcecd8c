"""All-reduce of two processes, and what the rows conclude from runs whose results are given."""

from pathlib import Path
from typing import Any

import pytest

from lit_gpt_scratch.acceptance import distributed_rows
from lit_gpt_scratch.acceptance.distributed_rows import measure_all_reduce, measure_fsdp2, measure_layout_parity
from lit_gpt_scratch.acceptance.row import RowFailed, Values
from tests.acceptance.simulated_gpu import context_in


def test_all_reduce_of_two_processes(tmp_path: Path) -> None:
    values: Values = {}
    for found in measure_all_reduce(context_in(tmp_path), processes=2, n_bytes=2**16, repeats=2):
        values |= found
    assert values["backend"] == "gloo"
    assert values["processes"] == 2
    assert float(str(values["bus GB/s"])) > 0


def given_all_reduce(monkeypatch: pytest.MonkeyPatch, folder: Path, correct: bool) -> Values:
    result = {"backend": "nccl", "seconds": 0.25, "correct": correct}
    monkeypatch.setattr(distributed_rows, "start_processes", lambda *args, **options: None)
    monkeypatch.setattr(distributed_rows, "read_json", lambda path, kind: result)
    values: Values = {}
    for found in measure_all_reduce(context_in(folder), processes=4, n_bytes=10**9, repeats=2):
        values |= found
    return values


def test_bus_bandwidth_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a ring of four, each process sends 2 * 3 / 4 of the tensor: 1.5 GB in a quarter of a second."""
    assert given_all_reduce(monkeypatch, tmp_path, True)["bus GB/s"] == pytest.approx(6)
    with pytest.raises(RowFailed, match="wrong sum"):
        given_all_reduce(monkeypatch, tmp_path, False)


@pytest.mark.parametrize(("loss", "fails"), [(2.01, False), (2.03, True), (float("nan"), True)])
def test_sharded_loss_must_equal_the_loss_of_one_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loss: float, fails: bool
) -> None:
    commands: list[tuple[str, ...]] = []

    def fit(context: Any, *flags: str) -> Any:
        commands.append(flags)
        sharded = "--trainer.strategy=fsdp2" in flags
        return {"train/loss": loss if sharded else 2.0, "tokens_per_second": 10.0}, 1.0

    monkeypatch.setattr(distributed_rows, "run_fit", fit)
    values: Values = {}
    reason = ""
    try:
        for found in measure_fsdp2(context_in(tmp_path), ("--x=1",), devices=2):
            values |= found
    except RowFailed as failure:
        reason = str(failure)
    assert commands == [("--x=1", "--trainer.devices=1"), ("--x=1", "--trainer.strategy=fsdp2", "--trainer.devices=2")]
    assert bool(reason) == fails
    if loss == loss:
        assert values["relative difference of losses"] == pytest.approx(loss / 2 - 1)


def test_parity_reports_violations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Parity:
        def __init__(self, *given: Any) -> None:
            self.loss = {("single", "float32"): 0.0, ("ddp 2", "float32"): 1.0}
            self.violations = ["ddp 2, float32"]
            assert given == (("--x=1",), tmp_path / "parity", ("float32",), ("ddp 2",))

        def run(self) -> None:
            pass

    monkeypatch.setattr(distributed_rows, "LayoutParity", Parity)
    rows = measure_layout_parity(context_in(tmp_path), ("--x=1",), ("ddp 2",), ("float32",))
    assert next(rows) == {"single, float32": 0.0, "ddp 2, float32": 1.0}
    with pytest.raises(RowFailed, match="ddp 2, float32"):
        next(rows)
