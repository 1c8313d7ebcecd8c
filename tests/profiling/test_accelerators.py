"""The table of accelerators, and the names of machines."""

import re

import pytest

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.profiling.accelerators import ACCELERATORS, Machine, parse_machine
from lit_gpt_scratch.profiling.peak_flops import TENSOR_CORE_TFLOPS


@pytest.mark.parametrize(
    ("text", "accelerator", "nodes", "per_node"),
    [
        ("8xh200", "h200", 1, 8),
        ("1xRTX4090", "rtx4090", 1, 1),
        ("2x8xh100", "h100", 2, 8),
        ("16xh100", "h100", 2, 8),
        ("3x4xa100", "a100_80gb", 3, 4),
        ("8xa100-40gb", "a100_40gb", 1, 8),
    ],
)
def test_machine_is_parsed(text: str, accelerator: str, nodes: int, per_node: int) -> None:
    assert parse_machine(text) == Machine(ACCELERATORS[accelerator], nodes, per_node)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8x", "use COUNTxNAME such as 8xh200"),
        ("h200", "use COUNTxNAME such as 8xh200"),
        ("", "use COUNTxNAME"),
        ("axbxh100", "use COUNTxNAME"),
        ("8xh900", "h900 is unknown; use one of a100_40gb, a100_80gb, h100, h200"),
        ("0xh100", "must be from 1 to 65536"),
        ("99999x8xh100", "must be from 1 to 65536"),
        ("12xh100", "a node has at most 8 H100 SXM; use a multiple of 8"),
        ("2x16xh100", "a node has at most 8 H100 SXM"),
    ],
)
def test_malformed_machine_is_rejected(text: str, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)) as error:
        parse_machine(text)
    assert str(error.value).startswith(f"--devices_like is {text}")


def test_peaks_are_in_one_table_and_figures_are_plausible() -> None:
    for accelerator in ACCELERATORS.values():
        assert accelerator.driver_name in TENSOR_CORE_TFLOPS
        assert 1e9 < accelerator.memory < accelerator.memory_bandwidth
        assert accelerator.network_bandwidth < accelerator.link_bandwidth < accelerator.memory_bandwidth
        assert 0.2 < accelerator.attention_share <= accelerator.max_matmul_share + 0.1 < 1.1
