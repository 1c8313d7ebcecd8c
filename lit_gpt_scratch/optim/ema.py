"""Exponential moving average (EMA) of the weights.

The averages are stored in the optimizer state, next to the moments, so that they are saved, sharded and resharded
together with the moments. For evaluation, weights and averages are swapped. They are also swapped in checkpoints, so
that loading a checkpoint's weights loads the averages.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.optimizer import Optimizer

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model.local_shard import is_offloaded, to_local

EMA_STATE_KEY: Final = "average"
"""Key of the average in a parameter's optimizer state."""
EMA_CHECKPOINT_KEY: Final = "averaged"
"""Key that marks a checkpoint whose weights are the averages and whose optimizer state holds the trained weights."""


class ExponentialMovingAverage:
    """Exponential moving average of the weights, updated after every step (https://arxiv.org/abs/2307.13813).

    The update is ``average += (1 - decay) * (weight - average)``. The decay is capped at ``(1 + step) / (10 + step)``,
    as in TensorFlow's ``ExponentialMovingAverage``, so that the initial weights are soon forgotten and, in a short run,
    the average covers about the last tenth of the steps.

    Args:
        decay: Fraction of the average that is kept in each step; 0.999 averages over about the last 1000 steps. None
            disables averaging.

    Raises:
        UserError: The decay is out of range.
    """

    def __init__(self, decay: float | None) -> None:
        if decay is not None and not 0.0 <= decay < 1.0:
            raise UserError(f"model.ema_decay is {decay}; it must be at least 0 and below 1")
        self.decay = decay
        self.active = False
        """Whether weights and averages are currently swapped."""

    def attach(self, optimizer: Optimizer, steps_done: Callable[[], int]) -> None:
        """Register a hook that updates the averages after every optimizer step.

        Args:
            optimizer: Any optimizer.
            steps_done: Callable that returns the number of optimizer steps completed before the current step.

        Raises:
            UserError: The weights are stored in 16 bits, which cannot represent the small changes of an average.
        """
        if self.decay is None:
            return
        low_precision = {p.dtype for group in optimizer.param_groups for p in group["params"] if p.dtype.itemsize < 4}
        if low_precision:
            raise UserError(
                f"model.ema_decay is {self.decay}, but the weights are stored in {low_precision.pop()}, whose "
                "precision is too low for an average; set --trainer.precision bf16-mixed, which stores the weights in "
                "float32"
            )
        optimizer.register_step_post_hook(lambda *_: self._update(optimizer, steps_done()))

    @torch.no_grad()
    def _update(self, optimizer: Optimizer, step: int) -> None:
        averages, weights = [], []
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if all(p.grad is None for p in parameters):
            return  # this step was skipped
        for p in parameters:
            if EMA_STATE_KEY in optimizer.state.get(p, {}):
                averages.append(to_local(optimizer.state[p][EMA_STATE_KEY]))
                weights.append(to_local(p))
            elif p.grad is not None:  # before its first update, a parameter equals its average
                optimizer.state[p][EMA_STATE_KEY] = p.detach().clone()
        if averages:
            decay = min(self.decay or 0.0, (1 + step) / (10 + step))
            torch._foreach_lerp_(averages, weights, 1 - decay)

    @torch.no_grad()
    def set_active(self, active: bool, optimizers: list[Optimizer], module: nn.Module) -> None:
        """Swap weights and averages, unless they are already in the requested state.

        Args:
            active: Whether the module should use the averages as its weights.
            optimizers: The optimizers whose state holds the averages.
            module: The module that holds the weights.
        """
        if self.active == active:
            return
        self.active = active
        if any(is_offloaded(p) for p in module.parameters()):
            torch.accelerator.synchronize()  # the accelerator may still be reading weights of the last forward pass
        for optimizer in optimizers:
            for p, state in optimizer.state.items():
                if EMA_STATE_KEY in state:
                    weight, average = to_local(p), to_local(state[EMA_STATE_KEY])
                    previous = weight.clone()
                    weight.copy_(average)
                    average.copy_(previous)
        for submodule in module.modules():
            if isinstance(submodule, FSDPModule):
                submodule.reshard()  # after a forward pass without a backward pass it may hold unsharded weights

    def save(self, checkpoint: dict[str, Any], optimizers: list[Optimizer], module: nn.Module) -> None:
        """Swap weights and averages in a checkpoint and mark it as swapped; the weights in memory are unchanged.

        Args:
            checkpoint: The trainer's checkpoint, with ``state_dict`` and ``optimizer_states``. Both may be empty on a
                rank that does not save anything.
            optimizers: The optimizers that ``optimizer_states`` belongs to.
            module: The module that ``state_dict`` belongs to.
        """
        saved = checkpoint.get("optimizer_states", [])
        states = (state for optimizer_state in saved for state in optimizer_state.get("state", {}).values())
        if self.decay is None or not any(EMA_STATE_KEY in state for state in states):
            return
        checkpoint[EMA_CHECKPOINT_KEY] = True
        if not self.active:
            for optimizer_state, optimizer in zip(saved, optimizers, strict=True):
                swap_saved_weights(checkpoint["state_dict"], optimizer_state, parameter_names(optimizer, module))

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Set ``active`` to True if weights and averages are swapped in a checkpoint, otherwise to False.

        Raises:
            UserError: The checkpoint contains averages, but averaging is disabled.
        """
        self.active = checkpoint.get(EMA_CHECKPOINT_KEY, False)
        if self.active and self.decay is None:
            raise UserError(
                "the checkpoint contains EMA weights, but --model.ema_decay is not set; set it to continue averaging, "
                "or to 0 to continue without averaging"
            )


def swap_saved_weights(weights: dict[str, Tensor], saved: dict[str, Any], names: list[list[str]]) -> None:
    """Swap weights and averages in the given dicts in place; calling this function twice restores the dicts.

    Args:
        weights: Weights keyed by name; a tied weight has several names.
        saved: State dict of an optimizer.
        names: Names of each parameter, indexed by the integer keys of ``saved["state"]`` (see ``parameter_names``).
    """
    for key, state in saved["state"].items():
        if EMA_STATE_KEY in state:
            weight = weights[names[key][0]]
            weights.update(dict.fromkeys(names[key], state[EMA_STATE_KEY]))
            saved["state"][key] = {**state, EMA_STATE_KEY: weight}  # a new dict: the old one belongs to the optimizer


def parameter_names(optimizer: Optimizer, module: nn.Module) -> list[list[str]]:
    """Return the names of each parameter in a module, in the order of the optimizer's parameter groups.

    A tied parameter has several names.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [names[p] for group in optimizer.param_groups for p in group["params"]]
