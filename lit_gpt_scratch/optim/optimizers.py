"""Optimizers by name, with their hyperparameters: the choices of ``--model.optimizer NAME``.

A recipe holds plain numbers until there is a model to build the optimizer for. Defaults that differ between recipes are
``None`` in the signature: a config that swaps the class keeps arguments of the same name, and Muon's learning rate
would be far too large for AdamW.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer
from typing_extensions import override

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.optim.muon import MuonAdamW
from lit_gpt_scratch.optim.param_groups import parameter_groups


class OptimizerRecipe(ABC):
    """Hyperparameters from which an optimizer is built once the model exists."""

    @classmethod
    def default_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Values of arguments that are ``None``, by name, given the others; ``fit`` saves them in ``config.yaml``."""
        return {}

    @abstractmethod
    def build(self, model: nn.Module) -> Optimizer:
        """An optimizer for the model's trainable parameters."""

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            UserError: A learning rate is not positive, or another value is out of range.
        """
        for name, value in vars(self).items():
            if name.endswith("lr") and not value > 0:
                raise UserError(f"model.optimizer.{name} is {value}; it must be positive")
            if name == "weight_decay" and value < 0:
                raise UserError(f"model.optimizer.{name} is {value}; it must be 0 or more")
            if name in ("beta1", "beta2", "momentum", "row_beta") and value is not None and not 0 <= value < 1:
                raise UserError(f"model.optimizer.{name} is {value}; it must be at least 0 and below 1")


class AdamW(OptimizerRecipe):
    """Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101) for all parameters.

    Args:
        lr: Peak learning rate; by default 3e-3, which suits small models.
        weight_decay: Decoupled weight decay of matrices and embeddings; gains and biases have none. By default 0.1.
        beta1: Decay rate of the mean of gradients.
        beta2: Decay rate of the mean of squared gradients.
    """

    def __init__(
        self, lr: float | None = None, weight_decay: float | None = None, beta1: float = 0.9, beta2: float = 0.95
    ) -> None:
        defaults = self.default_arguments({})
        self.lr = defaults["lr"] if lr is None else lr
        self.weight_decay = defaults["weight_decay"] if weight_decay is None else weight_decay
        self.beta1 = beta1
        self.beta2 = beta2
        self.validate()

    @classmethod
    @override
    def default_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"lr": 3e-3, "weight_decay": 0.1}

    @override
    def build(self, model: nn.Module) -> Optimizer:
        # Not torch.optim.AdamW(fused=True): Lightning does not clip its gradients in mixed precision.
        groups = parameter_groups(model)
        settings = _adamw_settings(self.lr, self.beta1, self.beta2)
        return _build_optimizer(
            {
                "name": "matrices and tables",
                "params": groups.matrices + groups.tables,
                **settings,
                "weight_decay": self.weight_decay,
            },
            {"name": "vectors", "params": groups.vectors, **settings},
        )


class Muon(OptimizerRecipe):
    """Muon for the matrices inside the blocks, AdamW for embeddings, head, gains and biases.

    Args:
        lr: Peak learning rate of Muon; 0.02 by default.
        weight_decay: Decoupled weight decay of the matrices; 0 by default.
        momentum: Muon's momentum.
        row_beta: Enables NorMuon (https://arxiv.org/abs/2510.05491): decay rate of the mean square by which each
            neuron's update is normalised. Off by default.
        adamw_lr: Peak learning rate of AdamW.
        beta1: AdamW's decay rate of the mean of gradients.
        beta2: AdamW's decay rate of the mean of squared gradients.
    """

    def __init__(
        self,
        lr: float | None = None,
        weight_decay: float | None = None,
        momentum: float = 0.9,
        row_beta: float | None = None,
        adamw_lr: float = 8e-3,
        beta1: float = 0.9,
        beta2: float = 0.95,
    ) -> None:
        defaults = self.default_arguments({})
        self.lr = defaults["lr"] if lr is None else lr
        self.weight_decay = defaults["weight_decay"] if weight_decay is None else weight_decay
        self.momentum = momentum
        self.row_beta = row_beta
        self.adamw_lr = adamw_lr
        self.beta1 = beta1
        self.beta2 = beta2
        self.validate()

    @classmethod
    @override
    def default_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"lr": 0.02, "weight_decay": 0.0}

    @override
    def build(self, model: nn.Module) -> Optimizer:
        groups = parameter_groups(model)
        adamw = _adamw_settings(self.adamw_lr, self.beta1, self.beta2)
        return _build_optimizer(
            {
                "name": "matrices",
                "rule": "muon",
                "params": groups.matrices,
                "lr": self.lr,
                "momentum": self.momentum,
                "row_beta": self.row_beta,
                "weight_decay": self.weight_decay,
            },
            {"name": "tables", "params": groups.tables, **adamw},
            {"name": "vectors", "params": groups.vectors, **adamw},
        )


def _build_optimizer(*groups: dict[str, Any]) -> MuonAdamW:
    return MuonAdamW([group for group in groups if group["params"]])  # LoRA, for example, has only tables


def _adamw_settings(lr: float, beta1: float, beta2: float) -> dict[str, Any]:
    # `fused` also tells torch to load the step counters onto the parameters' device.
    return {"rule": "adamw", "lr": lr, "betas": (beta1, beta2), "eps": 1e-8, "weight_decay": 0.0, "fused": True}
