"""A run resumed with another number of processes or micro-batches sees the same windows in the same order."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.batch_types import BatchLayout
from lit_gpt_scratch.checkpoint.loop_state import rescale_batch_counts
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.data.sampler import ShuffledOrder, ShuffledSampler
from lit_gpt_scratch.optim import AdamW

COUNTS = ("ready", "started", "processed", "completed")


def layouts(rows_per_step: int) -> st.SearchStrategy[BatchLayout]:
    """All batch layouts of a step with ``rows_per_step`` windows."""
    divisors = [n for n in range(1, rows_per_step + 1) if rows_per_step % n == 0]
    return st.sampled_from(
        [
            BatchLayout(batch_size, replicas, rows_per_step // batch_size // replicas)
            for batch_size in divisors
            for replicas in divisors
            if rows_per_step % (batch_size * replicas) == 0
        ]
    )


def progress(batches: int, total: int) -> dict[str, Any]:
    """Counters of a loop between two steps, as in a normalized checkpoint."""
    counts = {"current": dict.fromkeys(COUNTS, batches), "total": dict.fromkeys(COUNTS, total)}
    return {"epoch_loop.batch_progress": counts}


@given(data=st.data(), rows_per_step=st.integers(1, 12), left_over=st.integers(0, 11), seed=st.integers(0, 3))
@settings(max_examples=60)
def test_sessions_with_any_layouts_see_the_windows_of_one_session(
    data: st.DataObject, rows_per_step: int, left_over: int, seed: int
) -> None:
    """The reference takes ``rows_per_step`` windows at a time from the order, and drops an epoch's incomplete step."""
    steps_of_epoch = data.draw(st.integers(1, 7))
    n = rows_per_step * steps_of_epoch + left_over % rows_per_step
    shuffle = ShuffledOrder([n], seed)
    sessions = data.draw(st.lists(st.tuples(layouts(rows_per_step), st.integers(0, 9)), min_size=1, max_size=4))

    seen: list[list[int]] = []
    epoch, loop, before = 0, progress(0, 0), sessions[0][0]
    for layout, steps in sessions:
        rescale_batch_counts(loop, before, layout)
        current, total = (loop["epoch_loop.batch_progress"][scope]["ready"] for scope in ("current", "total"))
        for _ in range(steps):
            ranks = [
                iter(
                    ShuffledSampler(
                        shuffle, layout.batch_size, rank, layout.replicas, (epoch, current), layout.accumulate
                    )
                )
                for rank in range(layout.replicas)
            ]
            batches = [next(rank).rows for _ in range(layout.accumulate) for rank in ranks]  # by time, then by rank
            seen.append([window for batch in batches for window in batch])
            current, total = current + layout.accumulate, total + layout.accumulate
            if current == ranks_micro_batches(shuffle, layout):
                epoch, current = epoch + 1, 0
        loop, before = progress(current, total), layout

    expected = [
        shuffle.rows(step // steps_of_epoch, np.arange(rows_per_step) + step % steps_of_epoch * rows_per_step)
        for step in range(sum(steps for _, steps in sessions))
    ]
    assert seen == [windows.tolist() for windows in expected]
    assert loop == progress(current, sum(steps for _, steps in sessions) * before.accumulate)


def ranks_micro_batches(shuffle: ShuffledOrder, layout: BatchLayout) -> int:
    return ShuffledSampler(shuffle, layout.batch_size, 0, layout.replicas, accumulate=layout.accumulate).micro_batches


def test_another_step_size_continues_after_the_windows_already_seen() -> None:
    """7 steps of 4 windows are 28 windows: the fourth step of 10 is the first without any of them."""
    loop = progress(7, 107)
    rescale_batch_counts(loop, BatchLayout(4, 1, 1), BatchLayout(1, 2, 5))
    assert loop == progress(3 * 5, 43 * 5)


def test_same_layout_changes_no_count() -> None:
    """Including those of an epoch that ended within a step."""
    loop = progress(7, 107)
    rescale_batch_counts(loop, BatchLayout(2, 1, 4), BatchLayout(2, 1, 4))
    assert loop == progress(7, 107)


def test_epoch_shorter_than_a_step_is_one_short_step() -> None:
    order = ShuffledSampler(ShuffledOrder([11], seed=0), batch_size=2, rank=0, world_size=1, accumulate=8)
    assert order.micro_batches == 5
    rows = [row for micro_batch in order for row in micro_batch.rows]
    assert len(set(rows)) == len(rows) == 10


class WindowRecorder(L.Callback):
    """Records the set of windows of each step."""

    def __init__(self) -> None:
        self.steps: dict[int, set[bytes]] = {}

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        windows = self.steps.setdefault(trainer.global_step, set())
        windows.update(row.numpy().tobytes() for row in args[1]["input_ids"])


@pytest.fixture
def run(
    trainer: Callable[..., L.Trainer], packed_text: Callable[..., PackedText], task: Callable[..., Any], tmp_path: Path
) -> Callable[..., tuple[WindowRecorder, Path, L.Trainer]]:
    """Train until a step with a micro-batch size, from scratch or from a checkpoint."""

    def build(
        until: int, batch_size: int, checkpoint: Path | None, windows: int = 96
    ) -> tuple[WindowRecorder, Path, L.Trainer]:
        seen = WindowRecorder()
        L.seed_everything(3)
        of_run = trainer(max_steps=until, callbacks=[seen], limit_val_batches=0, precision="64-true")
        data = packed_text(batch_size=batch_size, tokens_per_step=windows * 32)
        of_run.fit(task(optimizer=AdamW()), data, ckpt_path=checkpoint, weights_only=True)
        assert of_run.global_step == until
        assert len(data.train_dataset) == 387
        path = tmp_path / f"{until}-{batch_size}.ckpt"
        of_run.save_checkpoint(path)
        return seen, path, of_run

    return build


@pytest.mark.parametrize("steps", [[3, 5, 7], [4, 8, 9]])
def test_trainer_resumes_with_other_micro_batches(
    run: Callable[..., tuple[WindowRecorder, Path, L.Trainer]], steps: list[int]
) -> None:
    """A step has 96 windows; the 17 left over at the end of an epoch would fill batches of 8 or 16.

    Epochs end at every fourth step: at the end of a session and within one.
    """
    alone, _, expected = run(steps[-1], 96, None)
    together: dict[int, set[bytes]] = {}
    checkpoint = None
    for until, batch_size in zip(steps, (24, 8, 16), strict=True):
        seen, checkpoint, of_run = run(until, batch_size, checkpoint)
        together |= seen.steps
        assert of_run.fit_loop.total_batch_idx + 1 == until * 96 // batch_size  # which schedules validations
    assert together == alone.steps
    assert of_run.current_epoch == expected.current_epoch
    assert {len(windows) for windows in together.values()} == {96}
    for one, other in zip(of_run.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_epoch_without_enough_windows_for_a_larger_step_ends(
    run: Callable[..., tuple[WindowRecorder, Path, L.Trainer]],
) -> None:
    """Three steps of 96 windows leave 99 of 387; a step of 360 then begins the next epoch."""
    _, checkpoint, _ = run(3, 96, None)
    seen, _, of_run = run(4, 40, checkpoint, windows=360)
    [windows] = seen.steps.values()
    assert len(windows) == 360
    assert of_run.fit_loop.epoch_progress.current.processed == 2
