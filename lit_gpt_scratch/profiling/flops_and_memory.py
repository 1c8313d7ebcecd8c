"""Estimate the cost of a training step before running it: parameters, floating-point operations and memory."""

import os
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.losses.chunked_cross_entropy import max_waiting_rows
from lit_gpt_scratch.losses.cross_entropy import token_cross_entropy
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.activation_checkpointing import ActivationCheckpointing
from lit_gpt_scratch.model.local_shard import to_local
from lit_gpt_scratch.model.module_metadata import flops_per_token, parameter_roles

CGROUPS: Final = Path("/sys/fs/cgroup")
CGROUP_MEMBERSHIP: Final = Path("/proc/self/cgroup")
OPTIMIZER_MOMENTS = {"muon": 1, "adamw": 2}
"""Number of optimizer state tensors with the shape of the parameter, keyed by update rule."""


def count_parameters_by_part(net: GPT) -> dict[str, int]:
    """Count parameters by part.

    The parts are embeddings, attention, feed-forward layers, modules for multi-token prediction, untied head, and
    gains and biases.
    """
    parts, roles = Counter[str](), parameter_roles(net)
    for module in net.modules():
        if isinstance(module, nn.Embedding):
            parts["embeddings"] += module.weight.numel()
    for block in net.all_blocks[: len(net.blocks)]:
        for part, layers in (("attention", block.attention), ("feed-forward", block.feed_forward)):
            parts[part] += sum(p.numel() for p in layers.parameters() if roles[p] != "vectors")
    parts["multi-token prediction"] = sum(p.numel() for p in net.multi_token_modules.parameters())
    parts["head"] = 0 if net.head.weight is net.embedding.weight else net.head.weight.numel()
    parts["gains and biases"] = sum(p.numel() for p in net.parameters()) - parts.total()
    return {part: n for part, n in parts.items() if n}


def require_model_fits_memory(
    config: GPTConfig,
    vocab_size: int,
    block_size: int,
    device: torch.device,
    n_shards: int,
    local_processes: int,
    is_frozen: bool = False,
) -> None:
    """Check that each process has the memory for its part of a model, without building it.

    On a CPU, the processes of a machine share its memory, or that of their container. The weights are stored in torch's
    default dtype.

    Args:
        config: The model config.
        vocab_size: Number of token ids.
        block_size: Context length in tokens.
        device: Device of the weights.
        n_shards: Number of processes across which the model is sharded.
        local_processes: Number of processes on this machine.
        is_frozen: Whether most weights have no gradients.

    Raises:
        UserError: The model cannot be built, or its weights and gradients alone do not fit.
    """
    nets = [build_on_meta(config.resized(n), vocab_size, block_size) for n in (1, 2)]
    one, two = (sum(p.nbytes for p in net.parameters()) for net in nets)
    tables = sum(buffer.nbytes for buffer in nets[0].buffers())  # each process has them
    copies = 1 if is_frozen else 2
    needed = copies * (one + (config.n_layer - 1) * (two - one)) / n_shards + tables
    if device.type == "cuda":
        memory: float | None = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = host_memory()
        memory = None if memory is None else memory / local_processes
    if memory is not None and needed > memory:
        each = " in each process" if max(n_shards, local_processes) > 1 else ""
        raise UserError(
            f"the weights {'' if is_frozen else 'and gradients '}of model.gpt alone require {needed / 2**30:,.1f} GiB"
            f"{each}, but only {memory / 2**30:,.1f} GiB are available; choose a smaller n_layer, n_embd or "
            "vocabulary, or shard the model across more machines or GPUs with --trainer.strategy fsdp2"
        )


def build_on_meta(config: GPTConfig, vocab_size: int, block_size: int) -> GPT:
    """Build a network whose tensors have shapes but no memory.

    Raises:
        UserError: The sizes are too large for a tensor.
    """
    try:
        with torch.device("meta"):
            return GPT(config, vocab_size, block_size)
    except UserError:
        raise
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"model.gpt cannot be built: {str(error).splitlines()[0]}; choose smaller sizes") from error


def host_memory(cgroups: Path = CGROUPS, membership: Path = CGROUP_MEMBERSHIP) -> int | None:
    """Return the memory of this machine in bytes, or the memory limit of its container or job if that is lower.

    Args:
        cgroups: Folder in which Linux mounts the control groups, version 1 or 2.
        membership: File that lists the control groups of this process.

    Returns:
        The number of bytes, or None if the operating system does not report it.
    """
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    groups = membership.read_text(encoding="utf-8").splitlines() if membership.is_file() else []
    for _, controllers, path in (group.split(":", 2) for group in groups if group.count(":") >= 2):
        if controllers == "":  # version 2
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        # The limits of all parents apply, too. Inside a container, only the root may be visible.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root) and (folder / name).is_file():
                limit = (folder / name).read_text(encoding="ascii").strip()
                limits += [int(limit)] if limit.isdecimal() else []  # "max" if there is none
    return min(limits)


def training_flops_per_token(net: GPT, length: int | None = None) -> int:
    """Return the number of floating-point operations per token for a forward and backward pass.

    The count follows appendix B of the PaLM paper (https://arxiv.org/abs/2204.02311): 6 operations per weight of a
    linear layer, and 12 * n_layer * n_head * head_dim * T for attention, including the half that the causal mask
    removes. The backward pass requires twice as many operations as the forward pass.

    Args:
        net: The network.
        length: Number of tokens per sequence (T); the context length by default.
    """
    return 3 * flops_per_token(net, net.block_size if length is None else length)


