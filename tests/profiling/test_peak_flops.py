"""Peak FLOP/s and peak memory."""

import os
import re
from pathlib import Path

import pytest
import torch

from lit_gpt_scratch.profiling import peak_flops
from lit_gpt_scratch.profiling.peak_memory import peak_memory


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A10G", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("Tesla V100-SXM2-16GB", None),  # no bfloat16
        ("", None),
    ],
)
def test_nominal_flops_by_gpu_name(name: str, tera: int | None) -> None:
    assert peak_flops.lookup_nominal_flops(name, torch.bfloat16) == (tera and tera * 1e12)


def test_nominal_flops_by_dtype() -> None:
    assert peak_flops.lookup_nominal_flops("Tesla V100-SXM2-16GB", torch.float16) == 125e12
    assert peak_flops.lookup_nominal_flops("Tesla T4", torch.float16) == 65e12
    assert peak_flops.lookup_nominal_flops("NVIDIA H100 80GB HBM3", torch.float32) is None


@pytest.mark.parametrize("tera", [0.001, 0.1, 800])
def test_measured_flops_of_a_simulated_device(monkeypatch: pytest.MonkeyPatch, tera: float) -> None:
    sizes = []

    def seconds(factor: torch.Tensor) -> float:
        sizes.append(len(factor))
        return 1e-5 + 2 * len(factor) ** 3 / (tera * 1e12)  # ten microseconds of overhead

    monkeypatch.setattr(peak_flops, "_time_matmul", seconds)
    monkeypatch.setattr(peak_flops, "MAX_MATRIX_SIZE", 2048)
    found = peak_flops.measure_flops.__wrapped__(torch.device("cpu"), torch.float32, "highest")
    assert found <= tera * 1e12
    if max(sizes) < peak_flops.MAX_MATRIX_SIZE:
        assert found == pytest.approx(tera * 1e12, rel=0.01)
        assert sum(2 * n**3 for n in sizes) / (tera * 1e12) < 0.3  # seconds, except on the slowest device


def test_measuring_leaves_the_random_state_unchanged() -> None:
    before = torch.get_rng_state()
    found = peak_flops.peak_flops(torch.device("cpu"), torch.float32)
    assert torch.equal(before, torch.get_rng_state())
    assert set(found) == {"measured"}
    assert 1e8 < found["measured"] < 1e15
    assert peak_flops.peak_flops(torch.device("cpu"), torch.float32) == found  # measured once per process


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the truth is Linux's own count")
def test_peak_memory_in_bytes() -> None:
    found = peak_memory(torch.device("cpu"))
    count = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    assert count is not None
    assert 0.99 * 1024 * int(count[1]) <= found < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert peak_memory(torch.device("meta")) is None
