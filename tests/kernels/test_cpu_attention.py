"""The CPU attention kernel against PyTorch in float64."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_gpt_scratch.kernels import cpu_attention
from lit_gpt_scratch.model import GPTConfig, attention
from lit_gpt_scratch.model.attention import build_attention_layout, causal_attention
from lit_gpt_scratch.model.positions import PositionEncoding


def gradients(attend: object, dtype: torch.dtype, n_kv_head: int, length: int, sharpness: float = 1.0) -> list[Tensor]:
    torch.manual_seed(0)
    q, g = torch.randn(2, 6, length, 16).bfloat16(), torch.randn(2, 6, length, 16).bfloat16()
    k, v = torch.randn(2, 2, n_kv_head, length, 16).bfloat16()
    leaves = [x.to(dtype).requires_grad_() for x in ((sharpness * q).bfloat16(), k, v)]
    out = attend(*leaves)  # type: ignore[operator]
    out.backward(g.to(dtype))
    return [out.detach().double(), *(x.grad.double() for x in leaves)]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("length", "n_kv_head", "compiled"),
    [
        *((1, 6, False), (2, 6, False), (33, 6, False), (33, 2, False), (33, 1, False), (513, 2, False)),
        pytest.param(33, 2, True, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_match_float64(length: int, n_kv_head: int, compiled: bool) -> None:
    ours = gradients(
        torch.compile(causal_attention) if compiled else causal_attention, torch.bfloat16, n_kv_head, length
    )
    exact = gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        torch.float64, n_kv_head, length,
    )  # fmt: skip
    for a, b in zip(ours, exact, strict=True):
        # bfloat16 has 8 bits; for a single token, the gradients of query and key are only rounding errors.
        assert (a - b).norm() <= 0.01 * max(b.norm(), exact[0].norm())


@pytest.mark.parametrize("sharpness", [1.0, 4.0, 16.0])
def test_sharp_attention_is_as_accurate_as_torch(sharpness: float) -> None:
    """Rounding the products before subtracting the log-sum-exp would give errors of a tenth and more."""

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    ours = gradients(causal_attention, torch.bfloat16, 6, 256, sharpness)
    theirs = gradients(torchs, torch.bfloat16, 6, 256, sharpness)
    exact = gradients(torchs, torch.float64, 6, 256, sharpness)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert (a - c).norm() <= 0.012 * c.norm()
        assert (a - c).norm() <= 2.5 * (b - c).norm()


def test_operators_pass_opcheck() -> None:
    q, k, v = (torch.randn(2, 3, 8, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    bias = torch.full((2, 1, 8, 8), float("-inf"), dtype=torch.bfloat16).triu(1)
    for given in (None, bias):
        torch.library.opcheck(cpu_attention.attention_forward, (q, k, v, given))
        with torch.no_grad():
            torch.library.opcheck(
                cpu_attention.attention_backward, (q, q, k, v, given, *cpu_attention.attention_forward(q, k, v, given))
            )


@pytest.mark.parametrize(
    ("n_kv_head", "compiled"), [(6, False), (2, False), pytest.param(2, True, marks=pytest.mark.slow)]
)
def test_masked_documents_match_separate_ones(n_kv_head: int, compiled: bool) -> None:
    """Three documents in a window against each in float64; some rows see nothing in a kernel's first tiles."""
    borders = [0, 5, 200, 256]
    ids = torch.bucketize(torch.arange(256), torch.tensor(borders), right=True).expand(2, 256)
    config = GPTConfig()
    mask = build_attention_layout(config, PositionEncoding(config, 256), ids, ids, None).mask
    attend = torch.compile(causal_attention) if compiled else causal_attention
    ours = gradients(lambda q, k, v: attend(q, k, v, mask=mask), torch.bfloat16, n_kv_head, 256)

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        alone = [
            F.scaled_dot_product_attention(*(x[:, :, a:b] for x in (q, k, v)), is_causal=True, enable_gqa=True)
            for a, b in itertools.pairwise(borders)
        ]
        return torch.cat(alone, dim=2)

    exact = gradients(one_by_one, torch.float64, n_kv_head, 256)
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).norm() <= 0.01 * b.norm()


def test_other_dtypes_and_dropout_use_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "cpu_attention", lambda *_: pytest.fail("used the CPU kernel"))
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    causal_attention(q, q, q)
    causal_attention(q.bfloat16(), q.bfloat16(), q.bfloat16(), dropout=0.5)
    with torch.no_grad():
        causal_attention(q.bfloat16(), q.bfloat16(), q.bfloat16())
