"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685), put into a network that knows nothing of them.

A linear layer's ``W x`` becomes ``W x + alpha / rank * B A x``, where A has ``rank`` rows and B as many columns, and
nothing but A and B is trained. B begins at zero, so that training begins at the network as it was.

The base's parameters stay the same objects under the same names: its checkpoints still fit, an embedding that is tied
to the head stays tied, and the adapters are two names more beside each weight.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.kernels.onednn_linear import LINEAR_CLASSES, linear
from lit_gpt_scratch.model.module_metadata import OptimizerGroup


@dataclass(frozen=True)
class LoRA:
    r"""Which layers get adapters, and of what size.

    Args:
        rank: Rows of A and columns of B.
        alpha: What they add is multiplied by ``alpha / rank``, so that another rank needs no other learning rate.
        dropout: Probability of zeroing a channel of what A reads, in training.
        pattern: A regular expression that is searched for in the full names of linear layers, such as
            ``attention\.(query|value)$``; by default all linear layers in blocks.

    Raises:
        UserError: A number is out of its range, or the pattern is no regular expression.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    pattern: str = r"(^|\.)blocks\."

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("alpha", self.alpha)):
            if not 0 < value < math.inf:
                raise UserError(f"lora.{name} is {value}; it must be positive")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"lora.dropout is {self.dropout}; it must be at least 0 and below 1")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"lora.pattern is {self.pattern}, which is no regular expression: {error}") from error


class LoRALinear(nn.Linear):
    """A linear layer with an adapter beside its weight.

    A state dict of it is the same whether the adapter is merged or not, so that loading one never counts it twice.

    Args:
        base: The layer that it stands in for; weight and bias are shared with it, and frozen.
        settings: Of the adapter.

    Attributes:
        lora_a: (rank, in_features), in at least float32: steps of fine-tuning are too small for bfloat16 to keep.
        lora_b: (out_features, rank), likewise.
        unmerged: The weight as it was, while the adapter is merged into ``weight``.
        enabled: Whether the adapter counts.
    """

    optimizer_group: ClassVar[OptimizerGroup] = "tables"
    unmerged: Tensor | None

    def __init__(self, base: nn.Linear, settings: LoRA) -> None:
        # The layer's own weight would be drawn and thrown away; on this device it is not.
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.kind = type(base)
        self.weight, self.bias = base.weight, base.bias
        self.requires_grad_(False)
        self.register_parameter("unmerged", None)
        self.scaling = settings.alpha / settings.rank
        self.dropout = nn.Dropout(settings.dropout) if settings.dropout else nn.Identity()
        self.enabled = True
        exact, device = torch.promote_types(base.weight.dtype, torch.float32), base.weight.device
        self.lora_a = nn.Parameter(torch.empty(settings.rank, base.in_features, dtype=exact, device=device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, settings.rank, dtype=exact, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as the authors' code and peft draw it
        self.train(base.training)

    @override
    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in_features) -> (..., out_features)."""
        if self.unmerged is not None:
            return linear(input, self.weight if self.enabled else self.unmerged, self.bias)
        out = linear(input, self.weight, self.bias)
        if self.enabled:
            read = self.dropout(input.to(self.lora_a.dtype))  # (..., in_features)
            added = linear(linear(read, self.lora_a), self.lora_b)  # (..., out_features)
            out = (out + added * self.scaling).type_as(out)
        return out

    @torch.no_grad()
    def merge(self) -> None:
        """Put the adapter into ``weight``, which becomes another tensor; the old one is kept for ``unmerge``.

        Were the product added and subtracted again in place, rounding would leave its marks, and a weight that another
        layer shares would change there as well.
        """
        if self.unmerged is not None:
            return
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        added = self.lora_b.to(exact) @ self.lora_a.to(exact) * self.scaling  # (out_features, in_features)
        self.unmerged = self.weight
        self.weight = nn.Parameter((self.weight.to(exact) + added).type_as(self.weight), requires_grad=False)

    def unmerge(self) -> None:
        """Put the weight back that was there before ``merge``: the same parameter, bit for bit."""
        if self.unmerged is not None:
            self.weight, self.unmerged = self.unmerged, None

    def plain(self) -> nn.Linear:
        """A layer like the one it stands in for, with the weight and bias that this one has now."""
        plain = self.kind(self.in_features, self.out_features, bias=False, device="meta").train(self.training)
        plain.weight, plain.bias = self.weight, self.bias
        return plain

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={len(self.lora_a)}, scaling={self.scaling}"

    @override
    def _save_to_state_dict(self, destination: dict[str, object], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.unmerged is not None:
            destination[f"{prefix}weight"] = destination.pop(f"{prefix}unmerged")

    @override
    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)


