"""GPT as a whole: initial loss, causality, and equality with Qwen3 in transformers."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.losses.cross_entropy import token_cross_entropy
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.activation_checkpointing import ActivationCheckpointing
from lit_gpt_scratch.model.norms import NORM_PLACEMENTS, NORMS
from tests.conftest import TINY, randomised

configs = st.builds(
    lambda n_kv_head, group, half, qk_norms, alternates, **rest: GPTConfig(
        n_head=n_kv_head * group,
        n_kv_head=n_kv_head,
        n_embd=n_kv_head * group * 2 * half,
        qk_norm=qk_norms > 0,
        qk_norm_joint=qk_norms > 1,
        sliding_window_pattern=2 if alternates and rest["sliding_window"] and rest["n_layer"] > 1 else None,
        **rest,
    ),
    n_layer=st.integers(1, 3),
    n_kv_head=st.integers(1, 3),
    group=st.integers(1, 3),
    half=st.integers(1, 4),
    position=st.sampled_from(["rotary", "learned", "none"]),
    qk_norms=st.integers(0, 2),
    alternates=st.booleans(),
    norm_placement=st.sampled_from(NORM_PLACEMENTS),
    attention_scale=st.sampled_from([None, 0.5]),
    attention_sinks=st.booleans(),
    sliding_window=st.sampled_from([None, 3]),
    norm=st.sampled_from(NORMS),
    qkv_bias=st.booleans(),
    feed_forward=st.sampled_from(["swiglu", "relu2", "gelu"]),
    logit_softcap=st.sampled_from([None, 15.0]),
    scaled_embeddings=st.booleans(),
    value_embeddings=st.booleans(),
    bigram_rows=st.sampled_from([None, 50]),
    smear=st.booleans(),
    residual_scalars=st.booleans(),
)


@pytest.mark.parametrize("vocab_size", [257, 1024, 5000])
@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_untrained_model_predicts_uniformly(vocab_size: int, position: str) -> None:
    model = GPT(GPTConfig(position=position), vocab_size, 64)
    ids = torch.randint(vocab_size, (4, 65))
    nats, tokens = token_cross_entropy(model(ids[:, :-1]), ids[:, 1:])
    assert (nats / tokens).item() == pytest.approx(math.log(vocab_size), rel=0.01)


@given(config=configs, t=st.integers(0, 10), seed=st.integers(0, 1000))
@settings(max_examples=40)
def test_logits_do_not_depend_on_later_tokens(config: GPTConfig, t: int, seed: int) -> None:
    model = randomised(config, vocab_size=17, block_size=12)
    ids = torch.randint(17, (1, 12), generator=torch.Generator().manual_seed(seed))
    changed = ids.clone()
    changed[0, t + 1] = (changed[0, t + 1] + 1) % 17
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, : t + 1], after[:, : t + 1])
    assert not torch.equal(before[:, t + 1], after[:, t + 1])  # otherwise the test could not fail


def test_input_longer_than_the_context_is_an_error() -> None:
    with pytest.raises(UserError, match="25 tokens do not fit into a context of 24"):
        randomised(TINY)(torch.zeros(1, 25, dtype=torch.int64))


def test_softcap_bounds_the_logits() -> None:
    config = GPTConfig(n_layer=1, n_head=2, n_embd=32, logit_softcap=2.0)
    model = randomised(config)
    ids = torch.randint(61, (2, 24))
    capped = model(ids)
    object.__setattr__(config, "logit_softcap", None)
    torch.testing.assert_close(capped, 2.0 * torch.tanh(model(ids) / 2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_scaled_as_in_gemma(dtype: torch.dtype) -> None:
    """By a factor that is rounded to the dtype, before anything is added."""
    gemma3 = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    config = GPTConfig(n_layer=1, n_head=2, n_embd=36, scaled_embeddings=True, position="learned")
    net, ids = randomised(config).to(dtype), torch.randint(61, (2, 24))
    theirs = gemma3.Gemma3TextScaledWordEmbedding(61, 36, None, 36**0.5).to(dtype)
    theirs.weight.data.copy_(net.embedding.weight)
    found: list[torch.Tensor] = []
    net.blocks[0].register_forward_pre_hook(lambda _, given: found.append(given[0]))
    net(ids)
    assert torch.equal(found[0], theirs(ids) + net.position.table.weight)


def test_dropout_is_only_active_in_training() -> None:
    model = randomised(GPTConfig(n_layer=1, n_head=2, n_embd=32, dropout=0.5))
    ids = torch.randint(61, (2, 24))
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_default_architecture_matches_qwen3(n_kv_head: int) -> None:
    """Logits and gradients of the default architecture against ``transformers``' Qwen3, with random weights."""
    transformers = pytest.importorskip("transformers")
    config = GPTConfig(n_layer=2, n_head=4, n_kv_head=n_kv_head, n_embd=32)
    ours = randomised(config)
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=61,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=n_kv_head,
            head_dim=config.head_width,
            intermediate_size=config.ffn_width,
            max_position_embeddings=24,
            rope_parameters={"rope_type": "default", "rope_theta": config.rotary_base},
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            attention_bias=False,
            attn_implementation="eager",
        )
    ).eval()
    names = {
        "embedding": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm", "head": "lm_head",
        "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
        "attention": "self_attn", "query": "q_proj", "key": "k_proj", "value": "v_proj", "query_norm": "q_norm",
        "key_norm": "k_norm", "feed_forward": "mlp", "input": "up_proj", "gate": "gate_proj",
    }  # fmt: skip

    def translate(name: str) -> str:
        output = "down_proj" if "feed_forward" in name else "o_proj"
        return ".".join(output if part == "output" else names.get(part, part) for part in name.split("."))

    weights = {translate(name): value for name, value in ours.state_dict().items()}
    theirs.load_state_dict(weights, strict=True)
    ids = torch.randint(61, (3, 24))
    target = torch.randn(3, 24, 61)
    logits, expected = ours(ids), theirs(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    (logits * target).sum().backward()
    (expected * target).sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        other = gradients[translate(name)].grad
        assert other is not None
        scale = other.abs().max()
        torch.testing.assert_close(parameter.grad / scale, other / scale, atol=1e-5, rtol=1e-4)


KINDS: list[ActivationCheckpointing] = [True, "keep_attention", "keep_matmuls"]


WITH_DROPOUT: list[tuple[ActivationCheckpointing, float]] = [(True, 0.3), *((kind, 0.0) for kind in KINDS)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("checkpointing", "dropout"), WITH_DROPOUT)
def test_activation_checkpointing_preserves_gradients(
    checkpointing: ActivationCheckpointing, dropout: float, autocast: bool
) -> None:
    """Activation checkpointing gives bitwise the same gradients."""

    def gradients(checkpointing: ActivationCheckpointing) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, dropout=dropout, initialisation="gpt2"), 50, 16)
        net.activation_checkpointing = checkpointing
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = net(torch.randint(50, (3, 16))).square().mean()
        loss.backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(gradients(checkpointing), gradients(False), strict=True))


