"""Single-row matrix products against PyTorch's."""

import pytest
import torch

from lit_gpt_scratch.kernels import single_row_matmul
from lit_gpt_scratch.kernels.single_row_matmul import _addmm, _mm, single_row_backend


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_decompositions_match_torch(dtype: torch.dtype, tolerance: float) -> None:
    row, matrix, bias = (torch.randn(shape).to(dtype) for shape in ((1, 48), (48, 32), (32,)))
    for found, expected in ((_mm(row, matrix), row @ matrix), (_addmm(bias, row, matrix), bias + row @ matrix)):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_several_rows_and_large_matrices_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    row, matrix, bias = torch.randn(1, 4), torch.randn(4, 3), torch.randn(3)
    assert _mm(row.expand(2, 4), matrix) is NotImplemented
    assert _addmm(bias, row.expand(2, 4), matrix) is NotImplemented
    monkeypatch.setattr(single_row_matmul, "MAX_MATRIX_NUMEL", matrix.numel() - 1)
    assert _mm(row, matrix) is NotImplemented


@pytest.mark.slow
def test_compiled_function_matches_eager() -> None:
    layer = torch.nn.Linear(48, 32)
    compiled = torch.compile(lambda x: layer(x).relu(), backend=single_row_backend)
    with torch.no_grad():
        for x in (torch.randn(1, 48), torch.randn(3, 48)):
            torch.testing.assert_close(compiled(x), layer(x).relu(), rtol=1e-5, atol=1e-5)
