"""The optimizer ``MuonAdamW``, which has two update rules, and the classes for the flag ``--model.optimizer``.

Two separate optimizers would require Lightning's manual optimization, which lacks gradient clipping, gradient
accumulation and a correct ``global_step``.

The flag selects an ``OptimizerRecipe``, which stores the hyperparameters until the model exists and the optimizer can
be built. Defaults that differ between recipes are ``None`` in the signature, because the parser keeps arguments of the
same name when the class is changed, and Muon's learning rate would be far too large for AdamW.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer
from typing_extensions import override

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model.local_shard import device_of, is_offloaded, to_local
from lit_gpt_scratch.optim.dtensor import ShardedMatrices, sharding_of
from lit_gpt_scratch.optim.optimizer_state import validate_optimizer_state
from lit_gpt_scratch.optim.param_groups import parameter_groups, split_by_width

# Keller Jordan's quintic polynomial: five iterations map singular values to about [0.7, 1.2], which trains as well as
# singular values of exactly 1 and requires no singular value decomposition.
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
ADAMW_MOMENTS: Final = ("exp_avg", "exp_avg_sq")
MOMENTS: Final = frozenset({"momentum", *ADAMW_MOMENTS})
"""Names of the state tensors that ``bf16_state`` stores in bfloat16."""
MAX_BF16_DECAY: Final = 0.99
"""Largest decay rate of a running mean in bfloat16.

