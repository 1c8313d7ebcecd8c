"""Every packing policy keeps every token and reports its true cost."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.batch_types import IGNORE_INDEX
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
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        best = min((room for room in rooms if room >= length), default=None)
        if best is None:
            rooms.append(capacity - length)
        else:
            rooms[rooms.index(best)] -= length
    return sorted(rooms)


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), min_size=1))))
@settings(max_examples=300)
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
    # The paper pads the last window of 31 tokens; here it would be scored in validation alone.
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
    cut = [len(document) > 1 for document in documents]
    return {
        "padding": padding, "crossing": crossing, "split": sum(cut),
        "split_needlessly": sum(parted and n <= batches.block_size for parted, n in zip(cut, lengths, strict=True)),
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
