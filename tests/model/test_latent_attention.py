"""Latent attention against transformers' DeepSeek-V2 and V3, and its cached and absorbed form against the plain one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.generation.decode_loop import max_batch_rows
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.attention import Attention, build_attention_layout
from lit_gpt_scratch.model.kv_cache import KVCache
from lit_gpt_scratch.model.latent_attention import LatentAttention
from lit_gpt_scratch.model.lora import LoRA, add_lora, merge_lora
from lit_gpt_scratch.model.module_metadata import flops_per_token, parameter_roles
from lit_gpt_scratch.model.positions import RotaryPositions
from tests.conftest import randomised

LATENT = GPTConfig(n_layer=2, n_head=2, n_embd=32, attention="latent", latent_kv_rank=40)
NAMES = {
    "query.weight": "q_proj.weight", "query_down.weight": "q_a_proj.weight", "query_down.bias": "q_a_proj.bias",
    "query_norm.weight": "q_a_layernorm.weight", "query_up.weight": "q_b_proj.weight",
    "kv_down.weight": "kv_a_proj_with_mqa.weight", "kv_down.bias": "kv_a_proj_with_mqa.bias",
    "kv_norm.weight": "kv_a_layernorm.weight", "kv_up.weight": "kv_b_proj.weight", "output.weight": "o_proj.weight",
    "output.bias": "o_proj.bias",
}  # fmt: skip
"""Names in ``transformers``, by our name."""
SHAPES = [
    {"n_head": 2, "head_dim": 8, "latent_kv_rank": 16, "latent_rope_dim": 4},
    {"n_head": 3, "head_dim": 6, "latent_kv_rank": 6, "latent_rope_dim": 8, "latent_value_dim": 10},
    {"n_head": 4, "head_dim": 8, "latent_kv_rank": 32, "latent_rope_dim": 2, "latent_value_dim": 4, "bias": True},
]


def drawn(config: GPTConfig) -> LatentAttention:
    """All parameters are random."""
    torch.manual_seed(0)
    attention = LatentAttention(config)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.ndim == 1 else 0.0))
    return attention


def interleaved(name: str, weight: Tensor, config: GPTConfig) -> Tensor:
    """Reorder the rotated channels from the half-split to the interleaved layout of DeepSeek."""
    rope = config.latent_rope_width
    if name in ("query.weight", "query_up.weight"):
        heads = weight.unflatten(0, (config.n_head, -1))  # (n_head, head_dim + rope_dim, in_features)
        return torch.cat((heads[:, :-rope], zipped(heads[:, -rope:], 1)), 1).flatten(0, 1)
    if name.startswith("kv_down"):
        return torch.cat((weight[:-rope], zipped(weight[-rope:], 0)))
    return weight


def zipped(halves: Tensor, dimension: int) -> Tensor:
    """Interleave the two halves of a dimension."""
    return torch.stack(halves.chunk(2, dimension), dimension + 1).flatten(dimension, dimension + 1)


def deepseek(version: int, config: GPTConfig, interleaves: bool = True) -> tuple[nn.Module, nn.Module]:
    """The attention of ``transformers`` and its rotary embedding; YaRN has the temperature of DeepSeek-V3."""
    pytest.importorskip("transformers")
    import importlib

    module = importlib.import_module(f"transformers.models.deepseek_v{version}.modeling_deepseek_v{version}")
    prefix = f"DeepseekV{version}"
    settings = {
        "hidden_size": config.n_embd, "num_attention_heads": config.n_head, "num_key_value_heads": config.n_head,
        "q_lora_rank": config.latent_query_rank, "kv_lora_rank": config.latent_kv_width,
        "qk_nope_head_dim": config.head_width, "qk_rope_head_dim": config.latent_rope_width,
        "v_head_dim": config.latent_value_width, "attention_bias": config.bias, "head_dim": config.latent_rope_width,
        "rope_parameters": {"rope_theta": config.rotary_base} | (
            {
                "rope_type": "yarn", "factor": config.rotary_factor, "mscale": 1.0, "mscale_all_dim": 1.0,
                "original_max_position_embeddings": config.rotary_trained_context,
            } if config.rotary_scaling else {"rope_type": "default"}
        ),
        "attn_implementation": "eager", **({"rope_interleave": interleaves} if version == 3 else {}),
    }  # fmt: skip
    theirs = getattr(module, f"{prefix}Config")(**settings)
    return getattr(module, f"{prefix}Attention")(theirs, 0), getattr(module, f"{prefix}RotaryEmbedding")(theirs)


DOCUMENTS = torch.tensor([[0] * 4 + [1] * 7 + [2], [0] * 12])


YARN = {"rotary_scaling": "yarn", "rotary_factor": 40.0, "rotary_trained_context": 8}
FACTORS = {"rotary_short_factors": (1.0, 1.5), "rotary_long_factors": (2.0, 3.0)}
LONGROPE = {"rotary_scaling": "longrope", "rotary_factor": 4.0, "rotary_trained_context": 8, **FACTORS}


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
@pytest.mark.parametrize("query_rank", [None, 7])
@pytest.mark.parametrize(
    "shape",
    [*SHAPES, *(shape | YARN for shape in SHAPES)],
    ids=["even", "wide values", "narrow values", "yarn, even", "yarn, wide values", "yarn, narrow values"],
)
@pytest.mark.parametrize(("version", "interleaves"), [(2, True), (3, True), (3, False)])
def test_outputs_and_gradients_match_deepseek(
    version: int, interleaves: bool, shape: dict[str, Any], query_rank: int | None, documents: Tensor | None
) -> None:
    config = GPTConfig(n_embd=24, attention="latent", latent_query_rank=query_rank, **shape)
    ours, (theirs, rotary) = drawn(config), deepseek(version, config, interleaves)

    def reorder(name: str, weight: Tensor) -> Tensor:
        return interleaved(name, weight, config) if interleaves else weight

    theirs.load_state_dict({NAMES[name]: reorder(name, weight) for name, weight in ours.state_dict().items()})
    x, target = torch.randn(2, 12, 24), torch.randn(2, 12, 24)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    position = RotaryPositions(config, 12)
    layout = build_attention_layout(config, position, torch.zeros(2, 12, dtype=torch.int64), documents, None)
    visible = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, 12, 12)
    if documents is not None:
        visible = visible & (documents[:, None, :, None] == documents[:, None, None, :])
    mask = torch.zeros(2, 1, 12, 12).masked_fill(~visible, float("-inf"))
    positions = layout.positions.expand(2, 12)

    out = ours(inputs[0], position, layout)
    expected = theirs(inputs[1], attention_mask=mask, position_embeddings=rotary(x, positions))[0]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    (out * target).sum().backward()
    (expected * target).sum().backward()
    gradients = dict(theirs.named_parameters())
    pairs = [(reorder(name, p.grad), gradients[NAMES[name]].grad) for name, p in ours.named_parameters()]
    for found, reference in (*pairs, (inputs[0].grad, inputs[1].grad)):
        scale = reference.abs().max()
        torch.testing.assert_close(found / scale, reference / scale, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scaling", [YARN, LONGROPE, {"rotary_scaling": "linear", "rotary_factor": 4.0}, {}])
@pytest.mark.parametrize("local_base", [None, 50.0])
@pytest.mark.parametrize("kind", ["global", "local", "not rotated"])
def test_the_temperature_of_positions_applies_to_all_channels(
    scaling: dict[str, Any], local_base: float | None, kind: str
) -> None:
    """In blocks of each kind: content scores have the factor of position scores between equal positions."""
    windows = {"sliding_window": 4, "sliding_window_pattern": 2, "rotary_local_base": local_base}
    config = replace(LATENT, latent_rope_dim=4, **windows, **scaling)
    position = RotaryPositions(config, 24)
    rotation = None if kind == "not rotated" else position.cos_sin(torch.arange(24), [24], kind == "local")
    q, k = torch.randn(2, 1, 1, 1, 4, dtype=torch.float64).expand(2, 1, 1, 24, 4)
    with_positions = (position.rotate(q, rotation) * position.rotate(k, rotation)).sum(-1)
    torch.testing.assert_close((position.scale(q, rotation) * k).sum(-1), with_positions, atol=1e-6, rtol=1e-6)
    has_temperature = kind != "not rotated" and scaling in (YARN, LONGROPE) and (kind == "global" or not local_base)
    assert torch.allclose(position.scale(q, rotation), q, rtol=1e-6) != has_temperature


LATENTS = {
    "default": {},
    "yarn": YARN | {"n_layer": 3, "rotary_skip_every": 2},
    "longrope": LONGROPE | {"latent_rope_dim": 4, "rotary_trained_context": 64},
    "small rank": {"latent_kv_rank": 3, "n_layer": 3, "rotary_skip_every": 2},
    "query rank, wide values": {"latent_query_rank": 9, "latent_value_dim": 20, "qk_norm": False},
    "alibi, window, softcap": {"position": "alibi", "sliding_window": 7, "attention_softcap": 5.0},
    "learned positions, biases": {"position": "learned", "bias": True, "norm": "layernorm", "latent_rope_dim": 3},
}  # fmt: skip


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("changes", LATENTS.values(), ids=LATENTS)
def test_cached_decoding_equals_one_pass(changes: dict[str, Any], fixed: bool) -> None:
    """Prompts of different lengths, single tokens, and several tokens at once, in float64."""
    model = randomised(replace(LATENT, **changes)).double()
    ids = torch.randint(61, (2, 24))
    expected = model.hidden_states(ids)
    cache = KVCache(2, 24, torch.device("cpu"), torch.float64, fixed)
    absorbed = []
    for block in model.blocks:
        plain = block.attention.absorbs
        block.attention.absorbs = lambda *sizes, plain=plain: absorbed.append(plain(*sizes)) or absorbed[-1]
    with torch.no_grad():
        found = [model.hidden_states(ids[:, :5], cache=cache, counts=[5, 3])]
        lengths = [5, 3]
        torch.testing.assert_close(found[0][0], expected[0, :5], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(found[0][1, :3], expected[1, :3], atol=1e-12, rtol=1e-12)
        for n in (1, 1, 4, 1, 1, 9, 1, 1):
            new = torch.stack([ids[row, length : length + n] for row, length in enumerate(lengths)])
            out = model.hidden_states(new, cache=cache)
            for row, length in enumerate(lengths):
                torch.testing.assert_close(out[row], expected[row, length : length + n], atol=1e-12, rtol=1e-12)
            lengths = [length + n for length in lengths]
    assert set(absorbed) == ({True} if changes.get("latent_kv_rank") == 3 else {False, True})


@given(
    queries=st.integers(1, 40), keys=st.integers(1, 40), rank=st.integers(1, 64), head=st.integers(1, 32),
    rope=st.integers(1, 16), value=st.integers(1, 32),
)  # fmt: skip
@settings(max_examples=50)
def test_absorption_takes_fewer_multiplications(
    queries: int, keys: int, rank: int, head: int, rope: int, value: int
) -> None:
    """Counted by PyTorch for the matmuls of one head."""
    from torch.utils.flop_counter import FlopCounterMode

    value = min(value, head + rope)
    config = GPTConfig(
        n_head=1, n_embd=8, head_dim=head, attention="latent", latent_kv_rank=rank, latent_rope_dim=rope,
        latent_value_dim=value, position="none",
    )  # fmt: skip
    attention = LatentAttention(config)

    def flops(product: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            product()
        return counter.get_total_flops()

    with torch.device("meta"):
        q, c, w_k, w_v = (
            torch.empty(queries, head),
            torch.empty(keys, rank),
            torch.empty(head, rank),
            torch.empty(value, rank),
        )
        q_rope, k_rope, scores = torch.empty(queries, rope), torch.empty(keys, rope), torch.empty(queries, keys)
        plain = flops(lambda: (q @ (c @ w_k.T).T, q_rope @ k_rope.T, scores @ (c @ w_v.T)))
        absorbed = flops(lambda: ((q @ w_k) @ c.T, q_rope @ k_rope.T, (scores @ c) @ w_v.T))
    assert attention.absorbs(queries, keys) == (absorbed < plain)


@pytest.mark.parametrize("changes", LATENTS.values(), ids=LATENTS)
def test_cache_stores_one_latent_and_one_shared_key_per_token(changes: dict[str, Any]) -> None:
    """(d_c + d_h^R) * l elements per token (table 1 of the DeepSeek-V2 paper), in the bytes that are allocated."""
    config = replace(LATENT, **changes)
    model, capacity = randomised(config), 24
    cache = KVCache(3, capacity, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        model.hidden_states(torch.randint(61, (3, 2)), cache=cache)
    allocated = sum(x.untyped_storage().nbytes() for layer in cache._layers for x in layer)
    per_token = (config.latent_kv_width + config.latent_rope_width) * config.n_layer
    assert allocated == 3 * capacity * per_token * 4


@pytest.mark.parametrize("config", [LATENT, GPTConfig(n_layer=2, n_head=4, n_embd=32, n_kv_head=2)])
def test_declared_shapes_are_those_in_the_cache(config: GPTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(config)
    cache = KVCache(3, 24, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        model.hidden_states(torch.randint(61, (3, 2)), cache=cache)
    for block, layer in zip(model.blocks, cache._layers, strict=True):
        assert block.attention.cache_shapes() == [(x.size(1), x.size(3)) for x in layer]
    allocated = sum(x.untyped_storage().nbytes() for layer in cache._layers for x in layer)
    monkeypatch.setattr("lit_gpt_scratch.generation.decode_loop.MAX_CACHE_BYTES", 5 * allocated // 3)
    assert max_batch_rows(model, 24) == 5


@pytest.mark.parametrize("merged", [False, True])
def test_adapters_apply_to_cached_tokens(merged: bool) -> None:
    """Whether or not they are merged; only a plain weight is absorbed."""
    model = randomised(LATENT).double()
    add_lora(model, LoRA(rank=2, pattern="kv_up|query"), seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter)
    ids = torch.randint(61, (1, 10))
    with torch.no_grad():
        expected = model.hidden_states(ids)
        if merged:
            merge_lora(model)
        cache = KVCache(1, 24, torch.device("cpu"), torch.float64)
        out = torch.cat([model.hidden_states(ids[:, t : t + 1], cache=cache) for t in range(10)], 1)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)


def test_recorded_weights_are_those_of_each_head() -> None:
    attention = drawn(LATENT)
    attention.recorded_weights = []
    position = RotaryPositions(LATENT, 5)
    layout = build_attention_layout(LATENT, position, torch.zeros(1, 5, dtype=torch.int64), None, None)
    recorded = attention(torch.randn(1, 5, 32), position, layout)
    [weights] = attention.recorded_weights
    assert weights.shape == (1, 2, 5, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 5))
    assert recorded.shape == (1, 5, 32)


def test_flops_are_those_of_the_matmuls() -> None:
    """Per token: the projections, the dot products with keys, and the sums of values."""
    block = GPT(replace(LATENT, latent_query_rank=6, latent_value_dim=10), 61, 24).blocks[0]
    query = 32 * 6 + 6 * 2 * (16 + 8)
    kv = 32 * (40 + 8) + 40 * 2 * (16 + 10)
    output = 2 * 10 * 32
    assert flops_per_token(block.attention, 24) == 2 * (query + kv + output) + 2 * 2 * 24 * (16 + 8 + 10)


def test_muon_updates_its_matrices() -> None:
    net = GPT(LATENT, 61, 24)
    groups = parameter_roles(net)
    for name, parameter in net.blocks[0].attention.named_parameters():
        assert groups[parameter] == ("vectors" if "norm" in name else "matrices")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_head": 1}, r"n_kv_head is 1, but latent attention has keys and values for each of the 2 query heads"),
        ({"value_embeddings": True}, r"value_embeddings is true, which is not supported with latent attention"),
        ({"qk_norm_joint": True}, r"qk_norm_joint is true, which is not supported with latent attention"),
        ({"attention_scale": 0.1}, r"attention_scale is 0.1, which is not supported with latent attention"),
        ({"parametrisation": "mup", "mup_base_width": 8}, r"parametrisation is mup, which has no rules for the ranks"),
        ({"latent_rope_dim": 3}, r"latent_rope_dim is 3; it must be even"),
        ({"latent_value_dim": 25}, r"latent_value_dim is 25, but the keys have only 16 \+ 8 channels"),
        ({"latent_kv_rank": 0}, r"latent_kv_rank is 0; it must be positive"),
        (
            {"attention": None},
            r"latent_kv_rank is 40, but model.gpt.attention is None; set model.gpt.attention to latent",
        ),
        ({"attention": "latnt"}, r"attention is latnt; it must be one of latent, or an import path such as my_file"),
    ],
)
def test_contradictory_settings_are_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.gpt\.{message}"):
        replace(LATENT, **changes)


def test_latent_settings_of_other_custom_attention_are_an_error() -> None:
    """A custom class is known only when the network is built."""
    config = replace(LATENT, attention="tests.custom_attention.DoubledAttention")
    with pytest.raises(UserError, match=r"latent_kv_rank is 40, but model\.gpt\.attention is tests\.custom"):
        GPT(config, 61, 24)


class Doubled(LatentAttention):
    """A custom subclass."""

    def attend(self, *args: Any) -> Tensor:
        return 2 * super().attend(*args)


def test_subclass_by_import_path() -> None:
    config = replace(LATENT, attention=f"{__name__}.Doubled")
    assert config.rotary_width == LATENT.rotary_width
    net = GPT(config, 61, 24)
    assert isinstance(net.blocks[0].attention, Attention)
    assert net(torch.zeros(1, 24, dtype=torch.int64)).shape == (1, 24, 61)
