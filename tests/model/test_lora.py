"""LoRA against ``peft``, and the base model, which must not change."""

import copy
import re
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.kernels.onednn_linear import LINEAR_CLASSES
from lit_gpt_scratch.model import GPT, GPTConfig, lora
from lit_gpt_scratch.model.lora import (
    LoRA,
    LoRALinear,
    add_lora,
    disable_lora,
    load_lora_state_dict,
    lora_state_dict,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from tests.conftest import randomised

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, bias=True)
TIED = GPTConfig(n_layer=1, n_head=2, n_embd=16, tied_embeddings=True)
IDS = torch.arange(40).view(2, 20)
PATTERNS = {
    "queries-and-values": r"attention\.(query|value)$",
    "blocks": LoRA().pattern,
    "all": "",
    "head": "^head$",
    "last-block": r"blocks\.1\.",
}


def adapted(config: GPTConfig = CONFIG, dtype: torch.dtype = torch.float32, **settings: object) -> GPT:
    """A network in evaluation mode with nonzero adapters."""
    net = randomised(config).to(dtype)
    add_lora(net, LoRA(**settings))  # type: ignore[arg-type]  # fields of the dataclass
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, LoRALinear):
                nn.init.normal_(module.lora_b, std=0.2)
    return net


def in_peft(net: GPT, base: GPT, settings: LoRA) -> nn.Module:
    """The same base model with the same adapters in ``peft``."""
    peft = pytest.importorskip("peft")
    linears = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
        target_modules=[name for name in linears if re.search(settings.pattern, name)],
    )  # fmt: skip
    theirs = peft.inject_adapter_in_model(config, base)
    weights = {
        re.sub(r"lora_([ab])$", lambda found: f"lora_{found[1].upper()}.default.weight", name): value
        for name, value in lora_state_dict(net).items()
    }
    there = {name for name in theirs.state_dict() if "lora_" in name}
    assert there == weights.keys()  # the pattern matched the same layers
    theirs.load_state_dict(weights, strict=False)
    return theirs.train(net.training)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("pattern", [PATTERNS["queries-and-values"], PATTERNS["last-block"], "attention|feed_forward"])
def test_outputs_gradients_and_merged_weights_match_peft(pattern: str) -> None:
    config = LoRA(rank=3, alpha=12.0, pattern=pattern)
    net = adapted(rank=3, alpha=12.0, pattern=pattern)
    theirs = in_peft(net, randomised(CONFIG), config)
    target = torch.randn(2, 20, 61)
    for model in (net, theirs):
        (model(IDS) * target).sum().backward()
    close(net(IDS), theirs(IDS))
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    mine = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert len(mine) == len(gradients) == len(lora_state_dict(net))
    for name, gradient in mine.items():
        assert gradient is not None
        close(gradient, gradients[f"{name[:-1]}{name[-1].upper()}.default.weight"])
    merge_lora(net)
    for name, module in net.named_modules():
        if isinstance(module, LoRALinear):
            other = theirs.get_submodule(name)
            other.merge()
            close(module.weight, other.base_layer.weight)
    close(net(IDS), theirs(IDS))


def test_dropout_matches_peft() -> None:
    config = LoRA(rank=4, dropout=0.5, pattern=PATTERNS["queries-and-values"])
    net = adapted(rank=4, dropout=0.5, pattern=config.pattern).train()
    theirs = in_peft(net, randomised(CONFIG), config)
    outputs = []
    for model in (net, theirs):
        torch.manual_seed(3)
        outputs.append(model(IDS))
    close(*outputs)
    assert not torch.equal(net(IDS), net(IDS))
    net.eval()
    theirs.eval()
    close(net(IDS), theirs(IDS))


def test_initial_adapters_match_peft() -> None:
    config = LoRA(rank=64, pattern=PATTERNS["blocks"])
    net = randomised(CONFIG)
    add_lora(net, config)
    theirs = in_peft(net, randomised(CONFIG), config)
    for layer in (net.blocks[0].feed_forward.output, theirs.blocks[0].feed_forward.output.lora_A.default):
        a = layer.lora_a if isinstance(layer, LoRALinear) else layer.weight
        bound = 1 / layer.in_features**0.5  # of the uniform distribution that a = sqrt(5) amounts to
        assert 0.95 * bound < a.abs().max() <= bound
        assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert all(not value.any() for name, value in lora_state_dict(net).items() if name.endswith("lora_b"))


