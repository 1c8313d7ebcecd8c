"""The shipped example of a custom attention class against its formula."""

import torch

from experiments.examples.gated_attention import GatedAttention
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.attention import Attention, build_attention_layout
from lit_gpt_scratch.model.module_metadata import flops_per_token, parameter_roles
from lit_gpt_scratch.model.positions import RotaryPositions

CONFIG = GPTConfig(n_layer=1, n_head=3, n_kv_head=1, n_embd=24, attention=f"{GatedAttention.__module__}.GatedAttention")


def test_channels_of_heads_are_gated_by_the_input() -> None:
    gated, plain = GatedAttention(CONFIG), Attention(CONFIG)
    plain.load_state_dict({name: weight for name, weight in gated.state_dict().items() if name != "gate.weight"})
    position = RotaryPositions(CONFIG, 9)
    layout = build_attention_layout(CONFIG, position, torch.zeros(2, 9, dtype=torch.int64), None, None)
    heads: list[torch.Tensor] = []
    plain.output.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0]))
    x = torch.randn(2, 9, 24)
    plain(x, position, layout)
    gate = 1 / (1 + torch.exp(-x @ gated.gate.weight.T))
    torch.testing.assert_close(gated(x, position, layout), (heads[0] * gate) @ gated.output.weight.T)


def test_gate_is_initialised_counted_and_updated_like_other_matrices() -> None:
    net, plain = GPT(CONFIG, 50, 9), GPT(GPTConfig(n_layer=1, n_head=3, n_kv_head=1, n_embd=24), 50, 9)
    gate = net.get_parameter("blocks.0.attention.gate.weight")
    assert 0.5 * 24**-0.5 < gate.std().item() < 2 * 24**-0.5
    assert parameter_roles(net)[gate] == "matrices"
    assert flops_per_token(net, 9) == flops_per_token(plain, 9) + 2 * gate.numel()
