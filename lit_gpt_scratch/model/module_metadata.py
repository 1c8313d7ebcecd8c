"""Metadata that modules declare about themselves, so that other code does not have to list modules by name.

For example, a new type of feed-forward network only has to be added to ``FEED_FORWARDS``. Unless stated otherwise, the
following attributes and methods of an ``nn.Module`` are optional.

``tensor_parallel_plan: ClassVar[dict[str, str]]``
    Tensor-parallel style of each child module, keyed by the child's name, for ``distributed.parallelize``. Names may
    contain wildcards, and children that do not exist are skipped. The inputs of a module with a plan must be the same
    on all processes. The styles are ``colwise`` (output channels are split), ``rowwise`` (input channels are split and
    outputs are summed), ``colwise_gather`` (output channels are split and then gathered), ``embedding`` (rows are split
    and outputs are summed), ``experts`` (see ``distributed.parallelize.ExpertParallel``), ``headwise`` (dimension 0 of
    all parameters, which has an element per head, is split; the child uses only its local elements) and ``replicated``
    (each process holds all parameters, applies them to its own heads or computes what its own heads use, and gradients
    are summed). A module without a plan is replicated and requires no communication.

``flops_per_token(context: int) -> int``
    Returns the number of floating-point operations (FLOPs) per token in the forward pass of the module and its
    children, if each token attends to ``context`` tokens. The default is the sum over the children, with two FLOPs per
    weight of a linear layer.

``inactive_parameters() -> int``
    Returns the number of weights in the module and its children that a token does not use, such as those of the experts
    that the router does not choose. The default is the sum over the children.

``init_weights(sampler: WeightSampler) -> None``
    Initializes the parameters that do not belong to an ``nn.Linear``, drawing random values from ``sampler``. Without
    this method, they keep the values set by the constructor. A sharded model requires it, because it is built without
    memory. The method is called before ``config.initialisation`` is applied to the linear layers.

``init_buffers() -> None``
    Computes and registers the module's buffers. The constructor calls it, and so does ``GPT.materialize``. A sharded
    model requires it for modules with buffers.

``residual_outputs() -> list[nn.Linear]``
    Returns the linear layers whose outputs are added to the residual stream. Some initialization schemes set their
    weights to smaller values or to zero. This method is required for the attention and feed-forward modules of a block.

``optimizer_group: ClassVar[OptimizerGroup | dict[str, OptimizerGroup]]``
    Optimizer group of the 2-D parameters in the module and its children, unless a child declares another group:
    ``matrices`` (maps between hidden layers, which Muon can update), ``tables`` (one vector per token or position; the
    default) or ``readouts`` (maps from a hidden layer to a number of outputs that does not depend on the width, such as
    logits or gates; the default for an ``nn.Linear`` outside the blocks). A dict declares the groups of some of the
    module's own parameters by name, and leaves the other parameters and the children unchanged. Parameters with fewer
    dimensions always belong to ``vectors``, and parameters with more dimensions to ``tables``, unless the declared
    group is ``stacked_matrices``: they are then matrices that are stacked along the first dimensions, such as those of
    experts, and belong to ``matrices``, and 2-D parameters are stacked vectors, which belong to ``vectors``.

``width_multiplier: float``
    Declared by a whole network: the width relative to the network for which its hyperparameters were tuned.
"""

from collections.abc import Iterator
from typing import Literal

from torch import nn

OptimizerGroup = Literal["matrices", "stacked_matrices", "tables", "readouts"]
"""Optimizer groups that a module can declare."""
ParameterRole = Literal["matrices", "tables", "readouts", "vectors"]
"""Roles of parameters, which follow from the declared groups and the numbers of dimensions."""


def linear_flops_per_token(module: nn.Module) -> int:
    """Return the number of FLOPs per token in the forward pass of all linear layers inside a module."""
    return sum(2 * layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def flops_per_token(module: nn.Module, context: int) -> int:
    """Return the number of FLOPs per token in a module's forward pass if each token attends to ``context`` tokens."""
    if (declared := getattr(module, "flops_per_token", None)) is not None:
        flops: int = declared(context)
        return flops
    own = 2 * module.weight.numel() if isinstance(module, nn.Linear) else 0
    return own + sum(flops_per_token(child, context) for child in module.children())


def inactive_parameters(module: nn.Module) -> int:
    """Return the number of weights in a module that a token does not use."""
    if (declared := getattr(module, "inactive_parameters", None)) is not None:
        inactive: int = declared()
        return inactive
    return sum(inactive_parameters(child) for child in module.children())


def parameter_roles(module: nn.Module) -> dict[nn.Parameter, ParameterRole]:
    """Return the role of each parameter of a module; the first declaration for a shared parameter counts."""
    roles: dict[nn.Parameter, ParameterRole] = {}
    for parameter, role in _declared_roles(module, None):
        roles.setdefault(parameter, role)
    return roles


def _declared_roles(
    module: nn.Module, inherited: OptimizerGroup | None
) -> Iterator[tuple[nn.Parameter, ParameterRole]]:
    declared: OptimizerGroup | dict[str, OptimizerGroup] | None = getattr(module, "optimizer_group", inherited)
    by_name, group = (declared, inherited) if isinstance(declared, dict) else ({}, declared)
    default: OptimizerGroup = group or ("readouts" if isinstance(module, nn.Linear) else "tables")
    for name, parameter in module.named_parameters(recurse=False):
        own = by_name.get(name, default)
        if parameter.ndim < (3 if own == "stacked_matrices" else 2):
            yield parameter, "vectors"
        elif own == "stacked_matrices":
            yield parameter, "matrices"
        else:
            yield parameter, own if parameter.ndim == 2 else "tables"
    for child in module.children():
        yield from _declared_roles(child, group)


def width_multiplier(module: nn.Module) -> float:
    """Return the ``width_multiplier`` that a module or one of the modules inside it declares, or 1."""
    for declaring in module.modules():
        if (declared := getattr(declaring, "width_multiplier", None)) is not None:
            return float(declared)
    return 1.0
