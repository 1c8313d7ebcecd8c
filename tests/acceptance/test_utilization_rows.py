"""The search for the micro-batch, and utilization and memory, against numbers by hand."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lit_gpt_scratch.acceptance import utilization_rows
from lit_gpt_scratch.acceptance.row import RowFailed, Values
from lit_gpt_scratch.acceptance.utilization_rows import (
    TrainedSteps,
    TrainingShape,
    is_out_of_memory,
    measure_utilization,
    profile_training,
    train_steps,
)
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.profiling.flops_and_memory import activation_bytes
from tests.acceptance.simulated_gpu import SimulatedGPU, context_in

SHAPE = TrainingShape(GPTConfig(n_layer=1, n_head=2, n_embd=32), vocab_size=97, block_size=16, compile=False, warmup=1)
H200 = {"nominal": 989e12, "measured": 790e12}


def search(
    monkeypatch: pytest.MonkeyPatch, folder: Path, speeds: dict[int, Any], first: int = 2
) -> tuple[Values, list[Any]]:
    """Run the search with a speed or an exception for each micro-batch."""
    tried: list[Any] = []

    def trained(context: Any, shape: TrainingShape, size: int, steps: int) -> TrainedSteps:
        tried.append((size, steps))
        if isinstance(speeds[size], Exception):
            raise speeds[size]
        return TrainedSteps(size, speeds[size], 1_000_000, 124_000_000, True, 10**10, 2 * 10**10)

    monkeypatch.setattr(utilization_rows, "train_steps", trained)
    monkeypatch.setattr(utilization_rows, "peak_flops", lambda device, dtype: H200)
    values: Values = {}
    for found in measure_utilization(context_in(folder), SHAPE, first, 64, 30):
        values |= found
    return values, tried


def test_doubling_ends_when_memory_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    values, tried = search(monkeypatch, tmp_path, {2: 100e6, 4: 190e6, 8: 395e6, 16: full})
    assert tried == [(2, 5), (4, 5), (8, 5), (16, 5), (8, 30)]
    assert values["out of memory at micro-batch"] == 16
    assert values["micro-batch"] == 8
    assert values["tokens/s"] == 395e6
    assert values["model TFLOP/s"] == pytest.approx(395)
    assert values["MFU of measured peak"] == pytest.approx(0.5)
    assert values["MFU of data sheet's peak"] == pytest.approx(395 / 989)
    assert values["parameters M"] == 124
    assert values["peak memory GB"] == 10
    assert values["compiled"] is True
    kept = activation_bytes(SHAPE.config, 97, 16, 8, torch.device("cpu"), torch.float32, autocast=True)
    assert values["planned memory GB, not compiled"] == pytest.approx(20 + kept / 1e9)
    assert values["measured memory of planned"] == pytest.approx(10**10 / (2 * 10**10 + kept))


def test_doubling_ends_when_it_gains_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values, tried = search(monkeypatch, tmp_path, {2: 100.0, 4: 190.0, 8: 195.0})
    assert tried == [(2, 5), (4, 5), (8, 5), (4, 30)]
    assert values["micro-batch"] == 4


def test_doubling_ends_at_the_largest_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, tried = search(monkeypatch, tmp_path, {32: 1.0, 64: 2.0}, first=32)
    assert tried == [(32, 5), (64, 5), (64, 30)]


def test_first_size_is_halved_until_it_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory")
    values, tried = search(monkeypatch, tmp_path, {32: full, 16: full, 8: 5.0}, first=32)
    assert [size for size, _ in tried] == [32, 16, 8, 8]
    assert values["micro-batch"] == 8
    with pytest.raises(RowFailed, match="not even a micro-batch of 1"):
        search(monkeypatch, tmp_path, {2: full, 1: RuntimeError("CUDA error: out of memory")})


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"):
        search(monkeypatch, tmp_path, {2: RuntimeError("CUDA error: an illegal memory access was encountered")})


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True), (MemoryError(), True), (ValueError("x"), False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
    ],
)  # fmt: skip
def test_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_trained_steps_match_a_hand_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """FLOPs by hand: 6 per weight of a linear layer, and 12 * n_layer * n_embd * T for attention."""
    found = train_steps(context_in(tmp_path), SHAPE, 3, 4)
    net = GPT(SHAPE.config, 97, 16)
    weights = sum(m.weight.numel() for m in net.modules() if isinstance(m, torch.nn.Linear))
    assert found.flops_per_token == 6 * weights + 12 * 1 * 32 * 16
    assert found.parameters == sum(p.numel() for p in net.parameters())
    assert found.batch_size == 3
    assert 0 < found.tokens_per_second < 1e9
    assert found.state_bytes == 4 * 4 * found.parameters  # weights, gradients and two moments in float32
    assert not found.compiled


class Watch(L.Callback):
    """Keeps the task and the optimizer, as a traceback does; raises an exception in a step, if one is given."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.task, self.optimizer = pl_module, trainer.optimizers[0]
        if self.error and trainer.global_step == 2:
            raise self.error