def state_bytes(optimizer: Optimizer, averaged: bool = False) -> int:
    """Return the number of bytes that weights, gradients and optimizer state occupy in this process.

    Args:
        optimizer: The optimizer.
        averaged: Whether to include a moving average of the weights.
    """
    return state_bytes_by_part(optimizer, averaged).total()


def state_bytes_by_part(optimizer: Optimizer, averaged: bool = False) -> Counter[str]:
    """Return the bytes in this process of ``weights``, ``gradients``, ``optimizer`` state and ``average``.

    Args:
        optimizer: The optimizer.
        averaged: Whether there is a moving average of the weights.
    """
    parts: Counter[str] = Counter()
    for group in optimizer.param_groups:
        trained = [(to_local(p).numel(), p.element_size()) for p in group["params"] if p.requires_grad]
        held = sum(size * bytes_each for size, bytes_each in trained)
        moment = sum(2 * size for size, _ in trained) if group.get("bf16_state") else held
        moments = OPTIMIZER_MOMENTS.get(group.get("rule", "adamw"), 2)
        parts.update(weights=held, gradients=held, optimizer=moments * moment, average=averaged * held)
    return parts


def activation_bytes(
    config: GPTConfig,
    vocab_size: int,
    block_size: int,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    autocast: bool,
    checkpointing: ActivationCheckpointing = False,
    loss_chunk_size: int | None = None,
) -> int:
    """Return the size in bytes of the activations that an uncompiled model stores for a micro-batch's backward pass.

    A compiled model stores fewer activations. The forward pass is simulated with fake tensors, which have shapes but no
    data; the result is the size of all storages that still exist at its end. If the loss is computed in chunks, the
    result includes what it holds at its peak: the gradients of the hidden states and of the head, and the logits of one
    chunk with their gradients.

    Args:
        config: The model config.
        vocab_size: Number of token ids.
        block_size: Number of tokens per sequence.
        batch_size: Number of sequences per micro-batch.
        device: The device to simulate; none of its memory is allocated.
        dtype: Dtype of the weights.
        autocast: Whether matmuls run in bfloat16.
        checkpointing: What each block stores.
        loss_chunk_size: Number of positions per chunk of the loss; None computes all logits at once.
    """
    # FlexAttention is compiled and cannot be simulated; it uses about as much memory as the fused kernel.
    config = replace(config, attention_backend="manual" if config.attention_softcap else "sdpa")
    with FakeTensorMode(), torch.device(device):
        net = GPT(config, vocab_size, block_size, initialise=False)
        net.activation_checkpointing = checkpointing
        weights = {name: p.to(dtype) for name, p in net.named_parameters()}  # Module.to() fails with fake tensors
        ids = torch.zeros(batch_size, block_size, dtype=torch.int64)
        known = [*weights.values(), *net.buffers(), ids]
        autocasting = torch.autocast(device.type, torch.bfloat16, enabled=autocast)
        named = {f"net.{name}": weight for name, weight in weights.items()}
        live = _LiveStorages(known)
        with live:
            if loss_chunk_size is None or ids.numel() <= loss_chunk_size:
                with autocasting:
                    loss = functional_call(_Losses(net), named, (ids,))
                n_bytes = live.n_bytes  # without autocast's cache
                del loss  # it kept the activations alive until here
                return n_bytes
            with autocasting:
                states: list[Tensor] = functional_call(_HiddenStates(net), named, (ids,))
                return live.n_bytes - states[0].nbytes + _chunked_loss_bytes(net, states, loss_chunk_size)


class _LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Context manager that records the storages of all tensors that operators return.

    Args:
        known: Tensors whose storages are not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._found: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    @property
    def n_bytes(self) -> int:
        """Total size in bytes of the recorded storages that still exist."""
        return sum(size for storage, size in self._found.values() if storage() is not None)

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._found[storage._cdata] = weakref.ref(storage), storage.nbytes()
        return out


class _HiddenStates(nn.Module):
    """The network without its head, as a module, so that it can be called with other weights."""

    def __init__(self, net: GPT) -> None:
        super().__init__()
        self.net = net

    @override
    def forward(self, ids: Tensor) -> list[Tensor]:
        return self.net.hidden_states_by_depth(ids)


class _Losses(_HiddenStates):
    """The losses of the network at all depths, with the logits of all positions in memory."""

    @override
    def forward(self, ids: Tensor) -> list[Tensor]:
        states = super().forward(ids)
        return [token_cross_entropy(self.net.apply_head(x), ids[:, depth:])[0] for depth, x in enumerate(states)]


def _chunked_loss_bytes(net: GPT, states: list[Tensor], loss_chunk_size: int) -> int:
    """Return the peak size in bytes of the tensors that ``chunked_cross_entropy`` creates for hidden states.

    The gradients that it computes for the states of one depth are still in memory when those of the next are computed.
    """
    x = states[0]
    exact = torch.promote_types(x.dtype, torch.float32).itemsize
    logits = loss_chunk_size * net.head.out_features * exact
    head = net.head.weight.numel() * exact
    waiting = 0
    if torch.is_autocast_enabled(x.device.type):
        head *= 2  # bfloat16 copies of the weight and of the gradient of some chunks
        weight = net.head.weight.to(torch.bfloat16)
        rows = max_waiting_rows(weight, loss_chunk_size, x.flatten(0, 1).size(0))
        waiting = rows * (weight.size(0) + weight.size(1)) * weight.element_size()
    held = sum(x.nbytes for x in states) + len(states) * head
    return held + waiting + 4 * logits  # the logits, the log-probabilities and their gradients
