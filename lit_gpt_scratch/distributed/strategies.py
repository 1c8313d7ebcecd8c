"""Register FSDP2, HSDP and tensor parallelism as strategies: ``fsdp2``, ``hsdp``, ``tp`` and ``fsdp2_tp``."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer, strategies
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import Optimizer
from typing_extensions import override

from lit_gpt_scratch.checkpoint.checkpoint_plugins import BackgroundCheckpointIO, ShardedCheckpointIO
from lit_gpt_scratch.checkpoint.sharded_checkpoint import (
    ShardedCheckpoint,
    is_sharded,
    named_tensors,
    open_on_all_ranks,
    replace_tensors,
)
from lit_gpt_scratch.distributed.parallelize import TENSOR_PARALLEL, build_mesh
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.lightning_compat import (
    SizedModelParallelStrategy,
    multiprocessing_start_method,
    start_as_scripts,
)
from lit_gpt_scratch.optim.optimizer_state import validate_optimizer_state

FULL_STATE_DICT: Final = StateDictOptions(full_state_dict=True, cpu_offload=True)
"""Options for checkpoints of full tensors: rank 0 saves them, and each rank extracts its shards when loading them."""
SHARDS: Final = StateDictOptions()
"""Options for state dicts of ``DTensor``s, which share their memory with the parameters."""
TENSOR_PARALLEL_SIZES: Final[dict[str, int | None]] = {"fsdp2": 1, "hsdp": 1, "tp": None, "fsdp2_tp": 2}
"""Default size of a tensor-parallel group, by strategy name; None uses all processes."""
TENSOR_PARALLEL_STRATEGIES: Final = ("tp", "fsdp2_tp", "hsdp")
"""Names of the strategies that support ``--tensor_parallel``."""


class ModelParallel(SizedModelParallelStrategy):
    """Strategy that shards weights, gradients and optimizer state across processes with FSDP2 and tensor parallelism.

    A checkpoint contains full tensors under their usual names, as if saved by one process, so that it can be resumed
    with any strategy. By default, it is a single file, for which rank 0 gathers all tensors. With a
    ``ShardedCheckpointIO``, each process saves and loads only its own shards.

    Args:
        tensor_parallel_size: Number of processes that share one replica, splitting its heads and hidden channels, and
            that read the same data; None uses all processes. FSDP2 shards the weights across the replicas, each of
            which reads different data.
        groups: Number of groups of processes, such as machines, each of which holds all weights (HSDP): FSDP2 shards
            the weights only within a group. None uses one group per machine, and 1 disables HSDP.
        cpu_offload: Whether FSDP2 keeps the shards of weights, gradients and optimizer state in the memory of the CPU,
            where the optimizer updates them.
    """

    def __init__(self, tensor_parallel_size: int | None = 1, groups: int | None = 1, cpu_offload: bool = False) -> None:
        super().__init__(cpu_offload)
        self.tensor_parallel_size = tensor_parallel_size
        self.groups = groups
        self._shards: ShardedCheckpoint | None = None
        """The sharded checkpoint from which the run is being restored, if any."""

    @override
    def choose_tensor_parallel_size(self) -> int:
        return resolve_tensor_parallel_size(self)

    @override
    def build_device_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        groups = resolve_groups(self)
        data_parallel, tensor_parallel = mesh.shape
        return mesh if groups == 1 else build_mesh(mesh.device_type, data_parallel, tensor_parallel, groups)

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        size = self.device_mesh[TENSOR_PARALLEL].size()
        return {"num_replicas": self.device_mesh.size() // size, "rank": self.device_mesh.get_rank() // size}

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True  # Lightning then calls load_optimizer_state_dict

    @property
    def saves_shards(self) -> bool:
        """Whether each process saves its own shards."""
        plugin = self.checkpoint_io
        return isinstance(getattr(plugin, "checkpoint_io", plugin), ShardedCheckpointIO)  # it may be wrapped

    @cached_property
    def checkpoint_group(self) -> ProcessGroup | None:
        """Gloo group of all ranks for sharded checkpoints, which a background thread may use during training."""
        return dist.new_group(backend="gloo", timeout=self.collective_timeout) if dist.is_initialized() else None

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None
        return get_model_state_dict(self.model, options=SHARDS if self.saves_shards else FULL_STATE_DICT)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        if self.saves_shards:
            self.checkpoint_io.save_checkpoint(checkpoint, self.broadcast(filepath), self.checkpoint_group)
        else:
            ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        # The parent class would load the weights and optimizer state here, before any hook has seen the checkpoint.
        if isinstance(self.checkpoint_io, BackgroundCheckpointIO):
            self.checkpoint_io.wait()  # a save uses the same process group
        path, shards = self.broadcast((Path(checkpoint_path), is_sharded(Path(checkpoint_path))))
        self._shards = open_on_all_ranks(path, self.checkpoint_group) if shards else None
        if self._shards is None:
            return ParallelStrategy.load_checkpoint(self, path, weights_only)
        return self._shards.read_training_state()

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        if self._shards is None:
            set_model_state_dict(self.model, checkpoint["state_dict"], options=replace(FULL_STATE_DICT, strict=strict))
            return
        weights: dict[str, Any] = get_model_state_dict(
            self.model, options=SHARDS
        )  # they share their memory with the parameters
        if strict and (different := weights.keys() ^ checkpoint["state_dict"].keys()):
            raise UserError(f"the checkpoint does not match the model: only one of them contains {min(different)}")
        saved = named_tensors({"state_dict": checkpoint["state_dict"]})
        names = [name.removeprefix("state_dict.") for name, _ in saved]
        self._shards.read_tensors({f"state_dict.{name}": weights[name] for name in names if name in weights})
        for name, value in checkpoint["state_dict"].items():
            if not value.is_meta and name in weights:  # a scalar
                weights[name].copy_(value)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        # The parent class numbers the parameters in the order of the model, but an optimizer numbers them in the order
        # of its groups.
        assert self.model is not None
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Lightning wraps the optimizer
        if (
            self.saves_shards or not optimizer.state
        ):  # get_optimizer_state_dict would run an optimizer step to create it
            return optimizer.state_dict()
        state: dict[str, Any] = dict(get_optimizer_state_dict(self.model, optimizer, options=FULL_STATE_DICT))
        names = [name for group in state.get("param_groups", ()) for name in group["params"]]
        return _rename_parameters(state, {name: number for number, name in enumerate(names)})

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.model is not None
        if self._shards is not None:
            self._load_optimizer_shards(self._shards, checkpoint)
            return
        names = {p: name for name, p in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            order = [p for group in optimizer.param_groups for p in group["params"]]
            if not state["state"]:
                optimizer.load_state_dict(state)
                continue
            by_name = _rename_parameters(state, {number: names[p] for number, p in enumerate(order)})
            set_optimizer_state_dict(self.model, optimizer, by_name, options=replace(FULL_STATE_DICT, strict=False))
            for number, p in enumerate(order):
                if number not in state["state"]:  # the parameter never had a gradient, but torch created state for it
                    optimizer.state.pop(p, None)

    def _load_optimizer_shards(self, shards: ShardedCheckpoint, checkpoint: Mapping[str, Any]) -> None:
        """Load optimizer states; a tensor with the shape of its parameter is sharded like the parameter."""
        states = {"optimizer_states": checkpoint["optimizer_states"]}
        shards.require_stored(dict(named_tensors(states)))
        allocated: dict[int, Tensor] = {}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            validate_optimizer_state(optimizer, state)
            own = (p for group in optimizer.param_groups for p in group["params"])
            saved = (number for group in state["param_groups"] for number in group["params"])
            order = dict(zip(saved, own, strict=True))
            for number, values in state["state"].items():
                for value in values.values():
                    if isinstance(value, Tensor) and value.is_meta:
                        p = order[number]
                        allocated[id(value)] = (
                            torch.empty_like(p, dtype=value.dtype, requires_grad=False)
                            if value.shape == p.shape
                            else torch.empty(value.shape, dtype=value.dtype, device=self.root_device)
                        )
        shards.read_tensors({name: allocated[id(value)] for name, value in named_tensors(states)})
        loaded = replace_tensors(states, lambda value: allocated[id(value)])["optimizer_states"]
        for optimizer, state in zip(self.optimizers, loaded, strict=True):
            optimizer.load_state_dict(state)

    @override
    def setup(self, trainer: Trainer) -> None:
        for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
            loop.inference_mode = False  # weights gathered in inference mode could not be used in a backward pass later
        super().setup(trainer)


def _rename_parameters(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """Return an optimizer state dict with renamed parameters, or an empty dict if this process has no state."""
    if not state:
        return {}
    groups = [{**group, "params": [names[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[name]: value for name, value in state["state"].items()}, "param_groups": groups}


def resolve_tensor_parallel_size(strategy: Strategy) -> int:
    """Return the size of a tensor-parallel group, whose processes share one replica and read the same data.

    Raises:
        UserError: The number of processes is not divisible by the size of a tensor-parallel group.
    """
    if not isinstance(strategy, ModelParallel):
        return 1
    return divide_processes(strategy.num_processes * strategy.num_nodes, strategy.tensor_parallel_size)


def divide_processes(world: int, size: int | None) -> int:
    """Return the size of a tensor-parallel group among ``world`` processes; None means all processes.

    Raises:
        UserError: The number of processes is not divisible by the size.
    """
    size = size or world
    if world % size:
        raise UserError(
            f"tensor_parallel is {size}, but there are {world} processes; choose a divisor of {world}, or "
            f"change --trainer.devices"
        )
    return size


def resolve_groups(strategy: Strategy) -> int:
    """Return the number of groups of processes that each hold all weights, or 1 if the strategy is not ``hsdp``.

    Raises:
        UserError: The processes cannot be divided into such groups, or a group would have a single process.
    """
    if not isinstance(strategy, ModelParallel) or strategy.groups == 1:
        return 1
    replicas = strategy.num_processes * strategy.num_nodes // resolve_tensor_parallel_size(strategy)
    return divide_replicas(replicas, strategy.groups or strategy.num_nodes)


def divide_replicas(replicas: int, groups: int) -> int:
    """Return ``groups``, after checking that data-parallel processes can be divided into as many groups.

    Raises:
        UserError: They cannot, or a group would have a single process.
    """
    if groups == 1:
        raise UserError("--trainer.strategy hsdp has one machine; use fsdp2, or set --hsdp_groups")
    if replicas % groups:
        raise UserError(
            f"hsdp_groups is {groups}, but there are {replicas} data-parallel processes, which is not divisible by "
            f"{groups}; choose a divisor of {replicas}, or change --trainer.devices"
        )
    if replicas == groups:
        raise UserError(
            f"hsdp_groups is {groups}, but there are only {replicas} data-parallel processes, so no weights would be "
            f"sharded across them; use fewer groups, or --trainer.strategy ddp or tp"
        )
    return groups


def build_named_strategy(strategy: object) -> object:
    """Instantiate one of Lightning's strategy classes if ``strategy`` is its name or import path.

    The argument parser instantiates a class only if at least one of its arguments is set, and otherwise treats the name
    as that of a registered strategy. Other values are returned unchanged.
    """
    name = str(strategy).removeprefix("lightning.pytorch.strategies.")
    if isinstance(strategy, str) and name in strategies.__all__ and name.endswith("Strategy") and name != "Strategy":
        built: object = getattr(strategies, name)()
        return built
    return strategy


def resolve_strategy(
    strategy: object, tensor_parallel: int | None, hsdp_groups: int | None, cpu_offload: bool
) -> object:
    """Return the Trainer's ``strategy``, changed by the flags ``tensor_parallel``, ``hsdp_groups`` and ``cpu_offload``.

    Args:
        strategy: Value of ``--trainer.strategy``.
        tensor_parallel: Size of a tensor-parallel group; None for the strategy's default.
        hsdp_groups: Number of groups of processes that each hold all weights; None for the strategy's default.
        cpu_offload: See ``ModelParallel``.

    Raises:
        UserError: A size is not positive, or the strategy does not support a setting.
    """
    for name, size, supported in (
        ("tensor_parallel", tensor_parallel, TENSOR_PARALLEL_STRATEGIES),
        ("hsdp_groups", hsdp_groups, ("hsdp",)),
    ):
        if size is not None and size < 1:
            raise UserError(f"{name} is {size}; it must be positive")
        if size is not None and strategy not in supported:
            raise UserError(
                f"{name} is {size}, which is not supported with --trainer.strategy {strategy}; choose "
                f"{' or '.join((', '.join(supported[:-1]), supported[-1]) if supported[1:] else supported)}, or set "
                f"--{name} null"
            )
    if hsdp_groups == 1:
        raise UserError("hsdp_groups is 1, which shards the model across all processes; use --trainer.strategy fsdp2")
    if cpu_offload and strategy not in TENSOR_PARALLEL_SIZES:
        raise UserError(
            f"cpu_offload is true, but --trainer.strategy is {strategy}; use fsdp2 or hsdp, or set --cpu_offload false"
        )
    if tensor_parallel is None and hsdp_groups is None and not cpu_offload:
        return strategy
    size = TENSOR_PARALLEL_SIZES[str(strategy)] if tensor_parallel is None else tensor_parallel
    groups = hsdp_groups if strategy == "hsdp" else 1
    sized = f"{strategy}_{size or 'all'}_{groups or 'machines'}{'_cpu_offload' if cpu_offload else ''}"
    settings: dict[str, Any] = {"tensor_parallel_size": size, "groups": groups, "cpu_offload": cpu_offload}
    StrategyRegistry.register(sized, ModelParallel, override=True, **settings)
    return sized  # return a name, because Lightning rejects float64 with a strategy object


def validate_cpu_offload(tensor_parallel: int, precision: str) -> None:
    """Check that sharded weights can stay in the memory of the CPU.

    Args:
        tensor_parallel: Size of a tensor-parallel group.
        precision: The Trainer's precision.

    Raises:
        UserError: Tensor parallelism would need the weights on the GPU, or gradients are scaled there.
    """
    if tensor_parallel > 1:
        raise UserError(
            "cpu_offload is true, which tensor parallelism does not support; use --trainer.strategy fsdp2, or set "
            "--cpu_offload false"
        )
    if precision == "16-mixed":
        raise UserError(
            "cpu_offload is true, which --trainer.precision 16-mixed does not support, because gradients are scaled on "
            "the GPU; use bf16-mixed or 32-true"
        )


def replace_multiprocessing_launcher(strategy: Strategy) -> str | None:
    """Make a DDP strategy start its processes in the same way as ``ddp``, instead of forking or spawning them.

    The computation is the same. A forked or spawned process would return neither its progress nor the state of the
    callbacks to this process. In addition, forking is unsafe once threads have started, and spawning would copy the
    data.

    Returns:
        The start method that was replaced, or None if the strategy does not fork or spawn processes.

    Raises:
        UserError: The strategy cannot start its processes in another way.
    """
    method = multiprocessing_start_method(strategy)
    if method is None:
        return None
    if not isinstance(strategy, DDPStrategy):
        raise UserError(f"--trainer.strategy {type(strategy).__name__} is not supported; use ddp or fsdp2")
    if hasattr(sys, "ps1"):
        raise UserError(
            "an interactive session has no script that several processes could run; run python -m "
            "lit_gpt_scratch.fit in a shell, or use --trainer.devices 1"
        )
    start_as_scripts(strategy)
    return method


for name, size in TENSOR_PARALLEL_SIZES.items():
    StrategyRegistry.register(
        name, ModelParallel, tensor_parallel_size=size, groups=None if name == "hsdp" else 1, override=True
    )
