"""Windows cover the stream; the order is a function, the same for any number of ranks."""

import pickle
from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.batch import IGNORED
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.data.packing import Windows
from lit_gpt_scratch.data.sampler import EveryWindow, WindowOrder
from lit_gpt_scratch.data.token_store import Stream
from lit_gpt_scratch.errors import UserError


def stream(folder: Path, n: int) -> Stream:
    path = folder / f"{n}.bin"
    np.arange(n, dtype="<u2").tofile(path)
    return Stream(str(path), "<u2", n, n, 1)


@pytest.mark.parametrize("n", [0, 1, 2, 8, 9, 10, 16, 17, 100])
def test_windows_score_every_token_but_the_first_once(tmp_path: Path, n: int) -> None:
    whole = Windows(stream(tmp_path, n), 8, whole=True)
    labels = [label for i in range(len(whole)) for label in whole[i]["labels"].ravel().tolist()]
    assert [label for label in labels if label != IGNORED] == list(range(1, n))
    assert len(Windows(stream(tmp_path, n), 8)) == max(n - 1, 0) // 8
    for i in range(len(Windows(stream(tmp_path, n), 8))):
        window = Windows(stream(tmp_path, n), 8)[i]
        assert window["input_ids"].tolist() == [list(range(8 * i, 8 * i + 8))]
        assert window["labels"].tolist() == [list(range(8 * i + 1, 8 * i + 9))]


def test_the_window_behind_the_last_has_no_labels(tmp_path: Path) -> None:
    for n in (9, 12, 17):
        windows = Windows(stream(tmp_path, n), 8, whole=True)
        batch = windows.__getitems__([0, len(windows)])
        assert batch["labels"].shape == (2, 8)
        assert (batch["labels"][1] == IGNORED).all()


def test_a_worker_opens_the_file_and_is_not_sent_the_corpus(tmp_path: Path) -> None:
    windows = Windows(stream(tmp_path, 60_000), 8)
    pickled = pickle.dumps(windows)
    assert len(pickled) < 2_000
    again = pickle.loads(pickled)
    assert torch.equal(again[5]["labels"], windows[5]["labels"])


@given(
    n=st.integers(1, 200),
    batch=st.integers(1, 8),
    world=st.integers(1, 4),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
)
@settings(deadline=None)
def test_the_global_order_does_not_depend_on_the_number_of_ranks(
    n: int, batch: int, world: int, seed: int, epoch: int
) -> None:
    def order(batch_size: int, rank: int, world_size: int) -> list[int]:
        sampler = WindowOrder(n, batch_size, seed, rank, world_size)
        sampler.set_epoch(epoch)
        indices = list(sampler)
        assert len(indices) == len(sampler)
        return indices

    alone = order(batch * world, 0, 1)
    ranks = [order(batch, rank, world) for rank in range(world)]
    steps = [
        [index for rank in ranks for index in rank[s * batch : (s + 1) * batch]] for s in range(len(ranks[0]) // batch)
    ]
    assert [index for step in steps for index in step] == alone
    assert len(set(alone)) == len(alone) == n // (batch * world) * batch * world


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        sampler = WindowOrder(100, 10, seed)
        sampler.set_epoch(epoch)
        return tuple(sampler)

    assert len({order(seed, epoch) for seed in range(5) for epoch in range(5)}) == 25


def test_an_order_goes_on_from_any_step() -> None:
    whole = WindowOrder(103, 10, seed=3)
    whole.set_epoch(2)
    later = WindowOrder(103, 10, seed=3, start=(2, 4))
    assert list(later) == list(whole)[40:]
    later.set_epoch(3)
    whole.set_epoch(3)
    assert list(later) == list(whole)


@given(n=st.integers(1, 60), batch=st.integers(1, 7), world=st.integers(1, 4))
def test_validation_sees_every_window_once(n: int, batch: int, world: int) -> None:
    ranks = [list(EveryWindow(n, batch, rank, world)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    assert len(ranks[0]) % batch == 0
    assert sorted(index for rank in ranks for index in rank if index < n) == list(range(n))
    assert all(index == n for rank in ranks for index in rank if index >= n)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loaders_batches(packed_text: Callable[..., PackedText], num_workers: int) -> None:
    data = packed_text(num_workers=num_workers)
    data.prepare_data()
    data.setup("fit")
    train = list(data.train_dataloader())
    assert len(train) == len(data.train_windows) // 4
    assert all(batch["input_ids"].shape == batch["labels"].shape == (4, 32) for batch in train)
    assert all(batch["input_ids"].dtype == torch.int64 for batch in train)
    order = list(WindowOrder(len(data.train_windows), 4, seed=0))
    expected = data.train_windows.__getitems__(order[:4])
    assert torch.equal(train[0]["input_ids"], expected["input_ids"])
    scored = sum((batch["labels"] != IGNORED).sum().item() for batch in data.val_dataloader())
    assert scored == data.store.validation.n_tokens - 1


def test_tokens_per_step_sets_the_accumulation(
    packed_text: Callable[..., PackedText], trainer: Callable[..., L.Trainer], task: Callable[..., L.LightningModule]
) -> None:
    run = trainer(max_steps=2)
    run.fit(task(), packed_text(tokens_per_step=512))
    assert run.accumulate_grad_batches == 4
    assert run.fit_loop.total_batch_idx + 1 == 8
    with pytest.raises(UserError, match="not a multiple of the 128 tokens"):
        trainer(max_steps=1).fit(task(), packed_text(tokens_per_step=200))
    with pytest.raises(UserError, match=r"asks for 4 micro-batches .*accumulate_grad_batches for 3"):
        trainer(max_steps=1, accumulate_grad_batches=3).fit(task(), packed_text(tokens_per_step=512))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block_size": 100_000}, "fewer than one window of 100000"),
        ({"batch_size": 10_000}, "fewer than one batch of 10000"),
        ({"block_size": 0}, "data.block_size is 0"),
        ({"batch_size": -1}, "data.batch_size is -1"),
        ({"num_workers": -1}, "data.num_workers is -1"),
        ({"validation_share": 1.0}, "data.validation_share is 1.0"),
        ({"tokens_per_step": 0}, "data.tokens_per_step is 0"),
    ],
)
def test_data_that_cannot_be_is_refused_by_name(
    packed_text: Callable[..., PackedText], changes: dict[str, float], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        packed_text(**changes).setup("fit")
