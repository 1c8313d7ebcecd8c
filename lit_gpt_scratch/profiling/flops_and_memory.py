"""Cost of a training step, computed before it runs: parameters, floating-point operations, memory."""

import os
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.optim.optimizer import Optimizer

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.losses.cross_entropy import token_cross_entropy
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.gpt import Block
from lit_gpt_scratch.model.module_metadata import flops_per_token
from lit_gpt_scratch.optim.dtensor import to_local

OPTIMIZER_MOMENTS = {"muon": 1, "adamw": 2}
"""Tensors of a parameter's size that an update rule keeps as its state."""


def count_parameters_by_part(net: GPT) -> dict[str, int]:
    """Number of parameters of embeddings, attention, feed-forward, the head if it is not tied, and all others."""
    parts: Counter[str] = Counter()
    for module in net.modules():
        if isinstance(module, nn.Embedding):
            parts["embeddings"] += module.weight.numel()
        elif isinstance(module, Block):
            for part, layers in (("attention", module.attention), ("feed-forward", module.feed_forward)):
                parts[part] += sum(layer.weight.numel() for layer in layers.modules() if isinstance(layer, nn.Linear))
    parts["head"] = 0 if net.head.weight is net.embedding.weight else net.head.weight.numel()
    parts["gains and biases"] = sum(p.numel() for p in net.parameters()) - parts.total()
    return {part: n for part, n in parts.items() if n}


def require_model_fits_memory(
    config: GPTConfig, vocab_size: int, block_size: int, device: torch.device, processes: int
) -> None:
    """Check that a model that is not built yet can fit into the memory of the machine or the accelerator.

    Raises:
        UserError: Weights and gradients alone do not fit, even if they are sharded over all processes.
    """
    try:
        with torch.device("meta"):  # shapes without memory
            one, two = (
                sum(p.numel() for p in GPT(replace(config, n_layer=n), vocab_size, block_size).parameters())
                for n in (1, 2)
            )
    except (RuntimeError, TypeError) as error:  # sizes that no tensor can have
        raise UserError(f"model.gpt cannot be built: {str(error).splitlines()[0]}") from error
    needed = 2 * 4 * (one + (config.n_layer - 1) * (two - one))
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if needed > memory * processes:
        raise UserError(
            f"model.gpt: weights and gradients alone need {needed / 2**30:,.1f} GiB, but the machine has "
            f"{memory * processes / 2**30:,.1f}; choose a smaller n_layer, n_embd or vocabulary"
        )


def training_flops_per_token(net: GPT) -> int:
    """Floating-point operations of the forward and backward pass per token, at full context length.

    As in PaLM's appendix B (https://arxiv.org/abs/2204.02311): 6 per weight of a linear layer, and
    12 * n_layer * n_head * head_dim * T for attention, without deducting the causal half. The backward pass costs twice
    as much as the forward pass.
    """
    return 3 * flops_per_token(net, net.block_size)


def state_bytes(optimizer: Optimizer, averaged: bool = False) -> int:
    """Bytes on this process of weights, gradients, optimizer state and, if any, the moving average of the weights."""
    return sum(
        to_local(p).numel() * p.element_size() * (2 + averaged + OPTIMIZER_MOMENTS.get(group.get("rule", "adamw"), 2))
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad
    )


def activation_bytes(
    config: GPTConfig,
    vocab_size: int,
    block_size: int,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    autocast: bool,
    recompute: bool = False,
) -> int:
    """Bytes of activations that one micro-batch keeps for its backward pass; a compiler would save some.

    The forward pass is simulated with fake tensors, which have shapes but no data; every storage counts once.

    Args:
        config: The architecture.
        vocab_size: Number of token ids.
        block_size: Tokens in a window.
        batch_size: Windows in a micro-batch.
        device: The device to simulate; nothing is allocated there.
        dtype: Of the weights.
        autocast: Whether matrix products are in bfloat16.
        recompute: Whether activation checkpointing keeps only the inputs of blocks.
    """
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    # FlexAttention is compiled and cannot be simulated; it saves at most as much as the fused kernel.
    config = replace(config, attention_backend="manual" if config.attention_softcap else "sdpa")
    with FakeTensorMode(), torch.device(device):
        net = GPT(config, vocab_size, block_size)
        net.recompute = recompute
        weights = {name: p.to(dtype) for name, p in net.named_parameters()}  # Module.to() fails with fake tensors
        weight_storages = {weight.untyped_storage()._cdata for weight in weights.values()}
        ids = torch.zeros(batch_size, block_size, dtype=torch.int64)
        with (
            saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast(device.type, torch.bfloat16, enabled=autocast),
        ):
            loss, _ = token_cross_entropy(functional_call(net, weights, (ids,)), ids)
        return sum(size for storage, size in kept.items() if storage not in weight_storages) + loss.element_size()
