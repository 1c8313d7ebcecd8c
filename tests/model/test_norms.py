"""RMSNorm against PyTorch's."""

import torch

from lit_gpt_scratch.model.norms import RMSNorm, ZeroCenteredRMSNorm


def test_rmsnorm_matches_torch() -> None:
    x = torch.randn(3, 5, 16)
    ours, theirs = RMSNorm(16, eps=1e-6), torch.nn.RMSNorm(16, eps=1e-6)
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


def test_zero_centered_rmsnorm_adds_one_to_the_weight() -> None:
    x = torch.randn(3, 5, 16)
    norm, plain = ZeroCenteredRMSNorm(16), RMSNorm(16)
    torch.testing.assert_close(norm(x), plain(x))  # at initialisation
    torch.nn.init.normal_(norm.weight)
    plain.load_state_dict({"weight": 1 + norm.weight})
    torch.testing.assert_close(norm(x), plain(x))


def test_gain_of_zero_centered_rmsnorm_is_not_rounded_to_16_bits() -> None:
    norm = ZeroCenteredRMSNorm(4).to(torch.bfloat16)
    torch.nn.init.constant_(norm.weight, 2**-10)  # 1 + 2 ** -10 would be 1 in bfloat16
    x = torch.full((1, 4), 3.0)
    torch.testing.assert_close(norm(x), torch.full((1, 4), 1 + 2**-10))


def test_rmsnorm_computes_the_mean_square_in_float32() -> None:
    x = torch.full((1, 512), 300.0, dtype=torch.float16)  # the sum of squares overflows float16
    assert RMSNorm(512)(x).tolist() == [[1.0] * 512]