A larger one changes the mean by less than 1% per step, which is close to the relative rounding error of 0.4%.
"""


@cache
def newton_schulz_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the Newton-Schulz iterations: bfloat16 if the device has fast bfloat16 matmuls.

    Otherwise, float32 is used. On CPUs without AVX-512, PyTorch has no optimized bfloat16 matmul. On an AMD Zen 3, the
    iterations took 24 to 150 times as long as in float32, and took up most of a training step. Older GPUs emulate
    bfloat16.
    """
    if device.type == "cpu":
        available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        fast = available and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        fast = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def orthogonalise(matrices: Tensor, steps: int = NEWTON_SCHULZ_STEPS) -> Tensor:
    """Approximate the nearest (semi-)orthogonal matrices with Newton-Schulz iterations.

    Singular vectors are kept and singular values are mapped to values close to 1, so that an update has about the same
    size in all directions.

    Args:
        matrices: Batch of matrices, floating-point tensor of shape (..., rows, columns). Zero matrices remain zero.
        steps: Number of iterations.

    Returns:
        The results, of shape (..., rows, columns), in ``newton_schulz_dtype``. The iterations are stable in bfloat16
        (https://kellerjordan.github.io/posts/muon).
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    x = matrices.flatten(0, -3).to(newton_schulz_dtype(matrices.device))  # (N, rows, columns)
    tall = x.size(-2) > x.size(-1)
    if tall:  # transpose, so that the products x @ x.mT are as small as possible
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # the Frobenius norm bounds the spectral norm
    for _ in range(steps):
        gram = x @ x.mT  # (N, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


class MuonAdamW(Optimizer):
    """Optimizer that updates each parameter group with its own ``rule``: ``muon`` (matrices only) or ``adamw``.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) orthogonalizes the Nesterov momentum and scales
    it by sqrt(max(1, rows / columns)). Matrices of the same shape are orthogonalized as one batch. Parameters with more
    than two dimensions are stacks of matrices, such as those of experts. If the matrices are sharded, each process
    gathers and orthogonalizes some of them; stacks that are sharded into whole matrices are not gathered. With NorMuon,
    which stores a running mean square per row, each process gathers and orthogonalizes all matrices. AdamW
    (https://arxiv.org/abs/1711.05101) uses PyTorch's fused kernel.

    Moments and momenta are stored in the dtype of their parameter, or in bfloat16 if a group sets ``bf16_state``. They
    are then converted for each update, one parameter or one batch of matrices at a time.

    Args:
        groups: Parameter groups as dicts with ``params``, ``rule``, ``lr``, ``weight_decay`` and, optionally,
            ``bf16_state``. Groups with the rule ``muon`` also require ``momentum``, and use NorMuon if ``row_beta`` is
            set. Groups with the rule ``adamw`` also require ``betas``, ``eps`` and ``fused``.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, defaults={})
        for group in self.param_groups:
            if group["rule"] == "muon" and any(p.ndim < 2 for p in group["params"]):
                raise ValueError("parameter groups with rule 'muon' require matrices; use 'adamw' for the rest")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Perform one optimization step on all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._muon if group["rule"] == "muon" else self._adamw)(parameters, group)
        return loss

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for batch in _group_matrices(parameters):
            weights = [to_local(p) for p in batch]
            gradients = [to_local(p.grad) for p in batch if p.grad is not None]
            stored = [to_local(self._state(p, group, "momentum")["momentum"]) for p in batch]
            momenta = [momentum.to(weights[0].dtype) for momentum in stored]  # copies only if stored in bfloat16
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
            if group.get("bf16_state"):
                torch._foreach_copy_(stored, momenta)
            row_beta = group.get("row_beta")
            matrices = ShardedMatrices(batch[0], len(batch), replicate=row_beta is not None)
            stacked = torch.stack(nesterov).to(newton_schulz_dtype(device_of(batch[0])))  # before communication
            updates = orthogonalise(matrices.gather(stacked))  # (n, ..., rows, columns)
            if row_beta is not None:
                updates = updates.to(weights[0].dtype)
                self._normalise_rows(updates, batch, row_beta)
            # (N, ..., local rows, local columns); with CPU offload, matrices are gathered on the accelerator
            updates = matrices.shard(updates).to(weights[0].device, weights[0].dtype)
            rows, columns = batch[0].shape[-2:]
            scale = max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, list(updates.unbind()), alpha=-group["lr"] * scale)

    def _normalise_rows(self, updates: Tensor, parameters: list[Tensor], beta: float) -> None:
        """Divide each neuron's update by its running root mean square (NorMuon, https://arxiv.org/abs/2510.05491).

        Each row of a matrix belongs to one neuron. The norm of each matrix is preserved.
        """
        squares = updates.square().mean(-1, keepdim=True)  # (N, ..., rows, 1)
        for p, square in zip(parameters, squares, strict=True):
            square = square.to(p.device)
            self.state[p].setdefault("row_square", torch.zeros_like(square)).lerp_(square, 1 - beta)
        mean_squares = torch.stack([self.state[p]["row_square"] for p in parameters]).to(
            updates.device
        )  # (N, ..., rows, 1)
        norm = updates.norm(dim=(-2, -1), keepdim=True)  # (N, ..., 1, 1)
        updates.mul_(torch.rsqrt(mean_squares + 1e-10))
        updates.mul_(norm / (updates.norm(dim=(-2, -1), keepdim=True) + 1e-7))

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._state(p, group, *ADAMW_MOMENTS) for p in parameters]
        for p, state in zip(parameters, states, strict=True):
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        means, squares = ([to_local(state[name]) for state in states] for name in ADAMW_MOMENTS)
        weights = [to_local(p) for p in parameters]
        gradients = [to_local(p.grad) for p in parameters if p.grad is not None]
        steps = [state["step"] for state in states]
        if not group.get("bf16_state"):
            _adamw_update(weights, gradients, means, squares, steps, group)
            return
        for p, gradient, mean, square, step in zip(weights, gradients, means, squares, steps, strict=True):
            converted = [mean.to(p.dtype)], [square.to(p.dtype)]  # the fused kernel requires the dtype of the weights
            _adamw_update([p], [gradient], *converted, [step], group)
            mean.copy_(converted[0][0])
            square.copy_(converted[1][0])

    def _state(self, parameter: Tensor, group: dict[str, Any], *names: str) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(parameter, dtype=_moment_dtype(parameter, group))
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, and convert moments to the dtype in which this optimizer stores them.

        The base class would convert all of them to the dtype of the parameters first, which can exceed the memory.
        """
        validate_optimizer_state(self, state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [(p, _moment_dtype(p, group)) for group in self.param_groups for p in group["params"]]
        others = {
            key: {name: value for name, value in values.items() if name not in MOMENTS}
            for key, values in state_dict["state"].items()
        }
        flags = [group.get("bf16_state", False) for group in self.param_groups]
        super().load_state_dict({**state_dict, "state": others})
        for group, flag in zip(self.param_groups, flags, strict=True):
            group["bf16_state"] = flag
        for key, (p, dtype) in zip(saved, parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if name in MOMENTS:
                    self.state[p][name] = value.to(p.device, dtype)


def _group_matrices(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Group matrices by shape and sharding.

    Matrices that are offloaded to the CPU are gathered on the accelerator, so a group has only one matrix for each
    process.
    """
    groups: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for p in parameters:
        groups[p.shape, sharding_of(p)].append(p)
    for (_, (mesh, _)), group in groups.items():
        size = mesh.size() if mesh is not None and is_offloaded(group[0]) else len(group)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _moment_dtype(parameter: Tensor, group: dict[str, Any]) -> torch.dtype:
    return torch.bfloat16 if group.get("bf16_state") else parameter.dtype


