"""Every packing policy keeps every token and reports its true cost; packed rows cover the token stream."""

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.data import packing as module
from lit_gpt_scratch.data.packed_dataset import PackedDataset
from lit_gpt_scratch.data.packing import (
    PACKING_POLICIES,
    ConcatenatedPlan,
    PackingPolicy,
    best_fit_decreasing,
    compute_packing_cost,
    plan_packing,
)
from lit_gpt_scratch.data.sampler import ShuffledOrder, ShuffledSampler
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.token_shards import ShardedTokenStream, TokenShard
from tests.conftest import token_stream

END = 0
VOCAB = 60_000


def stream(folder: Path, *shards: list[int]) -> ShardedTokenStream:
    """Documents of these lengths, including the end of text; all other tokens are distinct."""
    numbers = itertools.count(1)
    return token_stream(folder, *([[END, *itertools.islice(numbers, n - 1)] for n in lengths] for lengths in shards))


def windows(
    text: ShardedTokenStream, block_size: int, policy: PackingPolicy, cache: Path, mask: bool = True
) -> PackedDataset:
    return PackedDataset([plan_packing(text, block_size, policy, cache)], block_size, VOCAB, END, mask)


def naive_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Free space in each bin, computed from the definition."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        best = min((space for space in free if space >= length), default=None)
        if best is None:
            free.append(capacity - length)
        else:
            free[free.index(best)] -= length
    return sorted(free)


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), min_size=1))))
@settings(max_examples=100)
def test_best_fit_decreasing_matches_its_definition(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    fill = np.bincount(best_fit_decreasing(np.array(lengths), capacity), weights=lengths)
    assert (fill > 0).all()
    assert sorted((capacity - fill).astype(int).tolist()) == naive_best_fit(lengths, capacity)


def test_example_from_the_paper(tmp_path: Path) -> None:
    """Ding et al. 2024, figure 1: documents of 14, 7, 5, 2 and 3 tokens, windows of 8; concatenation splits three.

    Best-fit packing splits only the one that does not fit.
    """
    text = stream(tmp_path, [14, 7, 5, 2, 3])
    # The paper pads the last window of 31 tokens; here it would be scored only in validation.
    concatenated = ConcatenatedPlan(text, 8, keep_last=True).cost
    assert (concatenated.split, concatenated.split_needlessly, concatenated.windows) == (3, 2, 4)
    best = plan_packing(text, 8, "best_fit", tmp_path).cost
    assert (best.split, best.split_needlessly, best.windows, best.padding) == (1, 0, 4, 1)


def brute_force(text: ShardedTokenStream, batches: PackedDataset) -> dict[str, int]:
    """The cost, counted from the batches."""
    where: dict[int, set[int]] = {}  # by token, the windows that it is in
    padding = crossing = 0
    for index in range(len(batches)):
        packing = batches.parts[0]
        tokens = np.concatenate([text.read(a, a + n) for a, n in packing.pieces(index)])
        padding += batches.block_size - len(tokens)
        stops = np.concatenate([np.arange(a, a + n) for a, n in packing.pieces(index)])
        assert len(set(stops.tolist())) == len(stops)
        for place in stops.tolist():
            where.setdefault(place, set()).add(index)
    documents, first = [], 0
    every = text.read(0, text.n_tokens)
    begins = [*np.flatnonzero(every == END).tolist(), len(every)]
    for first, behind in itertools.pairwise(begins):
        documents.append({index for place in range(first, behind) for index in where.get(place, {-1})})
    for index in range(len(batches)):
        crossing += sum(index in document for document in documents) > 1
    lengths = np.diff(begins)
    split = [len(document) > 1 for document in documents]
    return {
        "padding": padding, "crossing": crossing, "split": sum(split),
        "split_needlessly": sum(parted and n <= batches.block_size for parted, n in zip(split, lengths, strict=True)),
        "discarded": max(len(every) - 1 - len(where), 0),
    }  # fmt: skip


LENGTHS = st.lists(st.integers(2, 30), min_size=1, max_size=12)


@given(
    shards=st.lists(LENGTHS, min_size=1, max_size=3),
    block_size=st.integers(1, 20),
    policy=st.sampled_from(PACKING_POLICIES),
)
@settings(max_examples=200)
def test_every_label_occurs_once_and_the_cost_matches_brute_force(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[int]], block_size: int, policy: PackingPolicy
) -> None:
    folder = tmp_path_factory.mktemp("store")
    text = stream(folder, *shards)
    batches = windows(text, block_size, policy, folder)
    follows = []
    every = text.read(0, text.n_tokens).tolist()
    for index in range(len(batches)):
        batch = batches[index]
        for token, label in zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True):
            if label != IGNORE_INDEX:
                follows.append((token, label))
    pairs = list(itertools.pairwise(every))
    if policy == "concatenate":
        kept = (len(every) - 1) // block_size * block_size
        assert follows == pairs[:kept]
    else:
        assert sorted(follows) == sorted(pairs)
    if len(batches):
        found = batches.parts[0].cost
        assert brute_force(text, batches).items() <= vars(found).items()
        assert (found.windows, found.positions) == (len(batches), len(batches) * block_size)
        assert found.used == pytest.approx(1 - found.padding / found.positions)
        assert compute_packing_cost(text, block_size, policy) == found
        assert (found + found).used == pytest.approx(found.used)


