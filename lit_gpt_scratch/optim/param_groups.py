"""Which parameter gets which treatment."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ParameterGroups:
    """The trainable parameters of a transformer, by what they do.

    Attributes:
        matrices: Weights between hidden layers: maps from vectors to vectors.
        tables: Embeddings and the output head: one vector a token or position; and what has more dimensions than two;
            and LoRA's factors, since only their product is a map between hidden layers.
        vectors: Gains and biases.
    """

    matrices: list[nn.Parameter]
    tables: list[nn.Parameter]
    vectors: list[nn.Parameter]


def parameter_groups(model: nn.Module) -> ParameterGroups:
    """Sort by shape and place: what has no rows is a vector, what has rows and columns and lies in a block is a matrix.

    A parameter that is shared between modules is listed once.
    """
    groups = ParameterGroups([], [], [])
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            groups.vectors.append(parameter)
        elif parameter.ndim == 2 and "blocks" in name.split(".") and not name.endswith((".lora_a", ".lora_b")):
            groups.matrices.append(parameter)
        else:
            groups.tables.append(parameter)
    return groups
