"""Assign parameters to optimizer groups."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lit_gpt_scratch.model.module_metadata import ParameterRole, parameter_roles, width_multiplier


@dataclass(frozen=True)
class ParameterGroups:
    """Trainable parameters of a network, grouped by their role.

    Attributes:
        matrices: Weight matrices of the hidden layers, and stacks of them.
        tables: Embeddings and readouts such as the output head, with one vector per token, class or position;
            parameters with more than two dimensions; and LoRA factors, because only their product is a map between
            hidden layers.
        vectors: Gains and biases.
    """

    matrices: list[nn.Parameter]
    tables: list[nn.Parameter]
    vectors: list[nn.Parameter]


def parameter_groups(model: nn.Module) -> ParameterGroups:
    """Group the trainable parameters of a model as declared by its modules (see ``model.module_metadata``).

    Parameters are in the order of ``model.named_parameters()``; a shared parameter is listed once.
    """
    role_of = parameter_roles(model)
    groups = ParameterGroups([], [], [])
    lists = {"matrices": groups.matrices, "tables": groups.tables, "readouts": groups.tables, "vectors": groups.vectors}
    for parameter in model.parameters():
        if parameter.requires_grad:
            lists[role_of[parameter]].append(parameter)
    return groups


def split_by_width(model: nn.Module, group: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Split a parameter group of ``MuonAdamW`` by how its hyperparameters depend on the width of the model (mup).

    A group is not split in the standard parametrization, nor at the base width. Neither is one with the rule ``muon``:
    the spectral norm of its updates, lr * sqrt(rows / columns), already changes a layer's outputs by the same factor at
    each width (https://arxiv.org/abs/2310.17813). For AdamW, see ``adamw_scales``; the product of learning rate and
    weight decay, by which weights shrink in each step, does not change.

    Yields:
        Parameter groups, each with ``lr_scale``, by which the configured learning rate was multiplied.
    """
    multiplier = width_multiplier(model)
    if multiplier == 1 or group["rule"] == "muon":
        yield group
        return
    role_of = parameter_roles(model)
    for role in dict.fromkeys(role_of[parameter] for parameter in group["params"]):
        lr_scale, eps_scale = adamw_scales(role, multiplier)
        yield {
            **group,
            "name": role,
            "params": [parameter for parameter in group["params"] if role_of[parameter] == role],
            "lr": group["lr"] * lr_scale,
            "lr_scale": lr_scale,
            "weight_decay": group["weight_decay"] / lr_scale,
            "eps": group["eps"] * eps_scale,
        }


def adamw_scales(role: ParameterRole, width_multiplier: float) -> tuple[float, float]:
    """Return the factors by which mup multiplies the learning rate and the epsilon of AdamW.

    AdamW changes each weight by about the learning rate. If a layer has m times as many inputs, the changes of its
    outputs add up to m times as much, so matrices and readouts, whose number of inputs grows with the width, have a
    learning rate of 1 / m (https://arxiv.org/abs/2203.03466, table 3). The gradients of hidden channels, and therefore
    those of all weights but the readouts, are proportional to 1 / m, and so is epsilon (https://arxiv.org/abs/2505.01618).
    """
    lr_scale = 1 / width_multiplier if role in ("matrices", "readouts") else 1.0
    eps_scale = 1.0 if role == "readouts" else 1 / width_multiplier
    return lr_scale, eps_scale