@pytest.mark.parametrize("policy", PACKING_POLICIES)
def test_document_ids_match_documents(tmp_path: Path, policy: PackingPolicy) -> None:
    text = stream(tmp_path, [14, 7, 5, 2, 3], [9, 20])
    batches = windows(text, 8, policy, tmp_path)
    document_of = np.cumsum(text.read(0, text.n_tokens) == END)
    number = {
        token: int(document_of[place]) for place, token in enumerate(text.read(0, text.n_tokens).tolist()) if token
    }
    for index in range(len(batches)):
        batch = batches[index]
        ids, found = batch["input_ids"][0].tolist(), batch["document_ids"][0].tolist()
        assert found == sorted(found)
        for a in range(8):
            for b in range(8):
                if ids[a] and ids[b]:
                    assert (number[ids[a]] == number[ids[b]]) == (found[a] == found[b])
        # Padding belongs to no document: each such position has its own id.
        filled = [at for at in range(8) if ids[at] == END and batch["labels"][0][at] == IGNORE_INDEX]
        assert len({found[at] for at in filled}) == len(filled)


@given(shards=st.lists(LENGTHS, min_size=1, max_size=3), data=st.data())
@settings(max_examples=50)
def test_document_starts_match_brute_force(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[int]], data: st.DataObject
) -> None:
    text = stream(tmp_path_factory.mktemp("store"), *shards)
    start = data.draw(st.integers(0, text.n_tokens))
    stop = data.draw(st.integers(start, text.n_tokens + 3))
    assert (
        text.document_starts(start, stop).tolist() == (start + np.flatnonzero(text.read(start, stop) == END)).tolist()
    )


def test_cached_plan_depends_on_the_tokens(tmp_path: Path) -> None:
    """For a single document the boundaries are equal with any tokenizer, but its length differs."""
    about = np.array([[0, 500]], dtype="<u8")
    for name, length in (("a", 300), ("b", 100)):
        (tmp_path / name).mkdir()
        text = ShardedTokenStream((TokenShard.write(tmp_path / name, "train-00000", np.zeros(length, "<u2"), about),))
        assert len(plan_packing(text, 10, "best_fit", tmp_path)) == length // 10


def test_plan_is_cached_and_packs_each_shard_separately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = stream(tmp_path, [5, 5], [3, 3])
    first = plan_packing(text, 8, "best_fit", tmp_path)
    assert len(first) == 3  # over both shards it would be two windows
    monkeypatch.setattr(module, "_write_plan", lambda *_: pytest.fail("planned again"))
    assert [plan_packing(text, 8, "best_fit", tmp_path).pieces(i) for i in range(3)] == [
        first.pieces(i) for i in range(3)
    ]


