"""Hardware-dependent defaults on simulated machines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_gpt_scratch.distributed.hardware_defaults import (
    ONEDNN_CACHE_CAPACITY,
    default_precision,
    explain_no_compile,
    limit_threads,
)


@pytest.mark.parametrize(
    ("cuda", "cuda_bf16", "mps", "amx", "accelerator", "precision"),
    [
        (True, True, False, False, "auto", "bf16-mixed"),
        (True, False, False, False, "gpu", "16-mixed"),
        (True, True, False, False, "cpu", "32-true"),
        (True, True, False, True, "cpu", "bf16-mixed"),
        (False, False, True, False, "auto", "32-true"),
        (False, False, False, True, "auto", "bf16-mixed"),
        (False, False, False, False, "auto", "32-true"),
    ],
)
def test_default_precision_by_hardware(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, cuda_bf16: bool, mps: bool, amx: bool, accelerator: str, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: cuda_bf16)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    choice = default_precision(accelerator)
    assert choice.value == precision
    assert choice.reason


@pytest.mark.parametrize(
    ("quota", "asked", "expected"),
    [("200000 100000\n", None, 2), ("50000 100000\n", None, 1), ("max 100000\n", None, 4), ("200000 100000\n", "4", 4)],
)
def test_threads_are_limited_to_a_container_quota(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, asked: str | None, expected: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    file = tmp_path / "cpu.max"
    file.write_text(quota)
    torch.set_num_threads(4)  # restored by the fixture of all tests
    limit_threads(quota=file)
    assert torch.get_num_threads() == expected


def test_processes_share_a_container_quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that it is restored afterwards
    monkeypatch.delenv("OMP_NUM_THREADS")
    file = tmp_path / "cpu.max"
    file.write_text("400000 100000\n")
    torch.set_num_threads(4)
    limit_threads(processes=2, quota=file)
    assert torch.get_num_threads() == 2
    assert os.environ["OMP_NUM_THREADS"] == "2"  # read by Lightning and child processes


def test_threads_are_unchanged_without_a_quota(tmp_path: Path) -> None:
    limit_threads(quota=tmp_path / "missing")
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("named", ["no-such-compiler", "ccache g++"])
def test_reason_not_to_compile(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv("CXX", named)
    assert f"no compiler ({named}) is installed" in (explain_no_compile(torch.device("cpu")) or "")
    assert "mps" in (explain_no_compile(torch.device("mps")) or "")
    assert explain_no_compile(torch.device("mps"), requested=True) is None  # a poor default, but not impossible


@pytest.mark.skipif(sys.platform != "linux", reason="Inductor's compiler there is another one")
def test_only_compilers_that_inductor_finds_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "clang++").touch(0o755)
    assert "no compiler (g++) is installed" in (explain_no_compile(torch.device("cpu")) or "")
    (tmp_path / "g++").touch(0o755)
    assert "compiler" not in (explain_no_compile(torch.device("cpu")) or "")


MULTIPLY = """
import torch
from lit_gpt_scratch.distributed.hardware_defaults import ONEDNN_CACHE_CAPACITY, configure_process
{prepare}
for _ in range(2):
    for rows in range(1, ONEDNN_CACHE_CAPACITY + 11):
        torch.ops.mkldnn._linear_pointwise(torch.ones(rows, 8), torch.ones(8, 8), None, "none", [], "")
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
@pytest.mark.parametrize(("prepare", "times"), [("", 1), ("configure_process()", 2)])
@pytest.mark.slow
def test_onednn_cache_capacity(prepare: str, times: int) -> None:
    """oneDNN reads the variables at its first matmul, after torch is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    done = subprocess.run(
        [sys.executable, "-c", MULTIPLY.format(prepare=prepare)],
        env=environment | {"ONEDNN_VERBOSE": "profile_create"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.count("create:cache_miss") == times * (ONEDNN_CACHE_CAPACITY + 10)
