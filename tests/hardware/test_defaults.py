"""Defaults on machines that are not this one."""

from pathlib import Path

import pytest
import torch

from lit_gpt_scratch.hardware.defaults import default_precision, use_allowed_cores, why_not_compile


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
def test_precision_follows_the_hardware(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, cuda_bf16: bool, mps: bool, amx: bool, accelerator: str, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: cuda_bf16)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    choice = default_precision(accelerator)
    assert choice.value == precision
    assert choice.why


@pytest.mark.parametrize(
    ("quota", "asked", "expected"),
    [("200000 100000\n", None, 2), ("50000 100000\n", None, 1), ("max 100000\n", None, 4), ("200000 100000\n", "4", 4)],
)
def test_threads_keep_to_a_containers_quota(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, asked: str | None, expected: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    file = tmp_path / "cpu.max"
    file.write_text(quota)
    torch.set_num_threads(4)  # the fixture of all tests sets it back
    use_allowed_cores(file)
    assert torch.get_num_threads() == expected


def test_threads_are_left_alone_where_there_is_no_quota(tmp_path: Path) -> None:
    use_allowed_cores(tmp_path / "missing")
    assert torch.get_num_threads() == 1


def test_the_reason_not_to_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert why_not_compile(torch.device("cpu")) == "no compiler (no-such-compiler) is installed"
    assert "mps" in (why_not_compile(torch.device("mps")) or "")
