"""What a module of the network declares about itself, so that no other file has to list modules by name.

All declarations are optional attributes or methods of an ``nn.Module``; a new kind of attention or feed-forward module
(say, a mixture of experts) needs no entry anywhere but in the table that ``GPTConfig`` chooses from.

``tensor_parallel_plan: ClassVar[dict[str, str]]``
    How ``distributed.parallelize`` splits each child over the tensor-parallel processes, by the child's name; names may
    contain wildcards, and children that do not exist are skipped. The inputs of a module with a plan are the same on
    all processes. Styles: ``colwise`` (output channels are split), ``rowwise`` (input channels are split, outputs
    summed), ``colwise_gather`` (split output channels, gathered afterwards), ``embedding`` (split rows, outputs
    summed) and ``replicated`` (every process has all of it and applies it to its own heads, so gradients are summed).
    Without a plan a module is replicated and needs no communication.

``flops_per_token(context: int) -> int``
    Forward-pass floating-point operations of one token among ``context`` tokens, children included. By default two per
    weight of every linear layer inside the module.

``init_weights() -> None``
    Initialises the parameters that are neither weights nor biases of ``nn.Linear``; by default they stay as
    constructed. Called before the scheme of ``config.initialisation`` draws the linear layers.

``residual_outputs() -> list[nn.Linear]``
    Linear layers whose outputs are added to the residual stream, which some initialisation schemes draw smaller or set
    to zero. Required of the attention and feed-forward module of a block.

``optimizer_group: ClassVar[OptimizerGroup]``
    Treatment of the 2-D parameters in the module and its children, unless a child declares another: ``matrices`` maps
    hidden layers to hidden layers (for Muon), ``tables`` (the default) has one vector per token, class or position.
    Parameters with fewer dimensions are ``vectors``, and with more ``tables``.
"""

from collections.abc import Iterator
from typing import Literal

from torch import nn

OptimizerGroup = Literal["matrices", "tables", "vectors"]


def linear_flops_per_token(module: nn.Module) -> int:
    """Forward-pass floating-point operations per token of all linear layers inside a module."""
    return sum(2 * layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def flops_per_token(module: nn.Module, context: int) -> int:
    """Forward-pass floating-point operations of one token among ``context`` tokens."""
    if (declared := getattr(module, "flops_per_token", None)) is not None:
        flops: int = declared(context)
        return flops
    own = 2 * module.weight.numel() if isinstance(module, nn.Linear) else 0
    return own + sum(flops_per_token(child, context) for child in module.children())


def optimizer_groups(module: nn.Module, inherited: OptimizerGroup = "tables") -> Iterator[tuple[nn.Parameter, str]]:
    """Each parameter of a module with its optimizer group; a parameter that modules share occurs several times."""
    declared: OptimizerGroup = getattr(module, "optimizer_group", inherited)
    for parameter in module.parameters(recurse=False):
        yield parameter, "vectors" if parameter.ndim < 2 else "tables" if parameter.ndim > 2 else declared
    for child in module.children():
        yield from optimizer_groups(child, declared)