def test_bfloat16_base_matches_peft_with_float32_adapters() -> None:
    config = LoRA(rank=3, pattern=PATTERNS["blocks"])
    net = adapted(dtype=torch.bfloat16, rank=3, pattern=config.pattern)
    theirs = in_peft(net, randomised(CONFIG).bfloat16(), config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:  # as get_peft_model does by default
            parameter.data = lora_state_dict(net)[
                re.sub(r"lora_([AB])\.default\.weight", lambda f: f"lora_{f[1].lower()}", name)
            ]
    assert {value.dtype for value in lora_state_dict(net).values()} == {torch.float32}
    assert net.blocks[0].attention.query(torch.randn(1, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert torch.equal(net(IDS), theirs(IDS))


def test_merged_bfloat16_weight_is_rounded_once() -> None:
    linear = nn.Linear(8, 8, dtype=torch.bfloat16)
    layer = LoRALinear(linear, LoRA(rank=2))
    nn.init.normal_(layer.lora_b)
    exact = linear.weight.double() + layer.scaling * layer.lora_b.double() @ layer.lora_a.double()
    layer.merge()
    torch.testing.assert_close(layer.weight.double(), exact, rtol=2**-8, atol=0)  # half a unit in the last of 8 bits


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disabled_adapters_give_the_base_model_bit_for_bit(dtype: torch.dtype, merged: bool) -> None:
    net, base = adapted(dtype=dtype), randomised(CONFIG).to(dtype)
    if merged:
        merge_lora(net)
    on = net(IDS)
    with disable_lora(net):
        assert torch.equal(net(IDS), base(IDS))
        with disable_lora(net):
            pass
        assert torch.equal(net(IDS), base(IDS))  # still disabled
    assert torch.equal(net(IDS), on)
    assert not torch.equal(on, base(IDS))
    with pytest.raises(ZeroDivisionError), disable_lora(net):
        _ = 1 / 0
    assert torch.equal(net(IDS), on)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_restores_the_same_weights(dtype: torch.dtype) -> None:
    net = adapted(dtype=dtype)
    before, outputs = dict(net.named_parameters()), net(IDS)
    for _ in range(2):  # the second time has no effect
        merge_lora(net)
    close(net(IDS), outputs, 1e-5 if dtype == torch.float32 else 0.1)
    for _ in range(2):
        unmerge_lora(net)
    after = dict(net.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(net(IDS), outputs)


@given(rank=st.integers(1, 20), alpha=st.floats(0.5, 64), pattern=st.sampled_from(sorted(PATTERNS.values())))
@settings(max_examples=25)
def test_any_rank_and_pattern_preserve_the_base_model(rank: int, alpha: float, pattern: str) -> None:
    base, net = randomised(CONFIG), randomised(CONFIG)
    names = add_lora(net, LoRA(rank, alpha, 0.0, pattern))
    linears = {name: m for name, m in base.named_modules() if isinstance(m, nn.Linear) and re.search(pattern, name)}
    assert names == list(linears)
    trainable = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert trainable.keys() == lora_state_dict(net).keys()
    assert sum(p.numel() for p in trainable.values()) == sum(
        rank * (m.in_features + m.out_features) for m in linears.values()
    )
    assert torch.equal(net(IDS), base(IDS))  # B is zero
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.normal_(std=rank**-0.5)
    added = net(IDS)
    assert not torch.equal(added, base(IDS))
    merge_lora(net)
    close(net(IDS), added, 1e-4)  # a large alpha amplifies rounding
    unmerge_lora(net)
    assert torch.equal(net(IDS), added)
    remove_lora(net)
    assert torch.equal(net(IDS), base(IDS))
    assert repr(net) == repr(base)
    for (name, mine), (other, its) in zip(net.state_dict().items(), base.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(mine, its)


def test_base_checkpoint_still_loads() -> None:
    base, net = randomised(CONFIG), adapted()
    found = net.load_state_dict(base.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) == lora_state_dict(net).keys()
    assert net.state_dict().keys() == base.state_dict().keys() | lora_state_dict(net).keys()


def test_training_changes_only_the_adapters() -> None:
    net, base = adapted(dropout=0.1).train(), randomised(CONFIG)
    before = copy.deepcopy(lora_state_dict(net))
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(IDS).square().mean().backward()
    optimizer.step()
    state = net.state_dict()
    assert all(not torch.equal(state[name], value) for name, value in before.items())
    assert all(torch.equal(state[name], value) for name, value in base.state_dict().items())
    assert all(p.grad is None for name, p in net.named_parameters() if "lora_" not in name)


def test_state_dict_is_the_same_while_merged() -> None:
    net = adapted()
    before, outputs = copy.deepcopy(net.state_dict()), net(IDS)
    merge_lora(net)
    merged = net.state_dict()
    assert list(merged) == list(before)
    assert all(torch.equal(merged[name], before[name]) for name in before)
    net.load_state_dict(before)  # unmerges first, else the adapters would count twice
    torch.testing.assert_close(net(IDS), outputs)
    assert torch.equal(net(IDS), outputs)


def test_removing_merged_adapters_leaves_a_plain_network() -> None:
    net, base = adapted(), randomised(CONFIG)
    outputs = net(IDS)
    merge_lora(net)
    merged = net(IDS)
    remove_lora(net)
    assert repr(net) == repr(base)
    assert torch.equal(net(IDS), merged)
    base.load_state_dict(net.state_dict())
    close(base(IDS), outputs)


def test_adapters_load_into_another_copy_of_the_base() -> None:
    net, other = adapted(), randomised(CONFIG)
    add_lora(other, LoRA())
    merge_lora(other)
    load_lora_state_dict(other, lora_state_dict(net))
    assert torch.equal(other(IDS), net(IDS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LoRA(rank=4), r"blocks.0.attention.key.lora_a is (8, 16) in the state dict, but (4, 16) in the network"),
        (LoRA(pattern="query"), r"blocks.0.attention.key.lora_a is (8, 16) in the state dict, but missing in the"),
        (LoRA(pattern=""), r"head.lora_a is missing in the state dict, but (8, 16) in the network"),
    ],
)
def test_mismatched_adapters_are_an_error(settings: LoRA, message: str) -> None:
    other = randomised(CONFIG)
    add_lora(other, settings)
    with pytest.raises(UserError, match=re.escape(message)):
        load_lora_state_dict(other, lora_state_dict(adapted()))


def test_adapter_of_a_tied_head_does_not_change_the_embedding() -> None:
    net, base = adapted(TIED, pattern="^head$"), randomised(TIED)
    assert net.head.weight is net.embedding.weight
    hidden, outputs = net.hidden_states(IDS), net(IDS)
    assert not torch.equal(outputs, base(IDS))
    assert torch.equal(hidden, base.hidden_states(IDS))
    merge_lora(net)
    assert torch.equal(net.hidden_states(IDS), hidden)
    close(net(IDS), outputs)
    with pytest.raises(UserError, match=r"adapter of head is merged, but its original weight is shared with embedding"):
        remove_lora(net)
    unmerge_lora(net)
    assert net.head.weight is net.embedding.weight
    remove_lora(net)
    assert net.head.weight is net.embedding.weight
    assert torch.equal(net(IDS), base(IDS))


@pytest.mark.parametrize("tied", [False, True])
def test_merged_network_can_be_cast_and_copied(tied: bool) -> None:
    net = adapted(TIED if tied else CONFIG, pattern="")
    merge_lora(net)
    net = copy.deepcopy(net.double())
    unmerge_lora(net)
    assert (net.head.weight is net.embedding.weight) == tied
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float64}
    base = randomised(TIED if tied else CONFIG).double()
    assert all(torch.equal(net.state_dict()[name], value) for name, value in base.state_dict().items())


@pytest.mark.parametrize("first", ["compile", "add"])
def test_compiled_blocks_follow_merging_and_disabling(first: str) -> None:
    """No graph breaks; a backend without code generation is enough for that."""
    torch.compiler.reset()  # earlier tests count towards the recompilation limit

    def compiled(net: GPT) -> None:
        for block in net.blocks:
            block.compile(backend="eager", fullgraph=True)

    expected, net = adapted(), randomised(CONFIG)
    if first == "compile":
        compiled(net)
        net(IDS)
    add_lora(net, LoRA())
    load_lora_state_dict(net, lora_state_dict(expected))
    if first == "add":
        compiled(net)
    steps: list[Callable[[GPT], None]] = [lambda _: None, merge_lora, unmerge_lora]
    for step in steps:
        step(expected)
        step(net)
        close(net(IDS), expected(IDS))
        with disable_lora(net), disable_lora(expected):
            close(net(IDS), expected(IDS))
    for model in (net, expected):
        model(IDS).square().sum().backward()
    for mine, its in zip(net.parameters(), expected.parameters(), strict=True):
        assert (mine.grad is None) == (its.grad is None)
        if mine.grad is not None and its.grad is not None:
            close(mine.grad, its.grad)


@pytest.mark.parametrize("kind", LINEAR_CLASSES)
def test_shared_layer_has_one_adapter(kind: type[nn.Linear]) -> None:
    shared = kind(4, 4)
    net = nn.ModuleDict({"one": shared, "two": nn.Sequential(shared, kind(4, 4))})
    assert add_lora(net, LoRA(pattern="one|two.0")) == ["one", "two.0"]
    assert net["one"] is net["two"][0]
    merge_lora(net)
    remove_lora(net)
    assert type(net["one"]) is kind
    assert net["one"] is net["two"][0]


def test_subclasses_of_linear_are_skipped() -> None:
    """``nn.MultiheadAttention`` uses the weight of its output layer without calling the layer."""
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "linear": nn.Linear(4, 4)})
    assert add_lora(net, LoRA(pattern="")) == ["linear"]


def test_network_on_meta_device_can_be_adapted() -> None:
    with torch.device("meta"):
        net = GPT(CONFIG, 61, 24)
    add_lora(net, LoRA())
    assert {value.device.type for value in lora_state_dict(net).values()} == {"meta"}


def test_pattern_without_matches_lists_the_layers() -> None:
    with pytest.raises(UserError) as error:
        add_lora(randomised(CONFIG), LoRA(pattern="q_proj"))
    assert str(error.value) == (
        "lora.pattern is q_proj, which does not match any linear layer; choose among blocks.0.attention.query, "
        "blocks.0.attention.key, blocks.0.attention.value, blocks.0.attention.output, blocks.0.feed_forward.input, "
        "blocks.0.feed_forward.output, blocks.0.feed_forward.gate, head"
    )
    with pytest.raises(UserError, match="the network has no linear layers"):
        add_lora(nn.Sequential(nn.ReLU()), LoRA())


def test_adding_adapters_twice_is_an_error() -> None:
    with pytest.raises(UserError, match="already has LoRA adapters"):
        add_lora(adapted(), LoRA())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LoRA(rank=0), "lora.rank is 0; it must be positive and finite"),
        (lambda: LoRA(alpha=-1.0), "lora.alpha is -1.0; it must be positive and finite"),
        (lambda: LoRA(alpha=float("nan")), "lora.alpha is nan; it must be positive and finite"),
        (lambda: LoRA(dropout=1.0), "lora.dropout is 1.0; it must be at least 0 and below 1"),
        (lambda: LoRA(pattern="(query"), "lora.pattern is (query, which is not a valid regular expression (missing )"),
    ],
)
def test_invalid_lora_settings_are_an_error(build: Callable[[], LoRA], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        build()


@pytest.mark.parametrize("pattern", [r"(a|aa|[a-z_]|\w)+[^\w]$", r"(?=((\w|\W)+)+\d{9})", r"((\w|\w)*)*(?!.)\d"])
def test_pattern_that_backtracks_is_stopped(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "PATTERN_SECONDS", 0.2)
    began = time.process_time()  # the limit counts processor time, too
    with pytest.raises(UserError, match=r"lora\.pattern is .* simplify it"):
        add_lora(nn.ModuleDict({"attention_" * 20: nn.Linear(2, 2)}), LoRA(pattern=pattern))
    assert time.process_time() - began < 2


def test_rank_is_bounded() -> None:
    with pytest.raises(UserError, match=r"lora.rank is 10{12}; it must be at most 8192"):
        LoRA(rank=10**12)