def test_memory_of_a_trial_is_free_at_its_end(tmp_path: Path) -> None:
    watch = Watch()
    found = train_steps(context_in(tmp_path), SHAPE, 3, 4, watch)
    assert all(parameter.grad is None for parameter in watch.task.parameters())
    assert not watch.optimizer.state
    assert found.parameters > 0


def test_memory_of_a_trial_is_free_after_an_exception(tmp_path: Path) -> None:
    watch = Watch(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        train_steps(context_in(tmp_path), SHAPE, 3, 4, watch)
    assert sum(parameter.nbytes for parameter in watch.task.parameters()) == 0
    assert all(parameter.grad is None for parameter in watch.task.parameters())
    assert not watch.optimizer.state


def test_clock_counts_the_steps_after_the_warm_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each step takes a second on a simulated clock, a warm-up step a hundred."""
    now, step = [0.0], [0]
    monkeypatch.setattr(utilization_rows.time, "perf_counter", lambda: now[0])

    class Slow(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            now[0] += 100 if step[0] < 2 else 1
            step[0] += 1

    shape = TrainingShape(SHAPE.config, 97, 16, compile=False, warmup=2)
    found = train_steps(context_in(tmp_path), shape, 3, 5, Slow())
    assert step[0] == 7
    assert found.tokens_per_second == pytest.approx(3 * 16)


def test_training_on_a_gpu_asks_for_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The CUDA path with its calls replaced; the trainer itself runs on the CPU."""
    called: list[Any] = []
    trainer = L.Trainer

    def on_cpu(**settings: Any) -> L.Trainer:
        called.append(settings["accelerator"])
        return trainer(**{**settings, "accelerator": "cpu"})

    monkeypatch.setattr(L, "Trainer", on_cpu)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: called.append("reset"))
    loader = utilization_rows.DataLoader
    monkeypatch.setattr(
        utilization_rows, "DataLoader", lambda *a, pin_memory, **k: called.append(pin_memory) or loader(*a, **k)
    )
    found = train_steps(SimulatedGPU(torch.device("cpu"), tmp_path, tmp_path), SHAPE, 2, 2)
    assert called[:3] == ["empty_cache", "reset", "gpu"]
    assert True in called  # pinned memory
    assert found.tokens_per_second > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sizes_are_compiled_one_after_another(tmp_path: Path) -> None:
    """The second size is compiled again with static shapes, in the same process."""
    shape = replace(SHAPE, compile=True)
    for size in (2, 3):
        found = train_steps(context_in(tmp_path), shape, size, 2)
        assert found.compiled
        assert found.tokens_per_second > 0


def test_profile_keeps_its_trace_and_shares_add_up(tmp_path: Path) -> None:
    values: Values = {}
    for found in profile_training(context_in(tmp_path), SHAPE, batch_size=2, steps=2, top=3):
        values |= found
    shares = [float(str(value)) for name, value in values.items() if name.endswith(" share")]
    assert sum(shares) == pytest.approx(1)
    assert float(str(values["matmul share"])) > 0
    with gzip.open(tmp_path / str(values["trace"]), "rt") as file:
        assert json.load(file)["traceEvents"]
