"""Sizes that grow during a run: windows and steps against separate computations, step arithmetic, and resuming."""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.nn.functional import cross_entropy

from lit_gpt_scratch import lightning_compat
from lit_gpt_scratch.batch_types import IGNORE_INDEX, Batch
from lit_gpt_scratch.callbacks.throughput import Throughput
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.data.packing import PACKING_POLICIES, PackingPolicy
from lit_gpt_scratch.data.sampler import ShuffledOrder, ShuffledSampler
from lit_gpt_scratch.data.size_stages import SizeStages, Stages
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.optim import AdamW, Schedule
from lit_gpt_scratch.tasks import LanguageModel

Train = Callable[..., tuple[L.Trainer, LanguageModel, "Record"]]
WINDOWS: Stages = ((0.25, 8), (0.5, 16))
STEPS: Stages = ((0.25, 128), (0.5, 256))
"""Stages of a run with 32 tokens per window, micro-batches of 4 windows, and 512 tokens per step."""


class Record(L.Callback):
    """Records the initial weights, and the micro-batches of each optimizer step in order."""

    def __init__(self) -> None:
        self.steps: list[list[Batch]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        self.initial = {name: x.clone() for name, x in pl_module.net.state_dict().items()}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, _: int) -> None:
        if len(self.steps) == trainer.global_step:
            self.steps.append([])
        self.steps[-1].append(batch)


def rows(batch: Batch) -> list[tuple[int, ...]]:
    """The rows of a micro-batch, before they were split into windows."""
    return [tuple(row) for row in batch["input_ids"].reshape(-1, 32).tolist()]


