"""Assign parameters to optimizer groups."""

from dataclasses import dataclass

from torch import nn

from lit_gpt_scratch.model.module_metadata import optimizer_groups


@dataclass(frozen=True)
class ParameterGroups:
    """Trainable parameters of a network, grouped by their role.

    Attributes:
        matrices: Weight matrices of the hidden layers, and stacks of them.
        tables: Embeddings and output heads, with one vector per token, class or position; parameters with more than two
            dimensions; and LoRA factors, because only their product is a map between hidden layers.
        vectors: Gains and biases.
    """

    matrices: list[nn.Parameter]
    tables: list[nn.Parameter]
    vectors: list[nn.Parameter]


def parameter_groups(model: nn.Module) -> ParameterGroups:
    """Group the trainable parameters of a model as declared by its modules (see ``model.module_metadata``).

    Parameters are in the order of ``model.named_parameters()``; a shared parameter is listed once.
    """
    group_of = dict(optimizer_groups(model))
    groups = ParameterGroups([], [], [])
    for parameter in model.parameters():
        if parameter.requires_grad:
            getattr(groups, group_of[parameter]).append(parameter)
    return groups
