"""An exponential moving average of the weights.

It lives in the optimizer's state of each parameter, beside the moments, so that whatever saves, shards and reshards
those does the same to it. To use it, weights and averages change places. In a checkpoint they have changed places too:
who reads the weights of one reads averages, and needs not know.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.optimizer import Optimizer

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.optim.dtensor import to_local

EMA_STATE_KEY: Final = "average"
"""What the optimizer's state of a parameter calls it."""
EMA_CHECKPOINT_KEY: Final = "averaged"
"""In a checkpoint: that weights are averages, and the optimizer's state holds what was trained."""


class ExponentialMovingAverage:
    """After every step, ``average += (1 - decay) * (weight - average)`` (https://arxiv.org/abs/2307.13813).

    In the first steps the decay is less, ``(1 + step) / (10 + step)``, as in TensorFlow's ``ExponentialMovingAverage``:
    so the weights of the beginning are soon forgotten, and a short run is averaged over about its last tenth.

    Args:
        decay: How much of the average stays at a step: 0.999 averages over about the last thousand steps. None keeps
            no average.

    Raises:
        UserError: The decay is out of its range.
    """

    def __init__(self, decay: float | None) -> None:
        if decay is not None and not 0.0 <= decay < 1.0:
            raise UserError(f"model.ema_decay is {decay}; it must be at least 0 and below 1")
        self.decay = decay
        self.active = False
        """Whether the averages are in the weights' places."""

    def attach(self, optimizer: Optimizer, steps_done: Callable[[], int]) -> None:
        """Average what the optimizer updates, from its next step on.

        Args:
            optimizer: Any.
            steps_done: Tells the steps of the run before this one.

        Raises:
            UserError: The weights are in 16 bits: an average moves by less than they can tell apart.
        """
        if self.decay is None:
            return
        coarse = {p.dtype for group in optimizer.param_groups for p in group["params"] if p.dtype.itemsize < 4}
        if coarse:
            raise UserError(
                f"model.ema_decay is {self.decay}, and weights in {coarse.pop()} are too coarse for an average; "
                "keep them in 32 bits: --trainer.precision bf16-mixed"
            )
        optimizer.register_step_post_hook(lambda *_: self._update(optimizer, steps_done()))

    @torch.no_grad()
    def _update(self, optimizer: Optimizer, step: int) -> None:
        averages, weights = [], []
        updated = [p for group in optimizer.param_groups for p in group["params"]]
        if all(p.grad is None for p in updated):
            return  # a step that was refused is none
        for p in updated:
            if EMA_STATE_KEY in optimizer.state.get(p, {}):
                averages.append(to_local(optimizer.state[p][EMA_STATE_KEY]))
                weights.append(to_local(p))
            elif p.grad is not None:  # a parameter that was never updated is its own average
                optimizer.state[p][EMA_STATE_KEY] = p.detach().clone()
        if averages:
            decay = min(self.decay or 0.0, (1 + step) / (10 + step))
            torch._foreach_lerp_(averages, weights, 1 - decay)

    @torch.no_grad()
    def set_active(self, wanted: bool, optimizers: list[Optimizer], module: nn.Module) -> None:
        """Put the averages into the weights' places, or the weights back; what is so already stays.

        Args:
            wanted: Whether the averages are to be used.
            optimizers: Hold the averages.
            module: Holds the weights.
        """
        if self.active == wanted:
            return
        self.active = wanted
        for optimizer in optimizers:
            for p, state in optimizer.state.items():
                if EMA_STATE_KEY in state:
                    weight, average = to_local(p), to_local(state[EMA_STATE_KEY])
                    before = weight.clone()
                    weight.copy_(average)
                    average.copy_(before)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # after a forward pass without a backward one it may still hold whole weights

    def save(self, checkpoint: dict[str, Any], optimizers: list[Optimizer], module: nn.Module) -> None:
        """Let the weights of a checkpoint be averages, and mark it; the live weights stay as they are.

        Args:
            checkpoint: Of a trainer, with ``state_dict`` and ``optimizer_states``; either may be empty on a rank
                that writes nothing.
            optimizers: Those of ``optimizer_states``.
            module: That of ``state_dict``.
        """
        saved = checkpoint.get("optimizer_states", [])
        if self.decay is None or not any(
            EMA_STATE_KEY in state for part in saved for state in part.get("state", {}).values()
        ):
            return
        checkpoint[EMA_CHECKPOINT_KEY] = True
        if not self.active:
            for part, optimizer in zip(saved, optimizers, strict=True):
                swap_saved_weights(checkpoint["state_dict"], part, parameter_names(optimizer, module))

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Know that what is loaded from a marked checkpoint has changed places.

        Raises:
            UserError: It holds averages, and none are kept here.
        """
        self.active = checkpoint.get(EMA_CHECKPOINT_KEY, False)
        if self.active and self.decay is None:
            raise UserError(
                "the weights of the checkpoint are averages, and to go on is to go on averaging: --model.ema_decay; "
                "with 0 the average is the weights themselves"
            )


def swap_saved_weights(weights: dict[str, Tensor], saved: dict[str, Any], of: list[list[str]]) -> None:
    """Let saved weights and their averages change places, in these dicts alone; twice puts them back.

    Args:
        weights: By name; those that are tied stand there several times.
        saved: The state dict of an optimizer.
        of: For each key of its ``state``, a number, the names of the parameter; see ``names``.
    """
    for key, state in saved["state"].items():
        if EMA_STATE_KEY in state:
            before = weights[of[key][0]]
            weights.update(dict.fromkeys(of[key], state[EMA_STATE_KEY]))
            saved["state"][key] = {**state, EMA_STATE_KEY: before}  # a new one: the old one is the optimizer's own


def parameter_names(optimizer: Optimizer, module: nn.Module) -> list[list[str]]:
    """For each parameter, in the order of the optimizer's groups, its names in the module; a tied one has several."""
    of: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        of.setdefault(parameter, []).append(name)
    return [of[p] for group in optimizer.param_groups for p in group["params"]]
