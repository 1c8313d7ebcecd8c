"""The predicted step against arithmetic."""

from dataclasses import replace

import pytest

from lit_gpt_scratch.optim import Muon
from lit_gpt_scratch.profiling import step_time
from lit_gpt_scratch.profiling.accelerators import parse_machine
from lit_gpt_scratch.profiling.layout_sizes import measure_layout, simulate_activations
from lit_gpt_scratch.profiling.step_time import (
    INTERFERENCE,
    StepTime,
    collective_bandwidth,
    newton_schulz_flops,
    predict_step,
    ring_bytes,
    utilization,
)
from tests.profiling.test_layout_sizes import BLOCK, CONFIG, MATRICES, TABLE, VOCABULARY, make_setup

TOKENS, PEAK = 4 * 32, 989e12


def predict(**changes: object) -> StepTime:
    setup = make_setup(**changes)
    return predict_step(setup, measure_layout(setup))


def test_computation_of_one_device() -> None:
    time = predict(strategy="single", machine=parse_machine("1xh100"))
    linear = 2 * TOKENS * (3 * MATRICES + TABLE)
    scores = 3 * 4 * TOKENS * 64 * 32 / 2  # causal
    # Two micro-batches; the backward pass has twice the matmuls, and 2.5 times those of attention.
    assert time.matmuls == pytest.approx(2 * 3 * linear / (0.9 * 0.803 * PEAK))
    assert time.attention == pytest.approx(2 * 3.5 * scores / (0.35 * PEAK))
    sizes = simulate_activations(CONFIG, VOCABULARY, 32, "bf16-mixed", False)
    saved = 4 * (sizes.row + 3 * sizes.block_row)
    assert time.memory_bound == pytest.approx(2 * 5 * saved / (0.9 * 3.35e12))
    parameters = 3 * BLOCK + 2 * TABLE + 64
    assert time.optimizer == pytest.approx((7 + 3) * 4 * parameters / (0.9 * 3.35e12))  # AdamW and clipping
    assert time.communication == time.sent_bytes == 0


def test_only_local_blocks_skip_what_is_outside_the_window() -> None:
    one = {"strategy": "single", "machine": parse_machine("1xh100")}
    plain = predict(**one)
    for every, local_blocks in ((None, 3), (2, 2), (3, 2)):
        config = replace(CONFIG, sliding_window=4, sliding_window_pattern=every)
        time = predict(config=config, **one)
        assert time.attention / plain.attention == pytest.approx((local_blocks * 4 / 32 / 0.5 + 3 - local_blocks) / 3)
        assert replace(time, attention=0.0) == replace(plain, attention=0.0)


def test_recomputation_repeats_the_forward_pass_of_the_blocks() -> None:
    one = {"strategy": "single", "machine": parse_machine("1xh100")}
    plain, again = predict(**one), predict(**one, checkpointing=True)
    blocks = 2 * 2 * TOKENS * 3 * MATRICES / (0.9 * 0.803 * PEAK)
    assert again.matmuls - plain.matmuls == pytest.approx(blocks)
    assert again.attention / plain.attention == pytest.approx(4.5 / 3.5)
    assert again.optimizer == plain.optimizer


def test_fsdp2_gathers_twice_in_bfloat16_and_reduces_in_float32() -> None:
    blocks, root = 3 * BLOCK, 2 * TABLE + 64
    per_micro_batch = 7 / 8 * (blocks * (2 + 2 + 4) + root * (4 + 4))
    assert predict().sent_bytes == pytest.approx(2 * per_micro_batch)


def test_ddp_reduces_once_per_step() -> None:
    parameters = 3 * BLOCK + 2 * TABLE + 64
    assert predict(strategy="ddp").sent_bytes == pytest.approx(2 * 7 / 8 * 4 * parameters)