def sequences(batch: Batch, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and labels of each window of ``length`` tokens or, with document ids, of each document within it."""
    ids, labels = batch["input_ids"], batch["labels"]
    documents = batch.get("document_ids", torch.zeros_like(ids))
    for b in range(len(ids)):
        for t in range(0, ids.shape[1], length):
            window = slice(t, t + length)
            for document in set(documents[b, window].tolist()):
                inside = documents[b, window] == document
                yield ids[b, window][inside], labels[b, window][inside]


def assert_trained_by_hand(
    model: LanguageModel, initial: dict[str, Tensor], steps: list[list[tuple[Batch, int]]]
) -> None:
    """Check the weights against those of a plain loop over steps of (micro-batch, window length) pairs."""
    trained = {name: x.clone() for name, x in model.net.state_dict().items()}
    model.net.load_state_dict(initial)
    optimizer = OPTIMIZER.build(model.net)
    for step in steps:
        pairs = [pair for batch, length in step for pair in sequences(batch, length)]
        nats = torch.stack([cross_entropy(model(ids[None])[0], labels, reduction="sum") for ids, labels in pairs])
        optimizer.zero_grad()
        loss = nats.sum() / sum(int((labels != IGNORE_INDEX).sum()) for _, labels in pairs)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()
    for name, x in model.net.state_dict().items():
        torch.testing.assert_close(trained[name], x, rtol=0, atol=1e-9)
        assert name.endswith("gain") or not torch.equal(x, initial[name])


OPTIMIZER = AdamW(lr=0.01)
CONSTANT_RATE = Schedule("constant", warmup_steps=0)


@pytest.fixture
def train(
    trainer: Callable[..., L.Trainer], task: Callable[..., LanguageModel], packed_text: Callable[..., PackedText]
) -> Train:
    """Train in float64 with arguments of the data module and limits of the trainer."""

    def run(limits: dict[str, int], **arguments: object) -> tuple[L.Trainer, LanguageModel, Record]:
        L.seed_everything(1)
        record, model = Record(), task(optimizer=OPTIMIZER, schedule=CONSTANT_RATE)
        of_run = trainer(precision="64-true", limit_val_batches=0, callbacks=[record], **limits)
        of_run.fit(model, packed_text(**arguments))
        return of_run, model, record

    return run


# The arithmetic of steps


def divisor_chain(draw: Any, final: int) -> Stages:
    """Draw stages whose sizes divide each other and ``final``."""
    sizes = []
    while (divisors := [n for n in range(1, final) if final % n == 0]) and draw(st.booleans()):
        final = draw(st.sampled_from(divisors))
        sizes.append(final)
    ends = draw(st.lists(st.floats(0.01, 0.99), min_size=len(sizes), max_size=len(sizes), unique=True))
    return tuple(zip(sorted(ends), reversed(sizes), strict=True))


@st.composite
def growing_runs(draw: Any) -> tuple[SizeStages, int, int]:
    accumulate = draw(st.integers(1, 12))
    limits = draw(st.sampled_from([(-1, 3), (40, -1), (25, 2), (1, -1)]))
    stages = SizeStages(
        (*divisor_chain(draw, accumulate), (math.inf, accumulate)), (*divisor_chain(draw, 16), (math.inf, 16)), *limits
    )
    return stages, accumulate, draw(st.integers(1, 50))


@given(growing_runs())
def test_steps_are_those_that_lightning_makes(case: tuple[SizeStages, int, int]) -> None:
    """Brute force: a step ends where the batch index is a multiple of the current size, or with the epoch."""
    stages, accumulate, per_epoch = case
    steps_phases, window_phases = stages.phases(per_epoch, accumulate)
    ends: list[int] = []
    sizes: list[int] = []
    windows: list[int] = []
    for micro_batch in range(4 * per_epoch):
        [size] = [each.size for each in steps_phases if each.first <= micro_batch < each.end]
        within = micro_batch % per_epoch + 1
        sizes.append(size)
        windows.append(*(each.size for each in window_phases if each.first <= micro_batch < each.end))
        if within % size == 0 or within == per_epoch:
            ends.append(micro_batch + 1)
    for first, end in itertools.pairwise([0, *ends]):  # sizes change only between steps
        assert len(set(sizes[first:end])) == len(set(windows[first:end])) == 1
        assert first % per_epoch % accumulate % sizes[first] == 0
    assert sizes == sorted(sizes)
    assert windows == sorted(windows)

    trainer: Any = SimpleNamespace(
        callbacks=[lightning_compat.StagedAccumulation(steps_phases)], num_training_batches=per_epoch, max_steps=-1
    )
    for n, end in enumerate(ends, start=1):
        assert lightning_compat.batches_in_steps(trainer, n) == end
    for epochs in (1, 2, 4):
        trainer.max_epochs, trainer.estimated_stepping_batches = epochs, None
        assert lightning_compat.planned_steps(trainer) == sum(end <= epochs * per_epoch for end in ends)


@given(growing_runs())
def test_stages_end_at_fractions_of_the_run(case: tuple[SizeStages, int, int]) -> None:
    """Each stage ends up to one final step late, in which it makes several steps that the last stage then lacks."""
    stages, accumulate, per_epoch = case
    phases, _ = stages.phases(per_epoch, accumulate)
    length = stages.run_length(per_epoch)
    for phase, (end, _) in zip(phases[:-1], stages.step_sizes, strict=False):
        assert 0 <= phase.end - end * length < accumulate + 1
    if stages.max_epochs == -1:
        trainer: Any = SimpleNamespace(
            callbacks=[lightning_compat.StagedAccumulation(phases)], num_training_batches=per_epoch
        )
        found = lightning_compat.batches_in_steps(trainer, stages.max_steps)
        assert abs(found - length) <= accumulate * sum(accumulate / phase.size for phase in phases) + per_epoch


@given(growing_runs(), st.integers(1, 3), st.integers(1, 2), st.integers(0, 3), st.integers(0, 60))
def test_rows_and_their_order_are_those_of_constant_sizes(
    case: tuple[SizeStages, int, int], batch_size: int, world: int, epoch: int, start: int
) -> None:
    stages, accumulate, per_epoch = case
    order = ShuffledOrder([per_epoch * batch_size * world], seed=1)

    def micro_batches(rank: int, first: int = 0, stages: SizeStages | None = stages) -> list[Any]:
        arguments = batch_size, rank, world, (epoch, first), accumulate
        return list(ShuffledSampler(order, *arguments, stages=stages))

    start = min(start, per_epoch)
    ranks = [micro_batches(rank) for rank in range(world)]
    for rank in range(world):
        assert [each.rows for each in ranks[rank]] == [each.rows for each in micro_batches(rank, stages=None)]
        resumed = micro_batches(rank, start)
        assert [(each.rows, each.window) for each in resumed] == [(e.rows, e.window) for e in ranks[rank]][start:]
        assert all((a.step_rows == b.step_rows).all() for a, b in zip(resumed, ranks[rank][start:], strict=True))
    # The rows of a step are those of its micro-batches on all ranks.
    sampler = ShuffledSampler(order, batch_size, 0, world, (epoch, 0), accumulate, stages=stages)
    n, first = len(sampler), 0
    while first < n:
        size, window = sampler.sizes_at(epoch, first)
        step = range(first, min(first + size, n))
        everywhere = [row for i in step for rank in ranks for row in rank[i].rows]
        for i in step:
            assert ranks[0][i].step_rows.tolist() == everywhere
            assert ranks[0][i].window == window
        first += size


# Windows


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("packing", PACKING_POLICIES)
def test_short_windows_are_trained_like_separate_sequences(train: Train, packing: PackingPolicy, mask: bool) -> None:
    arguments = {"packing": packing, "document_mask": mask}
    _, model, staged = train({"max_steps": 8}, block_size_stages=WINDOWS, **arguments)
    shapes = [tuple(batch["input_ids"].shape) for [batch] in staged.steps]
    assert shapes == [(16, 8)] * 2 + [(8, 16)] * 2 + [(4, 32)] * 4
    _, _, constant = train({"max_steps": 8}, **arguments)
    assert [[rows(batch) for batch in step] for step in staged.steps] == [
        [rows(batch) for batch in step] for step in constant.steps
    ]
    lengths = [8] * 2 + [16] * 2 + [32] * 4
    steps = [[(batch, length)] for [batch], length in zip(constant.steps, lengths, strict=True)]
    assert_trained_by_hand(model, staged.initial, steps)


def test_full_windows_are_trained_bit_for_bit_as_without_stages(
    train: Train, packed_text: Callable[..., PackedText]
) -> None:
    """The last stage yields the same batches as a run without stages."""
    _, _, staged = train({"max_steps": 8}, block_size_stages=WINDOWS, document_mask=True)
    _, _, constant = train({"max_steps": 8}, document_mask=True)
    for [one], [other] in zip(staged.steps[4:], constant.steps[4:], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)  # type: ignore[literal-required]


def test_operations_of_short_windows_are_counted_for_their_length(
    trainer: Callable[..., L.Trainer], task: Callable[..., LanguageModel], packed_text: Callable[..., PackedText]
) -> None:
    watch, model = Throughput(), task()
    trainer(callbacks=[watch], limit_val_batches=0).fit(model, packed_text(block_size_stages=WINDOWS))
    matrices = sum(p.numel() for p in model.net.parameters() if p.ndim == 2) - model.net.embedding.weight.numel()
    timed = [8] + [16] * 2 + [32] * 4  # the first of 8 steps is not timed
    assert watch.flops == sum(128 * (6 * matrices + 12 * 2 * 32 * length) for length in timed)


def test_a_row_of_a_split_batch_is_described_by_its_documents(
    trainer: Callable[..., L.Trainer], task: Callable[..., LanguageModel], packed_text: Callable[..., PackedText]
) -> None:
    data, constant = packed_text(block_size_stages=WINDOWS), packed_text()
    for each in (data, constant):
        trainer(limit_val_batches=0).fit(task(), each)
    for batch, parts in ((0, 4), (2, 2), (5, 1)):
        described = [data.describe_row(0, batch, row) for row in range(4 * parts)]
        assert described == [constant.describe_row(0, batch, row // parts) for row in range(4 * parts)]


# Steps


@pytest.mark.parametrize("packing", PACKING_POLICIES)
def test_growing_steps_are_those_of_a_plain_loop(train: Train, packing: PackingPolicy) -> None:
    """8 steps of one micro-batch, 4 of two, and 4 of four, each a quarter, a quarter and half of the tokens."""
    growth = {"tokens_per_step": 512, "tokens_per_step_stages": STEPS}
    run, model, staged = train({"max_steps": 16}, packing=packing, **growth)
    assert [len(step) for step in staged.steps] == [1] * 8 + [2] * 4 + [4] * 4
    assert run.global_step == model.total_steps == 16
    assert run.accumulate_grad_batches == 4
    _, _, constant = train({"max_steps": 8}, packing=packing, tokens_per_step=512)
    batches = [batch for step in constant.steps for batch in step]  # the same, in the same order
    assert [rows(batch) for step in staged.steps for batch in step] == [rows(batch) for batch in batches]
    left = iter(batches)
    steps = [[(next(left), 32) for _ in step] for step in staged.steps]
    assert_trained_by_hand(model, staged.initial, steps)


def test_steps_and_windows_grow_together(train: Train) -> None:
    growth = {"tokens_per_step": 512, "tokens_per_step_stages": STEPS, "block_size_stages": ((0.5, 8),)}
    _, model, staged = train({"max_steps": 16}, document_mask=True, **growth)
    _, _, constant = train({"max_steps": 8}, document_mask=True, tokens_per_step=512)
    left = iter([batch for step in constant.steps for batch in step])
    steps = [[(next(left), batch["input_ids"].shape[1]) for batch in step] for step in staged.steps]
    assert [{length for _, length in step} for step in steps] == [{8}] * 12 + [{32}] * 4
    assert_trained_by_hand(model, staged.initial, steps)


@pytest.mark.parametrize(
    "limits", [{"max_steps": -1, "max_epochs": 2}, {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 7}]
)
def test_epochs_use_each_row_once_and_the_planned_steps_are_made(train: Train, limits: dict[str, int]) -> None:
    growth = {"batch_size": 12, "tokens_per_step": 1536, "tokens_per_step_stages": ((0.3, 384), (0.6, 768))}
    run, model, staged = train(limits, **growth)
    assert run.global_step == model.total_steps == len(staged.steps)
    per_epoch = limits.get("limit_train_batches", 32)
    batches = [batch for step in staged.steps for batch in step]
    assert len(batches) == per_epoch * limits["max_epochs"]
    for epoch in range(limits["max_epochs"]):
        seen = [row for batch in batches[epoch * per_epoch : (epoch + 1) * per_epoch] for row in rows(batch)]
        assert len(set(seen)) == len(seen) == 12 * per_epoch
    sizes = [len(step) for step in staged.steps]
    assert set(sizes) == ({1, 2, 4} if per_epoch == 32 else {1, 2, 3})  # an epoch of 7 ends within a step


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size_stages": ()}, "data.block_size_stages is empty"),
        ({"block_size_stages": ((0.5, 12),)}, "data.block_size_stages grows from 12 to 32; each size must"),
        ({"block_size_stages": ((0.5, 32),)}, "data.block_size_stages grows from 32 to 32"),
        ({"block_size_stages": ((0.5, 0),)}, "data.block_size_stages grows from 0 to 32"),
        ({"block_size_stages": ((0.2, 16), (0.5, 8))}, "data.block_size_stages grows from 16 to 8"),
        ({"block_size_stages": ((0.5, 8), (0.5, 16))}, "ends at [0.5, 0.5]; ends must increase between 0 and 1"),
        ({"block_size_stages": ((1.0, 8),)}, "ends at [1.0]; ends must increase between 0 and 1"),
        ({"block_size_stages": ((math.nan, 8),)}, "ends must increase between 0 and 1"),
        ({"tokens_per_step_stages": STEPS}, "data.tokens_per_step_stages requires data.tokens_per_step"),
        ({"tokens_per_step": 512, "tokens_per_step_stages": ((0.5, 384),)}, "grows from 384 to 512"),
    ],
)
def test_invalid_stages_are_rejected(
    packed_text: Callable[..., PackedText], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        packed_text(**arguments)


@pytest.mark.parametrize(
    ("arguments", "limits", "message"),
    [
        ({"tokens_per_step_stages": ((0.5, 64),)}, {}, "data.tokens_per_step_stages contains 64, which is not a mult"),
        ({"tokens_per_step_stages": ((0.01, 128), (0.02, 256))}, {}, "a stage has no step in a run of 77"),
        ({"block_size_stages": ((0.98, 8), (0.99, 16))}, {}, "data.block_size_stages: a stage has no step in a run"),
        ({"block_size_stages": ((0.5, 8),)}, {"max_steps": -1}, "no limit on steps or epochs; set --trainer.max_steps"),
        (
            {"block_size_stages": ((0.5, 8),), "tokens_per_step": None},
            {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]},
            "data.block_size_stages does not support the callback GradientAccumulationScheduler",
        ),
    ],
)  # fmt: skip
def test_stages_that_do_not_fit_the_run_are_rejected(
    trainer: Callable[..., L.Trainer], task: Callable[..., LanguageModel], packed_text: Callable[..., PackedText],
    arguments: dict[str, Any], limits: dict[str, Any], message: str,
) -> None:  # fmt: skip
    run = trainer(**{"max_steps": 20, "limit_val_batches": 0, **limits})
    with pytest.raises(UserError, match=re.escape(message)):
        run.fit(task(), packed_text(**{"tokens_per_step": 512, **arguments}))


def test_a_short_trial_run_needs_no_step_in_each_stage(
    trainer: Callable[..., L.Trainer], task: Callable[..., LanguageModel], packed_text: Callable[..., PackedText]
) -> None:
    run = trainer(fast_dev_run=1)
    run.fit(task(), packed_text(block_size_stages=WINDOWS, tokens_per_step=512, tokens_per_step_stages=STEPS))
    assert run.global_step == 1
