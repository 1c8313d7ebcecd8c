"""What a training step costs, worked out before it runs: parameters, floating-point operations, bytes."""

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
from lit_gpt_scratch.model.attention import Attention
from lit_gpt_scratch.model.feed_forward import FeedForward
from lit_gpt_scratch.optim.gradient_clipping import to_local

OPTIMIZER_MOMENTS = {"muon": 1, "adamw": 2}
"""Tensors of a parameter's size that an update rule remembers."""


def count_parameters_by_part(net: GPT) -> dict[str, int]:
    """Number of parameters of embeddings, attention and feed-forward, of the head if it is not tied, and the rest."""
    parts: Counter[str] = Counter()
    for module in net.modules():
        if isinstance(module, nn.Embedding):
            parts["embeddings"] += module.weight.numel()
        elif isinstance(module, Attention | FeedForward):
            part = "attention" if isinstance(module, Attention) else "feed-forward"
            parts[part] += sum(child.weight.numel() for child in module.children() if isinstance(child, nn.Linear))
    parts["head"] = 0 if net.head.weight is net.embedding.weight else net.head.weight.numel()
    parts["gains and biases"] = sum(p.numel() for p in net.parameters()) - parts.total()
    return {part: n for part, n in parts.items() if n}


def require_model_fits_memory(
    config: GPTConfig, vocab_size: int, block_size: int, device: torch.device, processes: int
) -> None:
    """Count the parameters of a model that is not built, against the memory of the machine or the accelerator.

    Raises:
        UserError: Weights and gradients alone do not fit, shared by all processes at best.
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
            f"model.gpt: weights and gradients alone need {needed / 2**30:,.1f} GiB, and there are "
            f"{memory * processes / 2**30:,.1f}; choose a smaller n_layer, n_embd or vocabulary"
        )


def training_flops_per_token(net: GPT) -> int:
    """Operations of one token's forward and backward pass in a full window.

    As in PaLM's appendix B (https://arxiv.org/abs/2204.02311): 6 for every weight that takes part in a matrix
    product, and 12 * n_layer * n_head * head_dim * T for attention's own products, the causal half not deducted.
    """
    weights = sum(module.weight.numel() for module in net.modules() if isinstance(module, nn.Linear))
    config = net.config
    return 6 * weights + 12 * config.n_layer * config.n_head * config.head_width * net.block_size


def state_bytes(optimizer: Optimizer, averaged: bool = False) -> int:
    """Bytes, on this process, of weights, gradients, the optimizer's moments and an average of the weights."""
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
    """Bytes that one micro-batch keeps for its backward pass, without a compiler, which would save some.

    The pass is played through with tensors that have shapes and no contents; every storage counts once.

    Args:
        config: The architecture.
        vocab_size: Number of token ids.
        block_size: Tokens in a window.
        batch_size: Windows in a micro-batch.
        device: Where it would run; nothing is allocated there.
        dtype: Of the weights.
        autocast: Whether products are done in 16 bits.
        recompute: Whether blocks keep their input alone.
    """
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    # FlexAttention, which keeps no more than the fused kernel does, is compiled and cannot be played through.
    config = replace(config, attention_backend="manual" if config.attention_softcap else "sdpa")
    with FakeTensorMode(), torch.device(device):
        net = GPT(config, vocab_size, block_size)
        net.recompute = recompute
        weights = {name: p.to(dtype) for name, p in net.named_parameters()}  # a module of such tensors has no to()
        own = {weight.untyped_storage()._cdata for weight in weights.values()}
        ids = torch.zeros(batch_size, block_size, dtype=torch.int64)
        with (
            saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast(device.type, torch.bfloat16, enabled=autocast),
        ):
            nats, _ = token_cross_entropy(functional_call(net, weights, (ids,)), ids)
        return sum(size for storage, size in kept.items() if storage not in own) + nats.element_size()