def add_lora(net: nn.Module, settings: LoRA) -> list[str]:
    """Give adapters to the layers that the pattern matches, and freeze all else.

    Args:
        net: Any network; it is changed. What else inherits from ``nn.Linear`` is left alone: it may be used otherwise.
        settings: Which layers, and how.

    Returns:
        The names of the layers.

    Raises:
        UserError: The pattern matches no linear layer, or the network has adapters already.
    """
    if any(True for _ in _lora_layers(net)):
        raise UserError("the network has LoRA adapters already; remove them first")
    linears = [(name, m) for name, m in net.named_modules(remove_duplicate=False) if type(m) in LINEAR_CLASSES and name]
    chosen = [(name, layer) for name, layer in linears if re.search(settings.pattern, name)]
    if not chosen:
        alike = dict.fromkeys(re.sub(r"\d+", "0", name) for name, _ in linears)  # one block speaks for all
        there = f"there are, for example, {', '.join(list(alike)[:10])}" if alike else "there is none at all"
        raise UserError(f"lora.pattern is {settings.pattern}, which matches no linear layer; {there}")
    net.requires_grad_(False)
    made = {layer: LoRALinear(layer, settings) for layer in dict.fromkeys(layer for _, layer in chosen)}
    for name, layer in chosen:
        net.set_submodule(name, made[layer])
    return [name for name, _ in chosen]


@contextmanager
def disable_lora(net: nn.Module) -> Iterator[None]:
    """Switch all adapters off meanwhile, merged or not: the network is then its base, bit for bit.

    So one network in memory is both the policy that is trained and the reference that it is held to.
    """
    before = [(layer, layer.enabled) for _, layer in _lora_layers(net)]
    try:
        for layer, _ in before:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in before:
            layer.enabled = enabled


def merge_lora(net: nn.Module) -> None:
    """Put all adapters into the weights, so that a forward pass costs what it does without them.

    It takes the memory of the adapted weights once more until ``unmerge_lora`` or ``remove_lora``, and merged adapters
    cannot be trained. A head that shares the embedding's matrix has one of its own meanwhile, and the embedding its.
    """
    for _, layer in _lora_layers(net):
        layer.merge()


def unmerge_lora(net: nn.Module) -> None:
    """Take all adapters out of the weights again, exactly."""
    for _, layer in _lora_layers(net):
        layer.unmerge()


def remove_lora(net: nn.Module) -> None:
    """Put plain linear layers back: with the adapters in their weights if they are merged, else as the base has them.

    Parameters stay frozen; ``net.requires_grad_(True)`` thaws them.

    Raises:
        UserError: A merged matrix was shared with another layer, such as a head with the embedding. What is saved of
            the network would hold two matrices where its config says one.
    """
    made = {}
    for name, layer in _lora_layers(net):
        for other, module in net.named_modules():
            if module is not layer and any(mine is layer.unmerged for mine in module.parameters(recurse=False)):
                raise UserError(
                    f"the adapter of {name} is merged, but the matrix is also that of {other}, which must not change; "
                    f"leave {name} out of lora.pattern, untie the two, or keep the adapter apart"
                )
        made[layer] = layer.plain()
    for name, module in list(net.named_modules(remove_duplicate=False)):
        if isinstance(module, LoRALinear):
            net.set_submodule(name, made[module])


def lora_state_dict(net: nn.Module) -> dict[str, Tensor]:
    """The adapters' part of the network's state dict."""
    parts = {f"{name}.{part}" for name, _ in _lora_layers(net) for part in ("lora_a", "lora_b")}
    return {name: value for name, value in net.state_dict().items() if name in parts}


def load_lora_state_dict(net: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what ``lora_state_dict`` gave; merged adapters are taken out of the weights first.

    Raises:
        UserError: The network's adapters are in other layers or of other sizes.
    """
    mine = lora_state_dict(net)
    for name in sorted(mine.keys() | state.keys()):
        here, there = (tuple(part[name].shape) if name in part else "missing" for part in (mine, state))
        if here != there:
            raise UserError(f"the adapters do not fit: {name} is {there} in what is loaded, and {here} in the network")
    unmerge_lora(net)
    net.load_state_dict(state, strict=False)


def _lora_layers(net: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    for name, module in net.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module
