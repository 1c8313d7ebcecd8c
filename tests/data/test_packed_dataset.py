"""Packed rows cover the token stream, and loaders yield them in the sampler's order."""

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.data.packed_dataset import PackedDataset
from lit_gpt_scratch.data.packing import PACKING_POLICIES, ConcatenatedPlan, PackingPolicy
from lit_gpt_scratch.data.sampler import ShuffledOrder, ShuffledSampler
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.token_shards import ShardedTokenStream
from tests.conftest import token_stream

END = 60_000


def stream(folder: Path, *sizes: int) -> ShardedTokenStream:
    """Shards of one document each with the given number of tokens, whose ids count from 0 through all shards."""
    numbers = itertools.count()
    return token_stream(folder, *([list(itertools.islice(numbers, n))] for n in sizes))


def concatenated(text: ShardedTokenStream, whole: bool = False) -> PackedDataset:
    return PackedDataset([ConcatenatedPlan(text, 8, whole)], 8, END + 1, END)


@pytest.mark.parametrize("sizes", [(1,), (2,), (8,), (9,), (10,), (16,), (17,), (100,), (5, 1, 1, 40), (16, 16)])
def test_every_token_except_the_first_is_a_label_once(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    text, n = stream(tmp_path, *sizes), sum(sizes)
    whole = concatenated(text, whole=True)
    labels = [label for i in range(len(whole)) for label in whole[i]["labels"].ravel().tolist()]
    assert [label for label in labels if label != IGNORE_INDEX] == list(range(1, n))
    assert len(concatenated(text)) == max(n - 1, 0) // 8
    for i in range(len(concatenated(text))):
        window = concatenated(text)[i]
        assert window["input_ids"].tolist() == [list(range(8 * i, 8 * i + 8))]
        assert window["labels"].tolist() == [list(range(8 * i + 1, 8 * i + 9))]


def test_padding_row_has_no_labels(tmp_path: Path) -> None:
    for n in (9, 12, 17):
        windows = concatenated(stream(tmp_path / f"{n}", n), whole=True)
        batch = windows.make_batch([0, len(windows)])
        assert batch["labels"].shape == (2, 8)
        assert (batch["labels"][1] == IGNORE_INDEX).all()


def test_rows_of_several_stores_are_numbered_in_sequence(tmp_path: Path) -> None:
    texts = [stream(tmp_path / "a", 20), stream(tmp_path / "b", 33)]
    both = PackedDataset([ConcatenatedPlan(text, 8) for text in texts], 8, END + 1, END)
    assert len(both) == 2 + 4
    found = both.make_batch([1, 2, 5])["input_ids"]
    assert found.tolist() == [list(range(8, 16)), list(range(8)), list(range(24, 32))]


def test_pickled_dataset_does_not_contain_the_corpus(tmp_path: Path) -> None:
    windows = concatenated(stream(tmp_path, 60_000))
    expected = windows[5]["labels"]
    pickled = pickle.dumps(windows)
    assert len(pickled) < 2_000
    again = pickle.loads(pickled)
    assert torch.equal(again[5]["labels"], expected)


def test_token_outside_the_vocabulary_is_rejected_and_names_its_shard(tmp_path: Path) -> None:
    """On a GPU the lookup would fail with an assertion that names nothing."""
    windows = PackedDataset([ConcatenatedPlan(stream(tmp_path, 30, 40), 8)], 8, vocab_size=50, end_of_text=0)
    windows.make_batch([0, 1, 2, 3, 4])
    with pytest.raises(UserError, match=r"shard train-00001 of .* has token 50, but its tokenizer only 50 tokens"):
        windows.make_batch([0, 6])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_yield_the_samplers_batches(packed_text: Callable[..., PackedText], num_workers: int) -> None:
    data = packed_text(num_workers=num_workers)
    data.prepare_data()
    data.setup("fit")
    train = list(data.train_dataloader())
    assert len(train) == len(data.train_dataset) // 4
    assert all(batch["input_ids"].shape == batch["labels"].shape == (4, 32) for batch in train)
    assert all(batch["input_ids"].dtype == torch.int64 for batch in train)
    first = next(iter(ShuffledSampler(ShuffledOrder([len(data.train_dataset)], seed=0), 4)))
    expected = data.train_dataset.make_batch(first.rows)
    assert torch.equal(train[0]["input_ids"], expected["input_ids"])
    scored = sum((batch["labels"] != IGNORE_INDEX).sum().item() for batch in data.val_dataloader())
    assert scored == data.store.validation.n_tokens - 1


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("policy", PACKING_POLICIES)
def test_every_packing_policy_trains(
    packed_text: Callable[..., PackedText], trainer: Callable[..., L.Trainer], task: Callable[..., L.LightningModule],
    policy: PackingPolicy, num_workers: int,
) -> None:  # fmt: skip
    data = packed_text(packing=policy, document_mask=True, num_workers=num_workers)
    run = trainer(max_steps=30, val_check_interval=30, check_val_every_n_epoch=None)
    run.fit(task(), data)
    assert run.callback_metrics["val/loss"] < 4.5  # from ln 300 = 5.7
    assert sum((batch["labels"] != IGNORE_INDEX).sum().item() for batch in data.val_dataloader()) == (
        data.store.validation.n_tokens - 1
    )  # the same tokens are scored whatever the packing


@pytest.mark.parametrize("policy", PACKING_POLICIES)
def test_training_batches_carry_the_label_count_of_their_step(
    packed_text: Callable[..., PackedText], policy: PackingPolicy
) -> None:
    """Counted from the packing plan; without a trainer a step is one micro-batch."""
    data = packed_text(packing=policy)
    data.prepare_data()
    data.setup("fit")
    for batch in data.train_dataloader():
        assert batch["step_labels"] == (batch["labels"] != IGNORE_INDEX).sum()
    assert all("step_labels" not in batch for batch in data.val_dataloader())


def test_tokens_per_step_sets_gradient_accumulation(
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
        ({"seed": -1}, "data.seed is -1"),
        ({"packing": "first_fit"}, "data.packing is first_fit; it must be one of concatenate, best_fit, one_document"),
        ({"mixture": {"a": 1.0}}, "data.mixture uses tokens that were made already; leave out data.source"),
    ],
)
def test_invalid_settings_are_rejected(
    packed_text: Callable[..., PackedText], changes: dict[str, float], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        packed_text(**changes).setup("fit")
