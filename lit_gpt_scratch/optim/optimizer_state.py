"""Validate the optimizer state in a checkpoint before the optimizer loads it."""

from typing import Any, Final

from torch import Tensor
from torch.optim.optimizer import Optimizer

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.optim.ema import EMA_STATE_KEY

LIKE_PARAMETER: Final = ("momentum", "exp_avg", "exp_avg_sq", EMA_STATE_KEY)
"""Names of the state tensors that have the same shape as their parameter."""


def validate_optimizer_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """``load_state_dict`` pre-hook that checks that a saved state matches the optimizer.

    Raises:
        UserError: The parameter groups or the shapes of state tensors differ.
    """
    if problem := _find_problem(optimizer, saved):
        raise UserError(f"the optimizer state in the checkpoint {problem}; resume from another checkpoint")


def _find_problem(optimizer: Optimizer, saved: dict[str, Any]) -> str:
    groups = saved["param_groups"]
    keys = [group.get("params") for group in groups]
    sizes = [len(group) if isinstance(group, list) else -1 for group in keys]
    if sizes != [len(group["params"]) for group in optimizer.param_groups]:
        return "belongs to a different model: its parameter groups differ"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    flat = [key for group in keys for key in group]
    if not all(isinstance(key, int | str) for key in flat) or not saved["state"].keys() <= set(flat):
        return "is corrupted: it contains states of unknown parameters"
    for key, parameter in zip(flat, parameters, strict=True):
        for name, value in saved["state"].get(key, {}).items():
            shapes = {
                "step": (),
                "row_square": (*parameter.shape[:-1], 1),
                **dict.fromkeys(LIKE_PARAMETER, parameter.shape),
            }
            if name in shapes and not (isinstance(value, Tensor) and value.shape == shapes[name]):
                return f"is corrupted: {name} of parameter {key} does not have the shape {tuple(shapes[name])}"
    return ""