def test_cost_file_keeps_the_keys_of_version_0_1(tmp_path: Path) -> None:
    """A cache of 0.1 is read, and 0.1 can read ours."""
    plan = plan_packing(stream(tmp_path, [14, 7, 5, 2, 3]), 8, "best_fit", tmp_path)
    [path] = tmp_path.glob("packing/*/cost.json")
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert (stored["cut"], stored["cut_needlessly"]) == (plan.cost.split, plan.cost.split_needlessly) == (1, 0)


END_OF_NUMBERED = 60_000


def numbered_stream(folder: Path, *sizes: int) -> ShardedTokenStream:
    """Shards of one document each with the given number of tokens, whose ids count from 0 through all shards."""
    numbers = itertools.count()
    return token_stream(folder, *([list(itertools.islice(numbers, n))] for n in sizes))


def concatenated(text: ShardedTokenStream, whole: bool = False) -> PackedDataset:
    return PackedDataset([ConcatenatedPlan(text, 8, whole)], 8, END_OF_NUMBERED + 1, END_OF_NUMBERED)


@pytest.mark.parametrize("sizes", [(1,), (2,), (8,), (9,), (10,), (16,), (17,), (100,), (5, 1, 1, 40), (16, 16)])
def test_every_token_except_the_first_is_a_label_once(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    text, n = numbered_stream(tmp_path, *sizes), sum(sizes)
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
        windows = concatenated(numbered_stream(tmp_path / f"{n}", n), whole=True)
        batch = windows.make_batch([0, len(windows)])
        assert batch["labels"].shape == (2, 8)
        assert (batch["labels"][1] == IGNORE_INDEX).all()


def test_rows_of_several_stores_are_numbered_in_sequence(tmp_path: Path) -> None:
    texts = [numbered_stream(tmp_path / "a", 20), numbered_stream(tmp_path / "b", 33)]
    both = PackedDataset([ConcatenatedPlan(text, 8) for text in texts], 8, END_OF_NUMBERED + 1, END_OF_NUMBERED)
    assert len(both) == 2 + 4
    found = both.make_batch([1, 2, 5])["input_ids"]
    assert found.tolist() == [list(range(8, 16)), list(range(8)), list(range(24, 32))]


def test_pickled_dataset_does_not_contain_the_corpus(tmp_path: Path) -> None:
    windows = concatenated(numbered_stream(tmp_path, 60_000))
    expected = windows[5]["labels"]
    pickled = pickle.dumps(windows)
    assert len(pickled) < 2_000
    again = pickle.loads(pickled)
    assert torch.equal(again[5]["labels"], expected)


def test_token_outside_the_vocabulary_is_rejected_and_names_its_shard(tmp_path: Path) -> None:
    """On a GPU the lookup would fail with an assertion without context."""
    windows = PackedDataset([ConcatenatedPlan(numbered_stream(tmp_path, 30, 40), 8)], 8, vocab_size=50, end_of_text=0)
    windows.make_batch([0, 1, 2, 3, 4])
    with pytest.raises(
        UserError, match=r"shard train-00001 of .* contains token id 50, but the tokenizer has only 50 tokens"
    ):
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
    with pytest.raises(UserError, match=r"implies 4 micro-batches .*accumulate_grad_batches is 3"):
        trainer(max_steps=1, accumulate_grad_batches=3).fit(task(), packed_text(tokens_per_step=512))


@pytest.mark.parametrize(
    ("changes", "message"),
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
        ({"mixture": {"a": 1.0}}, "data.mixture uses existing tokens, so data.source has no effect"),
    ],
)
def test_invalid_settings_are_rejected(
    packed_text: Callable[..., PackedText], changes: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        packed_text(**changes).setup("fit")
