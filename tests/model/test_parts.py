"""Each part against its equation, written out or taken from torch."""

import math

import pytest
import torch

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.attention import Attention, AttentionLayout, build_attention_layout
from lit_gpt_scratch.model.bigram_embedding import BigramEmbedding, Smear
from lit_gpt_scratch.model.norms import RMSNorm
from lit_gpt_scratch.model.positions import PositionEncoding


def plain(config: GPTConfig, tokens: int) -> tuple[PositionEncoding, AttentionLayout]:
    """No positions, and all of the past to see."""
    position = PositionEncoding(config, tokens)
    return position, build_attention_layout(config, position, torch.zeros(1, tokens, dtype=torch.int64), None, None)


def test_rmsnorm_is_torchs() -> None:
    x = torch.randn(3, 5, 16)
    ours, theirs = RMSNorm(16, eps=1e-6), torch.nn.RMSNorm(16, eps=1e-6)
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


def test_rmsnorm_keeps_its_statistic_in_float32() -> None:
    x = torch.full((1, 512), 300.0, dtype=torch.float16)  # the sum of squares overflows float16
    assert RMSNorm(512)(x).tolist() == [[1.0] * 512]


@pytest.mark.parametrize("n_kv_head", [6, 3, 2, 1])
def test_attention_is_the_textbook_softmax(n_kv_head: int) -> None:
    config = GPTConfig(n_head=6, n_kv_head=n_kv_head, n_embd=24, qk_norm=False)
    attention = Attention(config)
    x = torch.randn(2, 7, 24)
    expected = torch.zeros(2, 7, 24)
    for head in range(6):
        mine, shared = slice(4 * head, 4 * head + 4), head // (6 // n_kv_head)
        theirs = slice(4 * shared, 4 * shared + 4)
        q = x @ attention.query.weight[mine].T
        k, v = x @ attention.key.weight[theirs].T, x @ attention.value.weight[theirs].T
        for t in range(7):
            weights = torch.softmax(q[:, t, None] @ k[:, : t + 1].mT / math.sqrt(4), dim=-1)
            expected[:, t] += ((weights @ v[:, : t + 1]).squeeze(1)) @ attention.output.weight[:, mine].T
    torch.testing.assert_close(attention(x, *plain(config, 7)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_embd": 190}, "n_embd (190) is not divisible by model.gpt.n_head (3)"),
        ({"n_kv_head": 2}, "n_head (3) is not divisible by model.gpt.n_kv_head (2)"),
        ({"position": "rotry"}, "model.gpt.position is rotry; it must be one of rotary, learned"),
        ({"feed_forward": "selu"}, "model.gpt.feed_forward is selu; it must be one of relu, relu2"),
        ({"n_layer": 0}, "model.gpt.n_layer is 0"),
        ({"n_head": -3}, "model.gpt.n_head is -3"),
        ({"n_kv_head": 0}, "model.gpt.n_kv_head is 0"),
        ({"head_dim": 33}, "it would rotate 33 of 33; choose another model.gpt.head_dim"),
        ({"dropout": 1.0}, "model.gpt.dropout is 1.0"),
        ({"dropout": -0.1}, "model.gpt.dropout is -0.1"),
        ({"logit_softcap": -1.0}, "model.gpt.logit_softcap is -1.0"),
    ],
)
def test_an_impossible_shape_is_refused_by_name(changes: dict[str, float], said: str) -> None:
    with pytest.raises(UserError) as error:
        GPTConfig(**changes)  # type: ignore[arg-type]
    assert said in str(error.value)


def in_windows(bigrams: BigramEmbedding, ids: torch.Tensor) -> torch.Tensor:
    return bigrams(ids, ids.roll(1, dims=1), torch.arange(ids.size(1)) == 0)


def test_bigrams_are_a_row_for_each_pair() -> None:
    bigrams = BigramEmbedding(rows=1000, width=4)
    torch.nn.init.normal_(bigrams.table.weight)
    vectors = in_windows(bigrams, torch.tensor([[5, 7, 5, 7], [9, 7, 5, 2]]))  # (2, 4, 4)
    torch.testing.assert_close(vectors[:, 0], bigrams.table.weight[[0, 0]])  # nothing before it
    torch.testing.assert_close(vectors[0, 1], vectors[0, 3])  # 5 7
    torch.testing.assert_close(vectors[0, 2], vectors[1, 2])  # 7 5
    assert not torch.allclose(vectors[0, 1], vectors[0, 2])  # order counts
    assert not torch.allclose(vectors[0, 1], vectors[1, 1])


def test_bigrams_spread_pairs_over_the_rows() -> None:
    pairs = torch.cartesian_prod(torch.arange(300), torch.arange(300))  # 90,000 pairs
    bigrams = BigramEmbedding(rows=9000, width=1)
    with torch.no_grad():
        bigrams.table.weight.copy_(torch.arange(9001.0)[:, None])
        rows = in_windows(bigrams, pairs)[:, 1, 0].long()
    load = torch.bincount(rows, minlength=9001)
    assert load[0] == 0
    assert load[1:].max() < 60  # 10 on average; were rows drawn by chance, over 40 would hardly be seen


def test_smearing_adds_a_gated_share_of_the_token_before() -> None:
    smear, x, before = Smear(4), *torch.randn(2, 2, 3, 4)
    torch.testing.assert_close(smear(x, before), x)  # where it begins
    with torch.no_grad():
        smear.share.copy_(torch.tensor([1.0, 0.0, -2.0, 0.5]))
    gate = 1 / (1 + torch.exp(-(x * smear.gate.weight[0]).sum(-1, keepdim=True)))
    torch.testing.assert_close(smear(x, before), x + gate * smear.share * before)


def test_value_embeddings_are_added_to_the_values() -> None:
    config = GPTConfig(n_head=2, n_embd=8)
    attention, order = Attention(config), plain(config, 5)
    x, added = torch.randn(1, 5, 8), torch.randn(8)
    without, shifted = attention(x, *order), attention(x, *order, added.expand(1, 5, 8))
    # Attention is an average of values: what is added to all of them is added to the average.
    torch.testing.assert_close(shifted - without, (added @ attention.output.weight.T).expand(1, 5, 8))