def test_tensor_parallelism_reduces_the_residual_stream_of_each_block() -> None:
    time = predict(strategy="tp", tensor_parallel=2, machine=parse_machine("2xh100"))
    stream = TOKENS * 64
    reduced = 2 * (1 / 2) * (3 * 4 * stream * 2 + stream * 2 + stream * 4)  # all-reduce: twice (n - 1) / n
    gathered = 1 / 2 * TOKENS * VOCABULARY * 2
    assert time.sent_bytes == pytest.approx(2 * (reduced + gathered))
    assert time.communication == pytest.approx(time.sent_bytes / (0.8 * 450e9))


def test_communication_is_hidden_by_computation_but_slows_it_down() -> None:
    assert step_time._overlap(10.0, 2.0) == pytest.approx(INTERFERENCE * 2)
    assert step_time._overlap(1.0, 10.0) == pytest.approx(9.0)


def test_rings_between_nodes_share_the_network() -> None:
    two = make_setup(machine=parse_machine("16xh100"))
    assert ring_bytes(16.0, 16) == 15.0
    assert collective_bandwidth(two, 8, 1) == pytest.approx(0.8 * 450e9)  # within a node
    assert collective_bandwidth(two, 16, 1) == pytest.approx(0.8 * 8 * 50e9)  # eight adapters
    assert collective_bandwidth(two, 2, 8) == pytest.approx(0.8 * 50e9)  # one rank of each node
    assert collective_bandwidth(two, 4, 4) == pytest.approx(0.8 * 2 * 50e9)


def test_muon_distributes_matrices_with_fsdp2_only() -> None:
    flops = {shape: newton_schulz_flops(*shape) for shape in ((64, 64), (32, 64), (128, 64))}
    assert newton_schulz_flops(128, 64) == 5 * (4 * 64 * 64 * 128 + 2 * 64**3) == newton_schulz_flops(64, 128)
    passes = {"adamw": 10, "muon": 15}
    for strategy, ranks, counts in (("fsdp2", 8, (1, 1, 2)), ("ddp", 1, (6, 6, 9))):
        setup = make_setup(strategy=strategy, optimizer=Muon())
        time = predict_step(setup, measure_layout(setup))
        work = sum(count * n for count, n in zip(counts, flops.values(), strict=True)) / (0.9 * 0.803 * PEAK)
        rules = {"muon": 3 * MATRICES, "adamw": 2 * TABLE + 64 + 3 * 128}
        traffic = sum(passes[rule] * 4 * n / ranks for rule, n in rules.items()) / (0.9 * 3.35e12)
        sent = 2 * 7 / 8 * 2 * 3 * MATRICES / 8 if ranks > 1 else 0
        assert time.optimizer == pytest.approx(work + traffic + sent / (0.8 * 450e9))


def test_utilization_counts_model_flops() -> None:
    setup = make_setup(checkpointing=True)
    sizes = measure_layout(setup)
    assert utilization(setup, sizes, 2.0) == pytest.approx(sizes.flops_per_token * 8 * 2 * TOKENS / (2 * 8 * PEAK))


def test_hybrid_sharding_sends_only_gradient_shards_between_machines() -> None:
    """Two machines: blocks are gathered within one; the shards of gradients are averaged across both."""
    sizes = measure_layout(make_setup(strategy="hsdp", machine=parse_machine("2x8xh100"), groups=2))
    alone = measure_layout(make_setup(machine=parse_machine("8xh100")))
    assert (sizes.local, sizes.block, sizes.root) == (alone.local, alone.block, alone.root)
    one = predict(machine=parse_machine("8xh100"))
    two = predict(strategy="hsdp", machine=parse_machine("2x8xh100"), groups=2)
    shard = 4 * (3 * sizes.block + sizes.root) / 8  # in float32
    assert two.sent_bytes - one.sent_bytes == pytest.approx(2 * 2 * shard / 2)  # of two micro-batches, an all-reduce
    assert (two.matmuls, two.attention, two.optimizer) == (one.matmuls, one.attention, one.optimizer)
