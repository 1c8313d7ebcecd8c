"""Rows about the machine, on a CPU and on a simulated GPU."""

import itertools
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt_scratch.acceptance import hardware_rows
from lit_gpt_scratch.acceptance.hardware_rows import (
    describe_hardware,
    measure_copy_bandwidth,
    measure_fp8_flops,
    measure_peaks,
    query_nvidia_smi,
    time_calls,
)
from lit_gpt_scratch.acceptance.row import RowSkipped, Values
from tests.acceptance.simulated_gpu import SimulatedGPU, context_in


def collect(values: Any) -> Values:
    found: Values = {}
    for each in values:
        assert not found.keys() & each.keys()
        found |= each
    return found


def test_description_of_this_machine(tmp_path: Path) -> None:
    found = collect(describe_hardware(context_in(tmp_path)))
    assert torch.__version__ in str(found["versions"])
    assert {"system", "cpu", "precision", "nvidia-smi"} <= found.keys()
    assert "CUDA" not in found


def test_description_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = collect(describe_hardware(SimulatedGPU(torch.device("cpu"), tmp_path, tmp_path)))
    assert found["CUDA"] == "13.0"
    assert found["cuDNN"] == 91300
    assert found["NCCL"] == "2.28.9"
    assert found["capability"] == "9.0"


def test_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert query_nvidia_smi() == "not installed"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.1'\necho 'NVIDIA H200, 580.1'\necho $1 >&2\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert query_nvidia_smi() == "NVIDIA H200, 580.1; NVIDIA H200, 580.1"
    program.write_text("#!/bin/sh\necho 'no devices were found' >&2\nexit 6\n")
    assert query_nvidia_smi() == "no devices were found"


def test_peaks_name_the_dtypes_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def peak_flops(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
        if dtype == torch.float16:
            raise RuntimeError("not implemented for 'Half'\nmore")
        return {"nominal": 989e12, "measured": 791.2e12} if dtype == torch.bfloat16 else {"measured": 50e12}

    monkeypatch.setattr(hardware_rows, "peak_flops", peak_flops)
    found = collect(measure_peaks(context_in(tmp_path), copy_bytes=2**20, fp8_size=32, repeats=1))
    assert found["bf16 TFLOP/s"] == pytest.approx(791.2)
    assert found["bf16 of the data sheet"] == pytest.approx(0.8)
    assert found["fp16 TFLOP/s"] == "failed: not implemented for 'Half'"
    assert found["fp32 TFLOP/s"] == pytest.approx(50)
    assert "fp32 of the data sheet" not in found
    assert float(str(found["copy GB/s, read and written"])) > 0


def test_fp8_requires_its_tensor_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGPU(torch.device("cpu"), tmp_path, tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(RowSkipped, match="no fp8"):
        measure_fp8_flops(gpu, 16, 1)
    called = []

    def multiply(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
        called.append((a.dtype, b.dtype, b.stride(), options["out_dtype"], options["use_fast_accum"]))
        return a

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "_scaled_mm", multiply)
    assert measure_fp8_flops(gpu, 32, 3) > 0
    assert len(called) == hardware_rows.WARMUP_CALLS + 3
    assert called[0] == (torch.float8_e4m3fn, torch.float8_e4m3fn, (1, 32), torch.bfloat16, False)
    values = collect(measure_peaks(gpu, copy_bytes=2**20, fp8_size=32, repeats=1))
    assert {"fp8 TFLOP/s", "fp8 TFLOP/s, fast accumulation"} <= values.keys()
    assert [each[-1] for each in called].count(True) == hardware_rows.WARMUP_CALLS + 1


def test_fp8_product_is_right() -> None:
    """The layout and the scales of the call are those that give the product, as far as this CPU has the operator."""
    a, b = (torch.randn(32, 32).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones(())
    for fast in (False, True):
        found = torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast)
        torch.testing.assert_close(found.float(), a.float() @ b.t().float(), rtol=1e-2, atol=1e-1)


def test_copies_count_bytes_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware_rows, "time_calls", lambda context, call, repeats: 0.5)
    assert measure_copy_bandwidth(context_in(tmp_path), 1000, 3) == 2 * 1000 / 0.5


def test_median_of_calls_without_the_first_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    durations, now = iter([*[100.0] * hardware_rows.WARMUP_CALLS, 1.0, 9.0, 2.0]), [0.0]

    def call() -> None:
        now[0] += next(durations)

    monkeypatch.setattr(hardware_rows.time, "perf_counter", lambda: now[0])
    synchronized = itertools.count()
    gpu = SimulatedGPU(torch.device("cpu"), tmp_path, tmp_path)
    monkeypatch.setattr(SimulatedGPU, "synchronize", lambda self: next(synchronized))
    assert time_calls(gpu, call, 3) == 2.0
    assert next(synchronized) == 4
