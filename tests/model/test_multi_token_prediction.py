"""Modules for multi-token prediction against the equations, one document at a time, in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.generation.decode_loop import generate
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.losses.labels_ahead import labels_ahead
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.activation_checkpointing import ActivationCheckpointing
from lit_gpt_scratch.model.attention import build_attention_layout
from lit_gpt_scratch.model.module_metadata import flops_per_token, parameter_roles
from lit_gpt_scratch.model.multi_token_prediction import MULTI_TOKEN_PREFIX
from lit_gpt_scratch.optim import Muon
from lit_gpt_scratch.profiling.flops_and_memory import activation_bytes, count_parameters_by_part
from tests.conftest import TINY, randomised

AHEAD = replace(TINY, multi_token_depth=3)
CONFIGS = {
    "default": AHEAD,
    "additions": replace(
        AHEAD, value_embeddings=True, bigram_rows=50, smear=True, residual_scalars=True, logit_softcap=5.0,
        tied_embeddings=True,
    ),
    "layernorm, sandwich": replace(AHEAD, norm="layernorm", norm_placement="sandwich", bias=True, position="learned"),
    "post": replace(AHEAD, norm_placement="post"),
    "latent attention": replace(AHEAD, attention="latent"),
    "experts": replace(AHEAD, feed_forward="moe", n_experts=4),
}  # fmt: skip


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
    out = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    return out + norm.bias if isinstance(norm, nn.LayerNorm) else out


def logits_of_document(net: GPT, ids: Tensor) -> list[Tensor]:
    """Section 2.2 of the DeepSeek-V3 paper: h^k = TRM(M [norm(h^(k-1)_(1:T-k)); norm(Emb(t_(1+k:T)))])."""
    states = net.hidden_states(ids)
    outputs = [net.apply_head(states)]
    for depth, module in enumerate(net.multi_token_modules, 1):
        if ids.size(1) <= depth:
            return outputs
        embedding = net.embedding.weight[ids[:, depth:]]
        pair = normed(module.state_norm, states[:, :-1]), normed(module.embedding_norm, embedding)
        x = torch.cat(pair, -1) @ module.combine.weight.T + (0 if module.combine.bias is None else module.combine.bias)
        layout = build_attention_layout(net.config, net.position, ids[:, :-depth], None, None)
        states = normed(module.norm, module.block(x, x, net.position, layout)[0])
        outputs.append(net.apply_head(states))
    return outputs


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_logits_are_those_of_the_equations(config: GPTConfig) -> None:
    """At all positions that have a label, documents that share a row give the same as documents on their own."""
    net = randomised(config).double()
    lengths = [[9, 1, 2, 12], [24]]
    ids = torch.randint(61, (2, 24))
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in lengths])
    found = net.multi_token_logits(ids, documents)
    assert [tuple(logits.shape) for logits in found] == [(2, 24 - depth, 61) for depth in range(4)]
    for row, sizes in enumerate(lengths):
        start = 0
        for size in sizes:
            for depth, expected in enumerate(logits_of_document(net, ids[row : row + 1, start : start + size])):
                inside = found[depth][row, start : start + size - depth]
                torch.testing.assert_close(inside, expected[0], atol=1e-11, rtol=1e-11)
            start += size


@torch.no_grad()
def test_positions_with_a_label_read_no_other_document() -> None:
    net = randomised(AHEAD).double()
    ids, documents = torch.randint(61, (1, 24)), torch.tensor([[0] * 9 + [1] * 15])
    changed = torch.where(documents == 0, ids, (ids + 1) % 61)
    before, after = net.multi_token_logits(ids, documents), net.multi_token_logits(changed, documents)
    for depth in range(1, 4):
        labels = labels_ahead(ids, ids.roll(-1, 1), depth, documents)
        first = (labels != -100) & (documents[:, : 24 - depth] == 0)
        assert first.sum() == 9 - depth
        assert torch.equal(before[depth][first], after[depth][first])


@pytest.mark.parametrize("depth", [1, 2, 3])
@torch.no_grad()
def test_each_module_reads_one_token_more(depth: int) -> None:
    net = randomised(AHEAD).double()
    ids = torch.randint(61, (1, 24))
    before = net.multi_token_logits(ids)[depth]
    for offset in (depth, depth + 1):
        changed = ids.clone()
        changed[0, 7 + offset] = (changed[0, 7 + offset] + 1) % 61
        after = net.multi_token_logits(changed)[depth]
        assert torch.equal(before[:, :7], after[:, :7])
        assert torch.equal(before[:, 7], after[:, 7]) == (offset > depth)


def test_generation_does_not_depend_on_the_modules() -> None:
    net = randomised(AHEAD)
    plain = GPT(TINY, 61, 24).eval()
    plain.load_state_dict({n: w for n, w in net.state_dict().items() if not n.startswith(MULTI_TOKEN_PREFIX)})
    ids = torch.randint(61, (2, 24))
    assert torch.equal(net(ids), plain(ids))
    tokens = [list(generate(each, [[1, 2], [3]], 30, Sampling(temperature=0.0), [0, 0], -1)) for each in (net, plain)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("checkpointing", [True, "keep_attention"])
def test_activation_checkpointing_preserves_gradients(checkpointing: ActivationCheckpointing) -> None:
    def gradients(checkpointing: ActivationCheckpointing) -> list[Tensor]:
        net = randomised(AHEAD).train()
        net.activation_checkpointing = checkpointing
        sum(out.square().mean() for out in net.multi_token_logits(torch.randint(61, (2, 24)))).backward()
        return [p.grad for p in net.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(checkpointing), gradients(False), strict=True))


def test_modules_are_counted() -> None:
    net, plain = GPT(AHEAD, 61, 24), GPT(TINY, 61, 24)
    block = flops_per_token(plain.blocks[0], 24)
    assert flops_per_token(net, 24) == flops_per_token(plain, 24) + 3 * (block + 2 * 64 * 32 + 2 * 61 * 32)
    parts, others = count_parameters_by_part(net), count_parameters_by_part(plain)
    added = sum(p.numel() for p in net.multi_token_modules.parameters())
    assert parts == others | {"multi-token prediction": added}
    groups = parameter_roles(net)
    for name, parameter in net.multi_token_modules.named_parameters():
        assert groups[parameter] == ("vectors" if parameter.ndim == 1 else "matrices"), name
    sizes = [
        activation_bytes(config, 61, 24, 2, torch.device("cpu"), torch.float32, False, loss_chunk_size=chunk)
        for config in (TINY, AHEAD)
        for chunk in (None, 8)
    ]
    assert sizes[2] > 2 * sizes[0]  # three blocks in addition to two
    assert sizes[3] > 2 * sizes[1]


@pytest.mark.parametrize("initialisation", ["zero", "normal", "xavier"])
def test_modules_do_not_change_the_initial_weights_of_the_rest(initialisation: str) -> None:
    changes: dict[str, Any] = {"initialisation": initialisation}
    net, plain = (GPT(replace(config, **changes), 61, 24, seed=3) for config in (AHEAD, TINY))
    weights = net.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in plain.state_dict().items())
    if initialisation == "zero":
        assert not net.multi_token_modules[0].block.attention.output.weight.any()


def test_modules_are_trained() -> None:
    torch.manual_seed(0)
    net, ids = GPT(AHEAD, 61, 24), torch.randint(61, (2, 24))
    optimizer = Muon().build(net)
    before = {name: p.clone() for name, p in net.named_parameters()}
    for _ in range(3):
        labels = [ids[:, depth + 1 :] for depth in range(4)]
        outputs = [out[:, :-1].flatten(0, 1) for out in net.multi_token_logits(ids)]
        losses = [nn.functional.cross_entropy(o, y.flatten()) for o, y in zip(outputs, labels, strict=True)]
        sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [name for name, p in net.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize(
    ("depth", "message"),
    [(-1, "depth is -1; it must be 0 or more"), (65, "depth is 65; it must be at most 64")],
)
def test_invalid_depths_are_an_error(depth: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(TINY, multi_token_depth=depth)
    with pytest.raises(UserError, match="25 tokens do not fit"):
        randomised(AHEAD).multi_token_logits(torch.zeros(1, 25, dtype=torch.int64))