class CountedOperators(TorchDispatchMode):
    """Counts the calls of operators, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name().partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("checkpointing", "recomputes"),
    [(False, (0, 0)), (True, (1, 1)), ("keep_attention", (0, 1)), ("keep_matmuls", (0, 0))],
)
def test_operators_that_are_kept_are_not_recomputed(
    checkpointing: ActivationCheckpointing, recomputes: tuple[int, int]
) -> None:
    """Calls in the backward pass: fused attention, and the first five of the six matmuls of each block."""
    net = GPT(GPTConfig(n_layer=3, n_head=2, n_embd=32, feed_forward="gelu", initialisation="gpt2"), 50, 16)
    net.activation_checkpointing = checkpointing
    loss = net(torch.randint(50, (3, 16))).square().mean()
    with CountedOperators() as counted:
        loss.backward()
    attention, matmuls = recomputes
    assert counted.calls["_scaled_dot_product_flash_attention_for_cpu"] == 3 * attention
    plain = 2 * (6 * 3 + 1)  # the gradients of input and weight of each matmul and of the head
    assert counted.calls["mm"] == plain + 5 * 3 * matmuls  # nothing needs the output of the last one


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "dropout"), WITH_DROPOUT)
def test_activation_checkpointing_is_compiled_with_the_block(
    checkpointing: ActivationCheckpointing, dropout: float
) -> None:
    torch.compiler.reset()  # the number of variants of one function is limited

    def gradients(compiled: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, dropout=dropout, initialisation="gpt2"), 50, 16)
        net.activation_checkpointing = checkpointing
        if compiled:
            for block in net.blocks:
                block.compile(fullgraph=True)
        net(torch.randint(50, (3, 16))).square().mean().backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    for a, b in zip(gradients(compiled=True), gradients(compiled=False), strict=True):
        if dropout:  # compiled code draws other random numbers
            assert a.isfinite().all()
        else:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [None, torch.tensor([0] * 5 + [1] * 11).expand(3, -1)], ids=["one", "packed"])
def test_compiled_local_and_global_blocks_have_the_same_gradients(documents: torch.Tensor | None) -> None:
    torch.compiler.reset()
    config = GPTConfig(
        n_layer=4, n_head=2, n_embd=32, sliding_window=4, sliding_window_pattern=2, rotary_local_base=50.0,
        attention_sinks=True,
    )  # fmt: skip
    ids = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(0))
    gradients = []
    for compiled in (True, False):
        net = randomised(config, 50, 16).train()
        if compiled:
            for block in net.blocks:
                block.compile(fullgraph=True)
        net(ids, documents).square().mean().backward()
        gradients.append([p.grad / p.grad.abs().max() for p in net.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
