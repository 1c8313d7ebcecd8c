"""Comparisons of the network: exact where both sides are the same, failed where they are not."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_gpt_scratch.acceptance import network_rows
from lit_gpt_scratch.acceptance.network_rows import compare_backends, compare_network
from lit_gpt_scratch.acceptance.row import RowFailed, Values
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.profiling import device_check
from lit_gpt_scratch.profiling.device_check import StepResult, relative_difference, training_step
from tests.acceptance.simulated_gpu import context_in

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, initialisation="gpt2")
CPU = torch.device("cpu")


def compare(folder: Path, backend: str, precisions: list[str], **more: Any) -> tuple[Values, str]:
    sizes = {"compiled": [False], "batch_size": 2, "block_size": 24, **more}
    values: Values = {}
    try:
        for found in compare_network(context_in(folder), CONFIG, backend, precisions, **sizes):
            values |= found
    except RowFailed as reason:
        return values, str(reason)
    return values, ""


@pytest.mark.parametrize("documents", [False, True])
def test_manual_attention_on_the_cpu(tmp_path: Path, documents: bool) -> None:
    values, reason = compare(tmp_path, "manual", ["fp32", "bf16"], documents=documents)
    assert not reason
    assert float(str(values["fp32: logits"])) < 1e-6
    assert float(str(values["fp32: gradient"])) < 1e-5
    assert 1e-4 < float(str(values["bf16: logits"])) < 5e-2
    assert len(values) == 4


def test_one_kernel_is_used_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Any] = []

    def kernel(backend: SDPBackend) -> Any:
        used.append(backend)
        return sdpa_kernel(backend)

    monkeypatch.setattr(network_rows, "sdpa_kernel", kernel)
    _, reason = compare(tmp_path, "flash", ["fp32"])
    assert not reason
    assert used == [SDPBackend.FLASH_ATTENTION]
    values, reason = compare(tmp_path, "cudnn", ["fp32"])  # a CPU has no such kernel
    assert reason == "fp32"
    assert all(str(value).startswith("failed: ") for value in values.values())


def test_a_combination_that_is_wrong_fails_the_row_but_not_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = network_rows.training_step

    def step(device: torch.device, dtype: torch.dtype, *args: Any, **sizes: Any) -> StepResult:
        found = exact(device, torch.float32, *args, **sizes)
        if dtype == torch.bfloat16:
            return found._replace(gradient=found.gradient * 1.2)
        return found._replace(logits=found.logits * float("nan")) if dtype == torch.float16 else found

    monkeypatch.setattr(network_rows, "training_step", step)
    values, reason = compare(tmp_path, "manual", ["fp16", "bf16", "fp32"])
    assert reason == "fp16 exceeds its tolerance of 0.01; bf16 exceeds its tolerance of 0.05"
    assert float(str(values["bf16: gradient"])) == pytest.approx(0.2, rel=1e-3)
    assert float(str(values["fp32: gradient"])) < 1e-5


def test_backends_in_one_row(tmp_path: Path) -> None:
    """The backend that a CPU lacks fails the row after the others, which follow it."""
    backends = {"cudnn": ["fp32"], "flash": ["fp32"], "manual": ["fp32", "bf16"]}
    values: Values = {}
    compared = compare_backends(context_in(tmp_path), CONFIG, backends, 2, 24)
    for found in itertools.islice(compared, 4):
        values |= found
    with pytest.raises(RowFailed, match=r"^cudnn: fp32$"):
        next(compared)
    assert float(str(values["flash, fp32: gradient"])) < 1e-5
    assert float(str(values["manual, bf16: logits"])) > 1e-4
    assert str(values["cudnn, fp32"]).startswith("failed: ")


def test_gradient_of_float16_is_scaled() -> None:
    """Without the scale of the loss, most gradients of the logits are below the smallest number of float16."""
    expected = training_step(CPU, torch.float32, CONFIG, 4, 64)
    found = training_step(CPU, torch.float16, CONFIG, 4, 64)
    assert relative_difference(found.gradient, expected.gradient) < 1e-2
    assert found.loss == pytest.approx(expected.loss, rel=1e-3)
    assert found.gradient.shape == expected.gradient.shape
    assert found.logits.shape == (4, 64, device_check.VOCAB_SIZE)


def test_flex_attention_masks_documents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Forward only: FlexAttention has no backward pass on a CPU, so the row reports a failure of each combination."""
    values, reason = compare(tmp_path, "flex", ["fp32"], documents=True)
    assert reason == "fp32"
    assert str(values["fp32"]).startswith("failed: ")


def test_documents_change_the_result() -> None:
    plain, packed = (
        training_step(CPU, torch.float32, CONFIG, 2, 24, documents=documents) for documents in (False, True)
    )
    assert relative_difference(packed.logits, plain.logits) > 1e-3
