"""Bigram embedding and smear against their equations."""

import torch

from lit_gpt_scratch.model.bigram_embedding import BigramEmbedding, Smear


def embed_bigrams(bigrams: BigramEmbedding, ids: torch.Tensor) -> torch.Tensor:
    return bigrams(ids, ids.roll(1, dims=1), torch.arange(ids.size(1)) == 0)


def test_bigram_embedding_depends_on_both_tokens() -> None:
    bigrams = BigramEmbedding(rows=1000, width=4)
    torch.nn.init.normal_(bigrams.table.weight)
    vectors = embed_bigrams(bigrams, torch.tensor([[5, 7, 5, 7], [9, 7, 5, 2]]))  # (2, 4, 4)
    torch.testing.assert_close(vectors[:, 0], bigrams.table.weight[[0, 0]])  # no predecessor
    torch.testing.assert_close(vectors[0, 1], vectors[0, 3])  # 5 7
    torch.testing.assert_close(vectors[0, 2], vectors[1, 2])  # 7 5
    assert not torch.allclose(vectors[0, 1], vectors[0, 2])  # the order matters
    assert not torch.allclose(vectors[0, 1], vectors[1, 1])


def test_bigram_hash_uses_most_rows() -> None:
    pairs = torch.cartesian_prod(torch.arange(300), torch.arange(300))  # 90,000 pairs
    bigrams = BigramEmbedding(rows=9000, width=1)
    with torch.no_grad():
        bigrams.table.weight.copy_(torch.arange(9001.0)[:, None])
        rows = embed_bigrams(bigrams, pairs)[:, 1, 0].long()
    load = torch.bincount(rows, minlength=9001)
    assert load[0] == 0
    assert load[1:].max() < 60  # 10 on average; with random rows more than 40 would be very rare


def test_smear_adds_a_gated_share_of_the_previous_token() -> None:
    smear, x, before = Smear(4), *torch.randn(2, 2, 3, 4)
    torch.testing.assert_close(smear(x, before), x)  # initially the identity
    with torch.no_grad():
        smear.share.copy_(torch.tensor([1.0, 0.0, -2.0, 0.5]))
    gate = 1 / (1 + torch.exp(-(x * smear.gate.weight[0]).sum(-1, keepdim=True)))
    torch.testing.assert_close(smear(x, before), x + gate * smear.share * before)