def _adamw_update(
    weights: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    group: dict[str, Any],
) -> None:
    adamw(
        weights,
        gradients,
        means,
        squares,
        [],
        steps,
        fused=group["fused"],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


BF16_DECAY_RATES: Final = ("beta1", "beta2", "momentum")
"""Names of hyperparameters that are decay rates of the running means that ``bf16_state`` stores in bfloat16."""
DECAY_RATES: Final = (*BF16_DECAY_RATES, "row_beta")
"""Names of all hyperparameters that are decay rates of running means."""


class OptimizerRecipe(ABC):
    """Base class of optimizer recipes, which store hyperparameters and build the optimizer once the model exists."""

    @classmethod
    def default_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return default values, which may depend on the other arguments, for arguments that are None.

        ``fit`` saves the default values in ``config.yaml``.
        """
        return {}

    @abstractmethod
    def build(self, model: nn.Module) -> Optimizer:
        """Build an optimizer for the trainable parameters of a model."""

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
            if name in DECAY_RATES and value is not None and not 0 <= value < 1:
                raise UserError(f"model.optimizer.{name} is {value}; it must be at least 0 and below 1")
            if name in BF16_DECAY_RATES and vars(self).get("bf16_state") and value > MAX_BF16_DECAY:
                raise UserError(
                    f"model.optimizer.{name} is {value}, whose small changes would be lost when they are rounded to "
                    f"bfloat16; set it to {MAX_BF16_DECAY} or less, or set --model.optimizer.bf16_state false"
                )


class AdamW(OptimizerRecipe):
    """AdamW for all parameters: Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101).

    Args:
        lr: Peak learning rate; the default of 3e-3 is suitable for small models.
        weight_decay: Decoupled weight decay for matrices and embeddings, but not for gains and biases; 0.1 by default.
        beta1: Decay rate of the running mean of gradients.
        beta2: Decay rate of the running mean of squared gradients.
        bf16_state: Whether to store the optimizer's running means of gradients in bfloat16, as DeepSeek-V3
            (https://arxiv.org/abs/2412.19437) does, which halves their memory if the weights are in float32.
    """

    def __init__(
        self,
        lr: float | None = None,
        weight_decay: float | None = None,
        beta1: float = 0.9,
        beta2: float = 0.95,
        bf16_state: bool = False,
    ) -> None:
        defaults = self.default_arguments({})
        self.lr = defaults["lr"] if lr is None else lr
        self.weight_decay = defaults["weight_decay"] if weight_decay is None else weight_decay
        self.beta1 = beta1
        self.beta2 = beta2
        self.bf16_state = bf16_state
        self.validate()

    @classmethod
    @override
    def default_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"lr": 3e-3, "weight_decay": 0.1}

    @override
    def build(self, model: nn.Module) -> Optimizer:
        # Not torch.optim.AdamW(fused=True), because Lightning does not clip its gradients in mixed precision.
        groups = parameter_groups(model)
        settings = _adamw_settings(self.lr, self.beta1, self.beta2, self.bf16_state)
        return _build_optimizer(
            model,
            {
                "name": "matrices and tables",
                "params": groups.matrices + groups.tables,
                **settings,
                "weight_decay": self.weight_decay,
            },
            {"name": "vectors", "params": groups.vectors, **settings},
        )


class Muon(OptimizerRecipe):
    """Muon for the matrices in the blocks, and AdamW for embeddings, the output head, gains and biases.

    Args:
        lr: Peak learning rate of Muon; 0.02 by default.
        weight_decay: Decoupled weight decay for the matrices that Muon updates; 0 by default.
        momentum: Momentum of Muon.
        row_beta: Decay rate of the running mean square with which NorMuon (https://arxiv.org/abs/2510.05491) normalizes
            the update of each neuron. By default, NorMuon is disabled; setting ``row_beta`` enables it.
        adamw_lr: Peak learning rate of AdamW; 8e-3 by default.
        beta1: Decay rate of AdamW's running mean of gradients.
        beta2: Decay rate of AdamW's running mean of squared gradients.
        bf16_state: Whether to store the optimizer's running means of gradients in bfloat16, as DeepSeek-V3
            (https://arxiv.org/abs/2412.19437) does, which halves their memory if the weights are in float32.
    """

    def __init__(
        self,
        lr: float | None = None,
        weight_decay: float | None = None,
        momentum: float = 0.9,
        row_beta: float | None = None,
        adamw_lr: float | None = None,
        beta1: float = 0.9,
        beta2: float = 0.95,
        bf16_state: bool = False,
    ) -> None:
        defaults = self.default_arguments({})
        self.lr = defaults["lr"] if lr is None else lr
        self.weight_decay = defaults["weight_decay"] if weight_decay is None else weight_decay
        self.momentum = momentum
        self.row_beta = row_beta
        self.adamw_lr = defaults["adamw_lr"] if adamw_lr is None else adamw_lr
        self.beta1 = beta1
        self.beta2 = beta2
        self.bf16_state = bf16_state
        self.validate()

    @classmethod
    @override
    def default_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"lr": 0.02, "weight_decay": 0.0, "adamw_lr": 8e-3}

    @override
    def build(self, model: nn.Module) -> Optimizer:
        groups = parameter_groups(model)
        adamw = _adamw_settings(self.adamw_lr, self.beta1, self.beta2, self.bf16_state)
        return _build_optimizer(
            model,
            {
                "name": "matrices",
                "rule": "muon",
                "params": groups.matrices,
                "lr": self.lr,
                "momentum": self.momentum,
                "row_beta": self.row_beta,
                "weight_decay": self.weight_decay,
                "bf16_state": self.bf16_state,
            },
            {"name": "tables", "params": groups.tables, **adamw},
            {"name": "vectors", "params": groups.vectors, **adamw},
        )


def _build_optimizer(model: nn.Module, *groups: dict[str, Any]) -> MuonAdamW:
    # Groups may be empty: with LoRA, for example, only tables are trained.
    return MuonAdamW([part for group in groups if group["params"] for part in split_by_width(model, group)])


def _adamw_settings(lr: float, beta1: float, beta2: float, bf16_state: bool) -> dict[str, Any]:
    # `fused` also tells torch to load the step counters onto the parameters' device.
    settings = {"rule": "adamw", "lr": lr, "betas": (beta1, beta2), "eps": 1e-8, "weight_decay": 0.0, "fused": True}
    return {**settings, "bf16_state": bf16_state}
