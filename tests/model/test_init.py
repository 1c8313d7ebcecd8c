"""What weights are drawn from, what an untrained network says, and which switches exclude each other."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.init import INITIALISATIONS
from lit_gpt_scratch.model.norms import NORM_PLACEMENTS, NORMS

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
    """Of the blocks, by what they do: read the stream at its width, write to it from as many channels, or from more."""
    blocks = [(block.attention, block.feed_forward) for block in net.blocks]
    return {
        "reads": [
            linear.weight for a, f in blocks for linear in (a.query, a.key, a.value, f.input, f.gate)
        ],
        "attention writes": [a.output.weight for a, _ in blocks],
        "feed-forward writes": [f.output.weight for _, f in blocks],
    }  # fmt: skip


DRAWN: dict[str, dict[str, float]] = {
    "zero": {"embedding": 1.0, "tied": 0.02, "reads": WIDTH**-0.5, "attention writes": 0.0, "feed-forward writes": 0.0,
             "head": 0.0},
    "normal": {"embedding": 0.02, "tied": 0.02, "reads": 0.02, "attention writes": 0.02, "feed-forward writes": 0.02,
               "head": 0.02},
    "gpt2": {"embedding": 0.02, "tied": 0.02, "reads": 0.02, "attention writes": 0.02 / math.sqrt(2 * LAYERS),
             "feed-forward writes": 0.02 / math.sqrt(2 * LAYERS), "head": 0.02},
    "xavier": {"embedding": 1.0, "tied": WIDTH**-0.5, "attention writes": math.sqrt(2 / (2 * WIDTH)),
               "feed-forward writes": math.sqrt(2 / (WIDTH + HIDDEN)), "head": math.sqrt(2 / (WIDTH + VOCAB))},
}  # fmt: skip


def test_every_scheme_is_tested() -> None:
    assert DRAWN.keys() == INITIALISATIONS.keys()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", DRAWN)
def test_weights_have_the_standard_deviations_that_the_scheme_names(scheme: str, tied: bool) -> None:
    net, named = network(initialisation=scheme, tied_embeddings=tied), DRAWN[scheme]
    found = {part: spread(weights) for part, weights in matrices(net).items() if part in named}
    found["embedding"] = spread([net.embedding.weight])
    expected = {part: std for part, std in named.items() if part in found}
    if tied:
        expected["embedding"] = named["tied"]
    else:
        found["head"], expected["head"] = spread([net.head.weight]), named["head"]
    assert found == pytest.approx(expected, rel=0.02)


def test_xaviers_matrices_are_uniform_by_the_sum_of_their_sizes() -> None:
    for linear in network(initialisation="xavier").modules():
        if isinstance(linear, nn.Linear):
            bound = math.sqrt(6 / (linear.in_features + linear.out_features))
            assert 0.99 * bound < linear.weight.abs().max() <= bound
            assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scheme", INITIALISATIONS)
def test_biases_begin_at_zero_and_gains_at_one(scheme: str, norm: str) -> None:
    net = network(initialisation=scheme, norm=norm)
    vectors = {name: parameter for name, parameter in net.named_parameters() if parameter.ndim == 1}
    assert len(vectors) > 20
    for name, vector in vectors.items():
        assert vector.unique().tolist() == [0.0 if name.endswith("bias") else 1.0], name


@pytest.mark.parametrize("scheme", INITIALISATIONS)
def test_learned_positions_are_drawn_as_gpt2s(scheme: str) -> None:
    assert spread([network(initialisation=scheme).position.table.weight]) == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize("scheme", INITIALISATIONS)
def test_what_a_switch_adds_begins_at_nothing(scheme: str) -> None:
    """Two networks with the same weights, but that one has the switches as well."""
    plain, more = network(initialisation=scheme), network(initialisation=scheme, **SWITCHES)
    found = more.load_state_dict(plain.state_dict(), strict=False)
    assert {name.split(".")[0] for name in found.missing_keys} == {"blocks", "value_tables", "bigrams", "smear"}
    ids = torch.randint(VOCAB, (2, 20))
    assert torch.equal(more(ids), plain(ids))
    assert torch.equal(more.hidden_states(ids), plain.hidden_states(ids))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("placement", NORM_PLACEMENTS)
def test_zero_begins_with_blocks_that_do_nothing_and_a_loss_of_ln_vocab(placement: str, norm: str) -> None:
    net = network(norm_placement=placement, norm=norm, **SWITCHES)
    stream: list[Tensor] = []
    for block in net.blocks:
        block.register_forward_hook(lambda _, given, out: stream.extend((given[0], out)))
    ids = torch.randint(VOCAB, (2, 20))
    logits = net(ids)
    assert not logits.any()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    assert loss.item() == pytest.approx(math.log(VOCAB), rel=1e-6)
    first, *others = stream
    assert first.std() > 0.5
    if placement == "post":  # what comes in leaves normalised, and is that already from the second block on
        first = (first - first.mean(-1, keepdim=True)) if norm == "layernorm" else first
        first = first / first.square().mean(-1, keepdim=True).sqrt()
    for x in others:
        torch.testing.assert_close(x, first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_before_a_norm_zero_is_the_norms_gain_and_not_the_matrix(norm: str) -> None:
    """Of a zero vector the norm's slope is one by the root of eps: 1000, where others have about one."""
    net = network(norm_placement="sandwich", norm=norm)
    writes = matrices(net)
    assert spread(writes["attention writes"]) == pytest.approx(WIDTH**-0.5, rel=0.02)
    assert spread(writes["feed-forward writes"]) == pytest.approx(HIDDEN**-0.5, rel=0.02)
    for block in net.blocks:
        assert not block.attention_end.weight.any()
        assert not block.feed_forward_end.weight.any()
        assert (block.attention_norm.weight == 1).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("placement", NORM_PLACEMENTS)
