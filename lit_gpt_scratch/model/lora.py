"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685) for the linear layers of any network.

A linear layer ``W x`` becomes ``W x + alpha / rank * B A x``, where A has ``rank`` rows, B has ``rank`` columns, and
only A and B are trained. B is initialized to zero, so that training starts from the unchanged network.

The parameters of the base model remain the same objects under the same names, so that its checkpoints can still be
loaded and tied embeddings remain tied. Each adapter adds two parameters to its linear layer.
"""

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Final

import regex
import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.kernels.onednn_linear import LINEAR_CLASSES, linear
from lit_gpt_scratch.model.module_metadata import OptimizerGroup
from lit_gpt_scratch.model.weight_sampler import WeightSampler, draw_seed

MAX_RANK: Final = 2**13
"""Maximum rank of an adapter: the full rank of the matrices in the largest models that can be adapted."""
ADAPTER_SUFFIXES: Final = (".lora_a", ".lora_b")
"""Suffixes of adapter parameter names."""
PATTERN_SECONDS: Final = 1
"""Time limit in seconds for matching a pattern, which may come from a file, against all layer names."""
MIN_TIMEOUT: Final = 1e-6
"""Timeout in seconds for matching a name once the time limit has been reached; ``regex`` does not accept 0."""


@dataclass(frozen=True)
class LoRA:
    r"""Hyperparameters of LoRA adapters, and a pattern that selects the layers to adapt.

    Args:
        rank: Rank of the adapters: the number of rows of A and of columns of B.
        alpha: Scale of the adapters. Their output is multiplied by ``alpha / rank``, so that the same learning rate can
            be used with different ranks.
        dropout: Dropout probability for the inputs of the adapters in training; 0 disables dropout.
        pattern: Regular expression that selects the linear layers to adapt, such as ``attention\.(query|value)$``. It
            may match any part of a layer's full name. By default, all linear layers in the blocks are adapted.

    Raises:
        UserError: A value is out of range, or the pattern is not a valid regular expression.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    pattern: str = r"(^|\.)blocks\."

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("alpha", self.alpha)):
            if not 0 < value < math.inf:
                raise UserError(f"lora.{name} is {value}; it must be positive and finite")
        if self.rank > MAX_RANK:
            raise UserError(f"lora.rank is {self.rank}; it must be at most {MAX_RANK}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"lora.dropout is {self.dropout}; it must be at least 0 and below 1")
        try:
            regex.compile(self.pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            raise UserError(
                f"lora.pattern is {self.pattern}, which is not a valid regular expression ({error}); correct it"
            ) from error


class LoRALinear(nn.Linear):
    """Linear layer with a LoRA adapter.

    The state dict is the same whether or not the adapter is merged, so that loading never adds the adapter twice.

    Args:
        base: Linear layer to replace; its weight and bias are shared and frozen.
        settings: Rank, scale and dropout of the adapter.

    Attributes:
        lora_a: Low-rank factor of shape (rank, in_features), in at least float32, because bfloat16 cannot represent the
            small updates of fine-tuning.
        lora_b: Low-rank factor of shape (out_features, rank), in at least float32.
        unmerged: The original weight while the adapter is merged into ``weight``; otherwise None.
        enabled: Whether the adapter is applied.
    """

    optimizer_group: ClassVar[dict[str, OptimizerGroup]] = {"lora_a": "readouts", "lora_b": "tables"}
    unmerged: Tensor | None

    def __init__(self, base: nn.Linear, settings: LoRA) -> None:
        # On the meta device, because the weight created here is replaced with that of the base layer.
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.base_class = type(base)
        self.weight, self.bias = base.weight, base.bias
        self.requires_grad_(False)
        self.register_parameter("unmerged", None)
        self.scaling = settings.alpha / settings.rank
        self.dropout = nn.Dropout(settings.dropout) if settings.dropout else nn.Identity()
        self.enabled = True
        exact, device = torch.promote_types(base.weight.dtype, torch.float32), base.weight.device
        self.lora_a = nn.Parameter(torch.empty(settings.rank, base.in_features, dtype=exact, device=device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, settings.rank, dtype=exact, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.train(base.training)

    def init_weights(self, sampler: WeightSampler) -> None:
        """Initialize A from a uniform distribution and B to zero, as the constructor, the authors' code and peft do."""
        sampler.uniform_(self.lora_a, 1 / math.sqrt(self.in_features))
        nn.init.zeros_(self.lora_b)

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer and, unless it is disabled, its adapter: (..., in_features) -> (..., out_features)."""
        if self.unmerged is not None:
            return linear(input, self.weight if self.enabled else self.unmerged, self.bias)
        out = linear(input, self.weight, self.bias)
        if self.enabled:
            x = self.dropout(input.to(self.lora_a.dtype))  # (..., in_features)
            delta = linear(linear(x, self.lora_a), self.lora_b)  # (..., out_features)
            out = (out + delta * self.scaling).type_as(out)
        return out

    @torch.no_grad()
    def merge(self) -> None:
        """Merge the adapter into a new weight tensor, and keep the original weight for ``unmerge``.

        Adding ``B A`` in place and subtracting it later would leave rounding errors. It would also change other layers
        that share the weight.
        """
        if self.unmerged is not None:
            return
        self.unmerged = self.weight
        merged = merged_weight(self.weight, self.lora_a, self.lora_b, self.scaling)
        self.weight = nn.Parameter(merged.type_as(self.unmerged), requires_grad=False)

    def unmerge(self) -> None:
        """Restore the original weight exactly, as the same parameter object."""
        if self.unmerged is not None:
            self.weight, self.unmerged = self.unmerged, None

    def to_linear(self) -> nn.Linear:
        """Return a linear layer of the original class with the current weight and bias."""
        plain = self.base_class(self.in_features, self.out_features, bias=False, device="meta").train(self.training)
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


@torch.no_grad()
def merged_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return the weight of a layer with its adapter, in at least float32: (out_features, in_features)."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    delta = lora_b.to(exact) @ lora_a.to(exact) * scaling  # (out_features, in_features)
    return weight.to(exact) + delta


def adapter_names(weight: str) -> tuple[str, str]:
    """Return the names of the factors A and B of the adapter of a weight, whether or not it has one."""
    layer = weight.removesuffix("weight")
    return f"{layer}lora_a", f"{layer}lora_b"


def match_layers(pattern: str, names: list[str]) -> set[str]:
    """Return the layer names that contain a match of a pattern.

    Raises:
        UserError: Matching takes too long, because the pattern backtracks.
    """
    deadline = time.monotonic() + PATTERN_SECONDS
    compiled = regex.compile(pattern)
    try:
        return {n for n in names if compiled.search(n, timeout=max(deadline - time.monotonic(), MIN_TIMEOUT))}
    except TimeoutError as error:
        raise UserError(
            f"lora.pattern is {pattern[:100]}, which takes over {PATTERN_SECONDS} s to match; simplify it"
        ) from error


@torch.no_grad()
def add_lora(net: nn.Module, settings: LoRA, seed: int | None = None) -> list[str]:
    """Add adapters to the linear layers whose names match ``settings.pattern``, and freeze all other parameters.

    Args:
        net: Any network; modified in place. Linear layers of classes not in ``LINEAR_CLASSES`` are skipped, because
            their ``forward`` may differ.
        settings: Hyperparameters of the adapters and the pattern that selects the layers.
        seed: Random seed of the initial adapters; by default drawn from torch's global generator.

    Returns:
        The names of the adapted layers.

    Raises:
        UserError: The pattern matches no linear layer, or the network already has adapters.
    """
    if any(True for _ in _lora_layers(net)):
        raise UserError("the network already has LoRA adapters; call remove_lora first")
    linears = [(name, m) for name, m in net.named_modules(remove_duplicate=False) if type(m) in LINEAR_CLASSES and name]
    matching = match_layers(settings.pattern, [name for name, _ in linears])
    chosen = [(name, layer) for name, layer in linears if name in matching]
    if not chosen:
        examples = dict.fromkeys(re.sub(r"\d+", "0", name) for name, _ in linears)  # names from the first block only
        there = f"choose among {', '.join(list(examples)[:10])}" if examples else "the network has no linear layers"
        raise UserError(f"lora.pattern is {settings.pattern}, which does not match any linear layer; {there}")
    net.requires_grad_(False)
    adapted = {layer: LoRALinear(layer, settings) for layer in dict.fromkeys(layer for _, layer in chosen)}
    for name, layer in chosen:
        net.set_submodule(name, adapted[layer])
    sampler = WeightSampler(net, draw_seed() if seed is None else seed)
    for layer in adapted.values():
        if not layer.lora_a.is_meta:
            layer.init_weights(sampler)
    return [name for name, _ in chosen]


@contextmanager
def disable_lora(net: nn.Module) -> Iterator[None]:
    """Temporarily disable all adapters, merged or not, so that the network is identical to its base model.

    A single network in memory can thus serve as both the policy and the reference model.
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
    """Merge all adapters into the weights, so that they add no cost to the forward pass.

    Until ``unmerge_lora`` or ``remove_lora`` is called, the adapted weights require twice the memory and the adapters
    cannot be trained. Tied embeddings are untied while the adapter of the head is merged.
    """
    for _, layer in _lora_layers(net):
        layer.merge()


def unmerge_lora(net: nn.Module) -> None:
    """Undo ``merge_lora`` and restore the original weights exactly."""
    for _, layer in _lora_layers(net):
        layer.unmerge()


def remove_lora(net: nn.Module) -> None:
    """Replace each ``LoRALinear`` with a plain linear layer that has its current weight.

    Adapters that have not been merged are discarded. Parameters remain frozen; call ``net.requires_grad_(True)`` to
    unfreeze them.

    Raises:
        UserError: A layer with a merged adapter shares its original weight with another layer, as with tied embeddings.
            A checkpoint of the network would then contain two matrices, although its config specifies only one.
    """
    plain = {}
    for name, layer in _lora_layers(net):
        for other, module in net.named_modules():
            if module is not layer and any(mine is layer.unmerged for mine in module.parameters(recurse=False)):
                raise UserError(
                    f"the adapter of {name} is merged, but its original weight is shared with {other} and must not "
                    f"change; exclude {name} from lora.pattern, untie the weights, or do not merge the adapter"
                )
        plain[layer] = layer.to_linear()
    for name, module in list(net.named_modules(remove_duplicate=False)):
        if isinstance(module, LoRALinear):
            net.set_submodule(name, plain[module])


def lora_state_dict(net: nn.Module) -> dict[str, Tensor]:
    """Return a state dict that contains only the adapters."""
    parts = {f"{name}.{part}" for name, _ in _lora_layers(net) for part in ("lora_a", "lora_b")}
    return {name: value for name, value in net.state_dict().items() if name in parts}


def load_lora_state_dict(net: nn.Module, state: dict[str, Tensor]) -> None:
    """Load adapters from a state dict created by ``lora_state_dict``; merged adapters are unmerged first.

    Raises:
        UserError: The adapters in the state dict belong to different layers or have different shapes than those in the
            network.
    """
    current = lora_state_dict(net)
    for name in sorted(current.keys() | state.keys()):
        expected, found = (tuple(part[name].shape) if name in part else "missing" for part in (current, state))
        if expected != found:
            raise UserError(
                f"the adapters do not match the network: the shape of {name} is {found} in the state dict, but "
                f"{expected} in the network; use the same lora.rank and lora.pattern"
            )
    unmerge_lora(net)
    net.load_state_dict(state, strict=False)


def _lora_layers(net: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    for name, module in net.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module
