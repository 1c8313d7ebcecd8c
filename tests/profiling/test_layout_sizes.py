"""Memory per rank against arithmetic for a small network."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.optim import AdamW, Muon
from lit_gpt_scratch.profiling.accelerators import parse_machine
from lit_gpt_scratch.profiling.layout_sizes import (
    TrainingSetup,
    fits,
    measure_layout,
    rank_memory,
    simulate_activations,
    suggest_flags,
)

# Weights of a block: q, o 64 x 64; k, v 32 x 64; three matrices 64 x 128; two norms of the block.
CONFIG = GPTConfig(n_layer=3, n_head=4, n_kv_head=2, n_embd=64, ffn_dim=128, qk_norm=False)
MATRICES = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128
BLOCK, TABLE, VOCABULARY = MATRICES + 2 * 64, 512 * 64, 512


def make_setup(**changes: Any) -> TrainingSetup:
    setup = TrainingSetup(
        config=CONFIG, vocab_size=VOCABULARY, block_size=32, batch_size=4, accumulate=2, precision="bf16-mixed",
        strategy="fsdp2", tensor_parallel=1, checkpointing=False, optimizer=AdamW(), averaged=False, clips=True,
        machine=parse_machine("8xh100"),
    )  # fmt: skip
    return replace(setup, **changes)


def test_whole_network_is_extrapolated_from_two_blocks() -> None:
    sizes = measure_layout(make_setup(optimizer=Muon()))
    total = 3 * BLOCK + 2 * TABLE + 64
    assert sizes.parameters.total() == total
    assert sizes.whole["weights"] == sizes.whole["gradients"] == 4 * total
    assert sizes.whole["optimizer"] == 4 * (3 * MATRICES + 2 * (total - 3 * MATRICES))  # Muon has one moment
    assert sizes.matrices == {(64, 64): 6, (32, 64): 6, (128, 64): 6, (64, 128): 3}
    assert sizes.groups["muon", "matrices", "tensors"] == 21
    # 6 FLOPs per weight of a linear layer, and 12 * n_embd * context per block for attention.
    assert sizes.flops_per_token == 6 * (3 * MATRICES + TABLE) + 3 * 12 * 64 * 32


def test_fsdp2_divides_everything_by_the_ranks() -> None:
    sizes = measure_layout(make_setup())
    assert sizes.block == BLOCK
    assert sizes.root == 2 * TABLE + 64
    assert sizes.local == Counter({part: n // 8 for part, n in sizes.whole.items()})


def test_tensor_parallelism_replicates_norms() -> None:
    sizes = measure_layout(make_setup(strategy="tp", tensor_parallel=2, machine=parse_machine("2xh100")))
    assert sizes.block == MATRICES // 2 + 2 * 64
    assert sizes.local["weights"] == 4 * (3 * (MATRICES // 2 + 2 * 64) + TABLE + 64)
    both = measure_layout(make_setup(strategy="fsdp2_tp", tensor_parallel=2))
    assert both.block == sizes.block
    assert both.local["weights"] == sizes.local["weights"] // 4


def test_parts_of_the_memory() -> None:
    setup = make_setup(averaged=True)
    sizes = measure_layout(setup)
    memory = rank_memory(setup, sizes)
    assert memory["weights"] == memory["gradients"] == memory["average"] == sizes.whole["weights"] // 8
    assert memory["optimizer"] == 2 * memory["weights"]
    # Two blocks and the gradient of one in bfloat16, this gradient in float32; everything outside in float32.
    assert memory["gathered"] == BLOCK * (3 * 2 + 4) + 2 * 4 * (2 * TABLE + 64)
    assert memory["logits"] == 2 * 4 * (4 * 32 * VOCABULARY)
    ddp = rank_memory(replace(setup, strategy="ddp"), measure_layout(replace(setup, strategy="ddp")))
    assert ddp["weights"] == ddp["gathered"] == sizes.whole["weights"]
    half = replace(setup, precision="bf16-true", averaged=False)
    assert rank_memory(half, measure_layout(half))["weights"] == memory["weights"] // 2


def test_logits_of_a_chunk_do_not_depend_on_the_rows() -> None:
    """Logits of a position take 2,048 bytes."""
    setup = make_setup(max_logits_mb=0.07, checkpointing=True)  # 34 positions fit
    assert setup.loss_chunk_size == 32
    memory, twice = (rank_memory(each, measure_layout(each)) for each in (setup, replace(setup, batch_size=8)))
    assert memory["logits"] == twice["logits"] == 4 * 4 * 32 * VOCABULARY
    chunked, whole = (replace(setup, batch_size=64, max_logits_mb=size) for size in (0.07, 10))
    assert whole.loss_chunk_size is None
    memory = rank_memory(chunked, measure_layout(chunked))
    log_probabilities = 4 * 64 * 32 * VOCABULARY  # which a loss in chunks does not save
    head = 4 * TABLE  # bfloat16 copies of its weight and gradient; FSDP2 holds the gradient itself
    waiting = 2 * 64 * 32 * (VOCABULARY + 64)  # gradients of the logits, and hidden states, in bfloat16
    assert rank_memory(whole, measure_layout(whole))["activations"] - memory["activations"] == pytest.approx(
        log_probabilities - head - waiting, rel=0.2
    )


def test_activations_are_linear_in_rows_and_blocks() -> None:
    sizes = simulate_activations(CONFIG, VOCABULARY, 32, "bf16-mixed", False)
    inputs = simulate_activations(CONFIG, VOCABULARY, 32, "bf16-mixed", True)
    assert sizes.block_fixed == 2 * MATRICES  # autocast keeps a copy of each matrix
    assert inputs.block_row == 4 * 32 * 64  # the residual stream in float32
    assert sizes.row >= 4 * 32 * VOCABULARY  # log-probabilities
    many = simulate_activations(replace(CONFIG, n_layer=7), VOCABULARY, 32, "bf16-mixed", False)
    assert many == sizes


def test_activation_checkpointing_keeps_inputs_and_one_block() -> None:
    setup = make_setup()
    full, inputs = (simulate_activations(CONFIG, VOCABULARY, 32, "bf16-mixed", again) for again in (False, True))
    memory = rank_memory(replace(setup, checkpointing=True), measure_layout(setup))
    block = full.block_fixed + 4 * full.block_row
    assert memory["activations"] == inputs.fixed + 4 * (inputs.row + 3 * inputs.block_row) + block


def with_memory(setup: TrainingSetup, n_bytes: float) -> TrainingSetup:
    machine = setup.machine
    return replace(setup, machine=machine._replace(accelerator=machine.accelerator._replace(memory=n_bytes)))


def needed(setup: TrainingSetup) -> int:
    return rank_memory(setup, measure_layout(setup)).total()


@pytest.mark.parametrize(
    ("change", "flags"),
    [
        ({"strategy": "fsdp2"}, {"--trainer.strategy": "fsdp2"}),
        ({"checkpointing": True}, {"--model.activation_checkpointing": "true"}),
    ],
)
def test_one_flag_that_suffices_is_suggested(change: dict[str, Any], flags: dict[str, str]) -> None:
    large = GPTConfig(n_layer=50, n_head=4, n_kv_head=2, n_embd=64, ffn_dim=128, qk_norm=False)
    rows = {"checkpointing": 64}.get(next(iter(change)), 1)
    setup = make_setup(config=large, strategy="ddp", batch_size=rows)
    setup = with_memory(setup, needed(replace(setup, **change)))
    assert not fits(setup)
    assert suggest_flags(setup) == (flags, setup.machine.accelerator.memory)


def test_smaller_micro_batches_keep_the_step() -> None:
    setup = make_setup(batch_size=12, checkpointing=True)
    setup = with_memory(setup, needed(replace(setup, batch_size=3)))
    flags, _ = suggest_flags(setup) or ({}, 0)
    assert flags == {"--data.batch_size": "3", "--data.tokens_per_step": f"{12 * 32 * 8 * 2}"}


def test_state_in_bfloat16_is_suggested_before_weights_in_bfloat16() -> None:
    setup = make_setup(config=replace(CONFIG, n_layer=400, dropout=0.1), batch_size=1, checkpointing=True)
    rounded = replace(setup, optimizer=AdamW(bf16_state=True))
    assert measure_layout(rounded).local["optimizer"] == measure_layout(setup).local["optimizer"] / 2
    assert suggest_flags(with_memory(setup, needed(rounded))) == (
        {"--model.optimizer.bf16_state": "true"},
        needed(rounded),
    )
    large_decay = replace(setup, optimizer=AdamW(beta2=0.999))
    flags, _ = suggest_flags(with_memory(large_decay, needed(rounded))) or ({}, 0)
    assert flags == {"--trainer.precision": "bf16-true"}


@pytest.mark.slow
def test_flags_that_are_not_needed_are_removed() -> None:
    """bf16-true suffices together with checkpointing, so tensor parallelism is not suggested."""
    setup = make_setup(config=replace(CONFIG, n_layer=400), batch_size=1)
    enough = needed(replace(setup, checkpointing=True, precision="bf16-true"))
    setup = with_memory(setup, enough)
    flags, _ = suggest_flags(setup) or ({}, 0)
    assert "--tensor_parallel" not in flags or not fits(replace(setup, checkpointing=True, precision="bf16-true"))
    assert suggest_flags(with_memory(setup, 1000)) is None


def test_cpu_offload_is_suggested_if_nothing_else_helps() -> None:
    setup = make_setup(config=replace(CONFIG, n_layer=400), batch_size=1, checkpointing=True)
    offloaded = replace(setup, cpu_offload=True)
    memory = rank_memory(offloaded, measure_layout(offloaded))
    assert not {"weights", "gradients", "optimizer"} & memory.keys()
    assert memory["gathered"] == rank_memory(setup, measure_layout(setup))["gathered"]
    assert suggest_flags(with_memory(setup, needed(offloaded))) == ({"--cpu_offload": "true"}, needed(offloaded))
    single = replace(offloaded, machine=parse_machine("1xh100"))
    assert rank_memory(single, measure_layout(single)).keys() == memory.keys()


def test_heads_must_be_divisible() -> None:
    with pytest.raises(UserError, match=r"model.gpt.n_kv_head is 2, which is not divisible by 4"):
        measure_layout(make_setup(strategy="fsdp2_tp", tensor_parallel=4))
