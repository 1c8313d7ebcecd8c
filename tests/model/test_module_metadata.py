"""Declarations of modules: FLOPs and optimizer groups by default, declared, and inherited."""

from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.attention_registry import ATTENTIONS
from lit_gpt_scratch.model.feed_forward import FEED_FORWARDS
from lit_gpt_scratch.model.module_metadata import OptimizerGroup, flops_per_token, parameter_roles
from lit_gpt_scratch.model.moe import Router


class Experts(nn.Module):
    """Two stacked experts, of which a token uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(2, 4, 4))
        self.router = nn.Linear(4, 2)

    def flops_per_token(self, context: int) -> int:
        """The router and one expert."""
        return 2 * (4 * 2 + 4 * 4)


class Layer(nn.Module):
    """A block of a module that declares its FLOPs, and one that declares its optimizer group."""

    optimizer_group: ClassVar[OptimizerGroup] = "matrices"

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.linear = nn.Linear(4, 4)
        self.table = Table(3, 4)


class Table(nn.Embedding):
    """An embedding within a block."""

    optimizer_group: ClassVar[OptimizerGroup] = "tables"


def test_declared_flops_replace_those_of_the_children() -> None:
    net = nn.Sequential(nn.Linear(4, 4), Layer())
    assert flops_per_token(net, 100) == 2 * 16 + 2 * 16 + 2 * 24


def test_optimizer_groups_are_inherited_and_overridden() -> None:
    net = nn.Sequential(nn.Linear(4, 4), Layer())
    names = {parameter: name for name, parameter in net.named_parameters()}
    assert {names[parameter]: group for parameter, group in parameter_roles(net).items()} == {
        "0.weight": "readouts",
        "0.bias": "vectors",
        "1.experts.experts": "tables",
        "1.experts.router.weight": "matrices",
        "1.experts.router.bias": "vectors",
        "1.linear.weight": "matrices",
        "1.linear.bias": "vectors",
        "1.table.weight": "tables",
    }


@pytest.mark.parametrize(
    "changes",
    [
        *({"feed_forward": name} for name in FEED_FORWARDS),
        *({"attention": name} for name in ATTENTIONS),
        {"attention": "latent", "latent_query_rank": 8},
    ],
)
def test_tensor_parallel_plans_cover_every_linear_layer_of_a_block(changes: dict[str, Any]) -> None:
    block = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, **changes), 50, 8).blocks[0]
    replicated = Router  # needs no communication
    linears = {
        name
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, replicated)
    }
    planned = {
        f"{part}.{name}"
        for part, module in block.named_children()
        for name in getattr(module, "tensor_parallel_plan", {})
    }
    assert linears <= planned
