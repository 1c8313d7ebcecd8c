"""Output heads: shapes and values by hand, vocabulary padding, tied embeddings."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.output_heads import (
    POOLINGS,
    ClassificationHead,
    OutputHead,
    ScalarHead,
    TokenHead,
    padded_vocab_size,
)
from tests.conftest import randomised

VOCAB = 61
IDS = torch.arange(40).view(2, 20)


def shape(**changes: object) -> GPTConfig:
    return GPTConfig(**({"n_layer": 1, "n_head": 2, "n_embd": 16} | changes))  # type: ignore[arg-type]  # of any field


def with_head(reads: OutputHead, **changes: object) -> GPT:
    torch.manual_seed(0)
    net = GPT(shape(initialisation="normal", **changes), VOCAB, 24, reads)
    torch.nn.init.normal_(net.head.weight)
    return net


@pytest.mark.parametrize(
    ("vocab_size", "multiple", "rows"), [(61, 1, 61), (61, 64, 64), (64, 64, 64), (65, 64, 128), (50_257, 128, 50_304)]
)
def test_vocabulary_is_padded_to_the_multiple(vocab_size: int, multiple: int, rows: int) -> None:
    assert padded_vocab_size(shape(vocab_multiple=multiple), vocab_size) == rows
    assert TokenHead().out_features(shape(vocab_multiple=multiple), vocab_size) == rows


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_padding_rows_are_never_predicted_or_trained(tied: bool, softcap: float | None) -> None:
    net = randomised(shape(vocab_multiple=64, tied_embeddings=tied, logit_softcap=softcap))
    assert net.embedding.weight.shape == net.head.weight.shape == (64, 16)
    before = net(IDS)
    assert before.shape == (2, 20, VOCAB)
    with torch.no_grad():
        net.head.weight[VOCAB:] = 1e4
    after = net(IDS)
    assert torch.equal(after, before)
    F.cross_entropy(after.flatten(0, 1), IDS.flatten()).backward()
    for table in (net.head.weight, net.embedding.weight):
        assert table.grad is not None
        assert not table.grad[VOCAB:].any()
        assert table.grad[:VOCAB].any()
    # The probabilities of the vocabulary sum to one.
    torch.testing.assert_close(after.softmax(-1).sum(-1), torch.ones(2, 20))


def test_vocabulary_padding_does_not_change_logits() -> None:
    small, large = randomised(shape()), randomised(shape(vocab_multiple=64))
    weights = small.state_dict()
    for name in ("embedding.weight", "head.weight"):
        weights[name] = torch.cat((weights[name], torch.full((3, 16), 7.0)))
    large.load_state_dict(weights)
    torch.testing.assert_close(large(IDS), small(IDS))


def gradients(net: GPT, target: Tensor) -> dict[str, Tensor]:
    (net(IDS) * target).sum().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


def test_tied_embeddings_share_weight_and_gradient() -> None:
    tied, untied = randomised(shape(tied_embeddings=True)), randomised(shape())
    assert tied.head.weight is tied.embedding.weight
    assert "head.weight" not in dict(tied.named_parameters())
    state = tied.state_dict()
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()
    assert sum(p.numel() for p in tied.parameters()) == sum(p.numel() for p in untied.parameters()) - VOCAB * 16
    untied.load_state_dict(state)
    assert untied.head.weight is not untied.embedding.weight
    assert torch.equal(tied(IDS), untied(IDS))
    target = torch.randn(2, 20, VOCAB)
    both, apart = gradients(tied, target), gradients(untied, target)
    torch.testing.assert_close(both["embedding.weight"], apart["embedding.weight"] + apart["head.weight"])


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_stay_tied_after_loading(tied: bool) -> None:
    net, other = (randomised(shape(tied_embeddings=tied)) for _ in range(2))
    with torch.no_grad():
        net.embedding.weight.mul_(2)
    other.load_state_dict(net.state_dict())
    assert (other.head.weight is other.embedding.weight) == tied
    assert torch.equal(other(IDS), net(IDS))


def test_token_logits_are_products_with_the_head() -> None:
    net = with_head(TokenHead())
    hidden, logits = net.hidden_states(IDS), net(IDS)
    for token in range(VOCAB):
        torch.testing.assert_close(logits[..., token], (hidden * net.head.weight[token]).sum(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 0.1])
def test_class_logits_are_products_with_the_head(softcap: float | None) -> None:
    """The soft cap applies to token logits only."""
    net = with_head(ClassificationHead(5), logit_softcap=softcap, vocab_multiple=64)
    hidden, found = net.hidden_states(IDS), net(IDS)
    assert net.head.weight.shape == (5, 16)
    assert found.shape == (2, 20, 5)
    for number in range(5):
        torch.testing.assert_close(found[..., number], (hidden * net.head.weight[number]).sum(-1))


def test_scalar_head_gives_one_number_per_token() -> None:
    net = with_head(ScalarHead())
    found = net(IDS)
    assert net.head.weight.shape == (1, 16)
    assert found.shape == (2, 20)
    torch.testing.assert_close(found, (net.hidden_states(IDS) * net.head.weight[0]).sum(-1))
    assert with_head(ScalarHead())(IDS[:1, :1]).shape == (1, 1)  # no other dimension is squeezed


@pytest.mark.parametrize("reads", [TokenHead(), ClassificationHead(3), ScalarHead()])
@pytest.mark.parametrize(("weights", "read"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_output_has_at_least_32_bits(reads: OutputHead, weights: str, read: str) -> None:
    assert with_head(reads).to(getattr(torch, weights))(IDS).dtype == getattr(torch, read)


@pytest.mark.parametrize("reads", [ClassificationHead(VOCAB), ScalarHead()])
def test_tying_another_head_than_tokens_is_an_error(reads: OutputHead) -> None:
    with pytest.raises(UserError, match=f"tied_embeddings is true, but the output head is {type(reads).__name__}"):
        GPT(shape(tied_embeddings=True), VOCAB, 24, reads)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_windows_are_pooled_by_their_lengths(pooling: str) -> None:
    """Mean pooling over windows is the mean over all tokens of the sequence."""
    net = with_head(ClassificationHead(3)).double().eval()
    ids = torch.arange(60).view(5, 12)
    lengths, counts = torch.tensor([12, 9, 12, 3, 1]), [2, 1, 2]
    found = net.forward_pooled(ids, lengths, pooling, torch.tensor(counts))
    states = [net.hidden_states(row[None, :n])[0] for row, n in zip(ids, lengths.tolist(), strict=True)]
    for sequence, rows in enumerate(([0, 1], [2], [3, 4])):
        if pooling == "mean":
            pooled = torch.cat([states[row] for row in rows]).mean(0)
        else:
            pooled = sum(lengths[row] * states[row][-1] for row in rows) / lengths[rows].sum()
        torch.testing.assert_close(found[sequence], net.apply_head(pooled))
    single = net.forward_pooled(ids, lengths, pooling, torch.ones(5, dtype=torch.int64))
    torch.testing.assert_close(single, net.forward_pooled(ids, lengths, pooling))
