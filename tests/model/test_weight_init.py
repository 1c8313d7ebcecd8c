"""Weight initialisation: distributions and the initial loss."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.module_metadata import parameter_roles
from lit_gpt_scratch.model.norms import NORM_PLACEMENTS, NORMS
from lit_gpt_scratch.model.weight_init import INITIALISATIONS

WIDTH, HIDDEN, LAYERS, VOCAB = 128, 512, 3, 1000
SWITCHES = {"value_embeddings": True, "bigram_rows": 50, "smear": True, "residual_scalars": True}


def network(**changes: Any) -> GPT:
    torch.manual_seed(0)
    shape = {"n_layer": LAYERS, "n_head": 4, "n_embd": WIDTH, "ffn_dim": HIDDEN, "bias": True, "position": "learned"}
    return GPT(GPTConfig(**(shape | changes)), VOCAB, 64)


def spread(weights: list[Tensor]) -> float:
    together = torch.cat([weight.flatten() for weight in weights])
    assert abs(together.mean()) <= 0.05 * together.std()
    return together.std().item()


def matrices(net: GPT) -> dict[str, list[Tensor]]:
    """Matrices of the blocks by role: inputs from the residual stream, and outputs of attention and feed-forward."""
    blocks = [(block.attention, block.feed_forward) for block in net.blocks]
    return {
        "inputs": [
            linear.weight for a, f in blocks for linear in (a.query, a.key, a.value, f.input, f.gate)
        ],
        "attention outputs": [a.output.weight for a, _ in blocks],
        "feed-forward outputs": [f.output.weight for _, f in blocks],
    }  # fmt: skip


def test_sinks_start_at_zero_and_belong_to_the_vectors() -> None:
    net = network(attention_sinks=True)
    groups = parameter_roles(net)
    for block in net.blocks:
        sinks = block.attention.sinks.logits
        assert sinks.tolist() == [0.0] * 4
        assert groups[sinks] == "vectors"


EXPECTED_STD: dict[str, dict[str, float]] = {
    "zero": {
        "embedding": 1.0, "tied": 0.02, "inputs": WIDTH**-0.5, "attention outputs": 0.0, "feed-forward outputs": 0.0,
        "head": 0.0,
    },
    "normal": {
        "embedding": 0.02, "tied": 0.02, "inputs": 0.02, "attention outputs": 0.02, "feed-forward outputs": 0.02,
        "head": 0.02,
    },
    "gpt2": {
        "embedding": 0.02, "tied": 0.02, "inputs": 0.02, "attention outputs": 0.02 / math.sqrt(2 * LAYERS),
        "feed-forward outputs": 0.02 / math.sqrt(2 * LAYERS), "head": 0.02,
    },
    "xavier": {
        "embedding": 1.0, "tied": WIDTH**-0.5, "attention outputs": math.sqrt(2 / (2 * WIDTH)),
        "feed-forward outputs": math.sqrt(2 / (WIDTH + HIDDEN)), "head": math.sqrt(2 / (WIDTH + VOCAB)),
    },
}  # fmt: skip


def test_every_initialisation_is_tested() -> None:
    assert EXPECTED_STD.keys() == INITIALISATIONS.keys()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", EXPECTED_STD)
def test_standard_deviations_of_initial_weights(scheme: str, tied: bool) -> None:
    net, named = network(initialisation=scheme, tied_embeddings=tied), EXPECTED_STD[scheme]
    found = {part: spread(weights) for part, weights in matrices(net).items() if part in named}
    found["embedding"] = spread([net.embedding.weight])
    expected = {part: std for part, std in named.items() if part in found}
    if tied:
        expected["embedding"] = named["tied"]
    else:
        found["head"], expected["head"] = spread([net.head.weight]), named["head"]
    assert found == pytest.approx(expected, rel=0.02)


def test_xavier_matrices_are_uniform_within_the_bound() -> None:
    for linear in network(initialisation="xavier").modules():
        if isinstance(linear, nn.Linear):
            bound = math.sqrt(6 / (linear.in_features + linear.out_features))
            assert 0.99 * bound < linear.weight.abs().max() <= bound
            assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scheme", INITIALISATIONS)
def test_biases_start_at_zero_and_gains_at_one(scheme: str, norm: str) -> None:
    net = network(initialisation=scheme, norm=norm)
    vectors = {name: parameter for name, parameter in net.named_parameters() if parameter.ndim == 1}
    assert len(vectors) > 20
    one = 0.0 if norm == "zero_centered_rmsnorm" else 1.0
    for name, vector in vectors.items():
        assert vector.unique().tolist() == [0.0 if name.endswith("bias") else one], name


@pytest.mark.parametrize("scheme", INITIALISATIONS)
def test_learned_positions_are_initialised_as_in_gpt2(scheme: str) -> None:
    assert spread([network(initialisation=scheme).position.table.weight]) == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize("scheme", INITIALISATIONS)
def test_optional_additions_start_at_zero(scheme: str) -> None:
    """Two networks with the same weights, one of them with the optional additions."""
    plain, more = network(initialisation=scheme), network(initialisation=scheme, **SWITCHES)
    found = more.load_state_dict(plain.state_dict(), strict=False)
    assert {name.split(".")[0] for name in found.missing_keys} == {"blocks", "value_tables", "bigrams", "smear"}
    ids = torch.randint(VOCAB, (2, 20))
    assert torch.equal(more(ids), plain(ids))
    assert torch.equal(more.hidden_states(ids), plain.hidden_states(ids))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("placement", NORM_PLACEMENTS)
def test_zero_starts_with_identity_blocks_and_a_loss_of_ln_vocab(placement: str, norm: str) -> None:
    net = network(norm_placement=placement, norm=norm, **SWITCHES)
    stream: list[Tensor] = []
    for block in net.blocks:
        block.register_forward_hook(lambda _, given, out: stream.extend((given[0], out[0])))
    ids = torch.randint(VOCAB, (2, 20))
    logits = net(ids)
    assert not logits.any()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    assert loss.item() == pytest.approx(math.log(VOCAB), rel=1e-6)
    first, *others = stream
    assert first.std() > 0.5
    if placement == "post":  # the output is the normalized input, from the second block on unchanged
        first = (first - first.mean(-1, keepdim=True)) if norm == "layernorm" else first
        first = first / first.square().mean(-1, keepdim=True).sqrt()
    for x in others:
        torch.testing.assert_close(x, first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("placement", ["output", "sandwich"])
def test_zero_sets_the_gain_of_norms_of_outputs(placement: str, norm: str) -> None:
    """The slope of a norm at zero is 1 / sqrt(eps) = 1000, instead of about 1 elsewhere."""
    net = network(norm_placement=placement, norm=norm)
    by_role = matrices(net)
    assert spread(by_role["attention outputs"]) == pytest.approx(WIDTH**-0.5, rel=0.02)
    assert spread(by_role["feed-forward outputs"]) == pytest.approx(HIDDEN**-0.5, rel=0.02)
    offset = float(norm == "zero_centered_rmsnorm")
    for block in net.blocks:
        assert (block.attention_end.weight + offset == 0).all()
        assert (block.feed_forward_end.weight + offset == 0).all()
        if placement == "sandwich":
            assert (block.attention_norm.weight + offset == 1).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("placement", NORM_PLACEMENTS)
def test_zero_leaves_every_parameter_trainable(placement: str, norm: str) -> None:
    """After four steps of gradient descent every parameter has changed: zeros have a gradient, or get one."""
    net = network(norm_placement=placement, norm=norm)
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    ids = torch.randint(VOCAB, (4, 64))
    for _ in range(4):
        net.zero_grad()
        nn.functional.cross_entropy(net(ids).flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
        with torch.no_grad():
            for parameter in net.parameters():
                assert parameter.grad is not None
                assert parameter.grad.isfinite().all()
                parameter -= parameter.grad
    assert [name for name, parameter in net.named_parameters() if torch.equal(parameter, before[name])] == []
