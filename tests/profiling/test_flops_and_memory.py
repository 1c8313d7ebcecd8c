"""FLOPs, parameters and memory against PyTorch's own counters."""

import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.losses.chunked_cross_entropy import chunked_cross_entropy
from lit_gpt_scratch.losses.cross_entropy import token_cross_entropy
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.activation_checkpointing import ActivationCheckpointing
from lit_gpt_scratch.optim import AdamW, Muon, OptimizerRecipe
from lit_gpt_scratch.optim.ema import ExponentialMovingAverage
from lit_gpt_scratch.profiling.flops_and_memory import (
    activation_bytes,
    count_parameters_by_part,
    host_memory,
    require_model_fits_memory,
    state_bytes,
    training_flops_per_token,
)

SHAPES = [
    GPTConfig(n_layer=2, n_head=2, n_embd=32),
    GPTConfig(n_layer=1, n_head=4, n_embd=64, head_dim=24, feed_forward="relu2", position="learned"),
    GPTConfig(
        n_layer=3, n_head=2, n_embd=32, value_embeddings=True, bigram_rows=100, smear=True, residual_scalars=True
    ),
    GPTConfig(n_layer=2, n_head=2, n_embd=32, bias=True, norm="layernorm", feed_forward="geglu", tied_embeddings=True),
]


@pytest.mark.parametrize("config", SHAPES)
def test_flops_match_torch_flop_counter(config: GPTConfig) -> None:
    net = GPT(config, vocab_size=97, block_size=40)
    ids = torch.randint(97, (3, 40))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net(ids).sum().backward()
    assert counter.get_total_flops() == training_flops_per_token(net) * ids.numel()


@pytest.mark.parametrize("config", SHAPES)
def test_parts_sum_to_all_parameters(config: GPTConfig) -> None:
    net = GPT(config, vocab_size=97, block_size=40)
    parts = count_parameters_by_part(net)
    assert sum(parts.values()) == sum(p.numel() for p in net.parameters())
    assert parts.get("head", 0) == (0 if config.tied_embeddings else 97 * config.n_embd)
    assert all(n > 0 for n in parts.values()), parts


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("recipe", [AdamW(), Muon(), Muon(row_beta=0.95)])
def test_state_bytes_match_an_optimizer_after_a_step(recipe: OptimizerRecipe, ema_decay: float | None) -> None:
    net = GPT(SHAPES[0], vocab_size=97, block_size=40)
    optimizer = recipe.build(net)
    ExponentialMovingAverage(ema_decay).attach(optimizer, lambda: 0)
    net(torch.randint(97, (1, 40))).sum().backward()
    optimizer.step()
    moments = sum(
        tensor.nbytes for state in optimizer.state.values() for tensor in state.values() if tensor.numel() > 64
    )  # without step counters and NorMuon's statistic per neuron
    weights = sum(p.nbytes for p in net.parameters())
    gradients = sum(p.grad.nbytes for p in net.parameters() if p.grad is not None)
    assert state_bytes(optimizer, ema_decay is not None) == pytest.approx(weights + gradients + moments, rel=0.02)


@pytest.mark.parametrize(
    ("dtype", "autocast", "checkpointing"),
    [
        (torch.float32, False, False), (torch.float32, True, False), (torch.float64, False, False),
        (torch.bfloat16, False, False), (torch.float32, False, True), (torch.float32, True, True),
        (torch.float32, False, "keep_attention"), (torch.float32, True, "keep_attention"),
        (torch.float32, False, "keep_matmuls"), (torch.float32, True, "keep_matmuls"),
    ],
)  # fmt: skip
def test_activation_bytes_match_a_profiled_forward_pass(
    dtype: torch.dtype, autocast: bool, checkpointing: ActivationCheckpointing
) -> None:
    config, shape = GPTConfig(n_layer=2, n_head=2, n_embd=64), (4, 128)
    net = GPT(config, vocab_size=500, block_size=128).to(dtype)
    net.activation_checkpointing = checkpointing
    ids = torch.randint(500, shape)
    with profile(profile_memory=True) as profiled, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = token_cross_entropy(net(ids), ids)
    measured = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
    del kept
    expected = activation_bytes(config, 500, 128, 4, torch.device("cpu"), dtype, autocast, checkpointing)
    assert expected == pytest.approx(measured, rel=0.03)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that exist at the same time, except for the given ones."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("config", [SHAPES[0], SHAPES[3]])
def test_activation_bytes_match_the_peak_of_a_loss_in_chunks(config: GPTConfig, autocast: bool) -> None:
    net = GPT(config, vocab_size=5000, block_size=128)
    ids = torch.randint(5000, (8, 128))
    with LiveBytes([*net.parameters(), *net.buffers()]) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = chunked_cross_entropy(net.head, net.finalize_output, net.hidden_states(ids), ids, 64)
        loss.backward()
    expected = activation_bytes(config, 5000, 128, 8, torch.device("cpu"), torch.float32, autocast, loss_chunk_size=64)
    assert expected == pytest.approx(live.peak, rel=0.15)


MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("", {}, MACHINE),
        ("0::/\n", {"memory.max": "max"}, MACHINE),
        ("0::/\n", {"memory.max": "1000000"}, 1_000_000),
        ("0::/a/b\n", {"a/memory.max": "7000", "a/b/memory.max": "9000"}, 7000),
        ("0::/outside/the/namespace\n", {"memory.max": "5000"}, 5000),
        ("5:cpu:/a\n4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "6000"}, 6000),
        ("4:memory:/docker/x\n", {"memory/memory.limit_in_bytes": "4000"}, 4000),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, MACHINE),
        ("9:name=systemd:/a:b\n", {"a:b/memory.max": "10"}, MACHINE),
    ],
)
def test_memory_is_limited_by_the_container(
    tmp_path: Path, membership: str, files: dict[str, str], expected: int
) -> None:
    """Version 1 and 2 of control groups, with limits of a parent, inside and outside of a container."""
    (tmp_path / "membership").write_text(membership)
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    assert host_memory(tmp_path / "cgroup", tmp_path / "membership") == expected


@pytest.mark.parametrize(
    ("megabytes", "n_shards", "local_processes", "is_frozen", "dtype"),
    [
        (25.2, 1, 1, False, torch.float32),  # 3,145,728 weights of 4 bytes, and their gradients
        (50.4, 1, 2, False, torch.float32),  # both processes of a machine have a copy
        (25.2, 2, 2, False, torch.float32),
        (12.6, 2, 1, False, torch.float32),  # two machines
        (12.6, 1, 1, True, torch.float32),
        (12.6, 1, 1, False, torch.bfloat16),
    ],
)
def test_model_larger_than_the_container_is_an_error(
    monkeypatch: pytest.MonkeyPatch, megabytes: float, n_shards: int, local_processes: int, is_frozen: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    config = GPTConfig(n_layer=4, n_head=4, n_embd=256, ffn_dim=682, position="learned")
    sizes = torch.device("cpu"), n_shards, local_processes, is_frozen
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        monkeypatch.setattr("lit_gpt_scratch.profiling.flops_and_memory.host_memory", lambda: 1.1e6 * megabytes)
        require_model_fits_memory(config, 1, 1, *sizes)
        monkeypatch.setattr("lit_gpt_scratch.profiling.flops_and_memory.host_memory", lambda: 0.9e6 * megabytes)
        with pytest.raises(UserError, match=r"model\.gpt alone require 0\.0 GiB.* --trainer.strategy fsdp2"):
            require_model_fits_memory(config, 1, 1, *sizes)
    finally:
        torch.set_default_dtype(default)