def test_zero_leaves_every_part_a_way_to_learn(placement: str, norm: str) -> None:
    """Four steps of plain descent, and everything has moved: what is zero has a gradient, or gets one."""
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


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_embd": 190}, ("model.gpt.n_embd (190)", "model.gpt.n_head (3)", "model.gpt.head_dim")),
        ({"n_kv_head": 2}, ("model.gpt.n_head (3)", "model.gpt.n_kv_head (2)")),
        ({"rotary_factor": 2.0}, ("model.gpt.rotary_factor is 2.0", "model.gpt.rotary_scaling is not set")),
        (
            {"position": "learned", "rotary_scaling": "linear"},
            ("model.gpt.rotary_scaling is linear", "model.gpt.position is learned"),
        ),
        ({"position": "alibi", "rotary_share": 0.5}, ("model.gpt.rotary_share is 0.5", "model.gpt.position is alibi")),
        (
            {"position": "sinusoidal", "rotary_scaling": "ntk"},
            ("model.gpt.rotary_scaling is ntk", "model.gpt.position is sinusoidal"),
        ),
        ({"position": "none", "rotary_share": 0.5}, ("model.gpt.rotary_share is 0.5", "model.gpt.position is none")),
        (
            {"rotary_scaling": "yarn", "rotary_factor": 4.0},
            ("model.gpt.rotary_scaling is yarn", "model.gpt.rotary_trained_context is None"),
        ),
        (
            {"rotary_scaling": "llama3", "rotary_factor": 4.0},
            ("model.gpt.rotary_scaling is llama3", "model.gpt.rotary_trained_context is None"),
        ),
        (
            {"rotary_scaling": "linear", "rotary_factor": 4.0, "rotary_trained_context": 512},
            ("model.gpt.rotary_scaling is linear", "model.gpt.rotary_trained_context is 512"),
        ),
        (
            {"rotary_trained_context": 512},
            ("model.gpt.rotary_scaling is None", "model.gpt.rotary_trained_context is 512"),
        ),
        ({"rotary_share": 0.26}, ("model.gpt.position rotary", "it would rotate 17 of 64", "rotary_share")),
        ({"rotary_share": 1.5}, ("model.gpt.position rotary", "it would rotate 96 of 64", "rotary_share")),
        ({"head_dim": 2, "rotary_scaling": "ntk"}, ("model.gpt.rotary_scaling is ntk", "there are 2")),
        (
            {"rotary_scaling": "linear", "rotary_slow": 2.0},
            ("model.gpt.rotary_slow is 2.0", "model.gpt.rotary_scaling is linear"),
        ),
        (
            {"rotary_scaling": "llama3", "rotary_trained_context": 64, "rotary_slow": 4.0},
            ("model.gpt.rotary_slow is 4.0", "model.gpt.rotary_fast is 4.0"),
        ),
        (
            {"position": "learned", "rotary_trained_context": 64},
            ("model.gpt.rotary_trained_context is 64", "model.gpt.position is learned"),
        ),
        ({"rotary_base": 1.0}, ("model.gpt.rotary_base is 1.0", "above 1")),
        (
            {"n_embd": 15, "position": "sinusoidal"},
            ("model.gpt.position sinusoidal", "model.gpt.n_embd is 15"),
        ),
        (
            {"attention_backend": "sdpa", "attention_softcap": 30.0},
            ("model.gpt.attention_backend is sdpa", "model.gpt.attention_softcap is 30.0"),
        ),
        (
            {"attention_backend": "flex", "dropout": 0.1},
            ("model.gpt.attention_backend is flex", "model.gpt.dropout is 0.1"),
        ),
    ],
)  # fmt: skip
def test_switches_that_contradict_each_other_are_both_named(changes: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        GPTConfig(**changes)
    assert [part for part in named if part not in str(error.value)] == []


@pytest.mark.parametrize(
    "switch",
    ["attention_backend", "position", "rotary_scaling", "norm", "norm_placement", "feed_forward", "initialisation"],
)
def test_a_name_that_is_none_of_a_switchs_is_refused_with_all_that_are(switch: str) -> None:
    with pytest.raises(UserError, match=rf"model\.gpt\.{switch} is quadratic; it must be one of \w+, \w+"):
        GPTConfig(**{switch: "quadratic"})  # type: ignore[arg-type]  # that is what is tested
