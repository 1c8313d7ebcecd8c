"""RMSNorm against PyTorch's."""

import torch

from lit_gpt_scratch.model.norms import RMSNorm


def test_rmsnorm_matches_torch() -> None:
    x = torch.randn(3, 5, 16)
    ours, theirs = RMSNorm(16, eps=1e-6), torch.nn.RMSNorm(16, eps=1e-6)
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


def test_rmsnorm_computes_the_mean_square_in_float32() -> None:
    x = torch.full((1, 512), 300.0, dtype=torch.float16)  # the sum of squares overflows float16
    assert RMSNorm(512)(x).tolist() == [[1.0] * 512]
