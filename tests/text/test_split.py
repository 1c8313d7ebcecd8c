"""The train/validation split: by document, stable, and without near-duplicates across it."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.text import split as split_module
from lit_gpt_scratch.text.document import Document
from lit_gpt_scratch.text.sources import read_documents
from lit_gpt_scratch.text.split import (
    NEAR_DUPLICATE,
    DuplicateClusters,
    TrainValidationSplit,
    hash_document,
    split_by_cluster,
)
from tests.conftest import sentences


def split_of(texts: list[str], share: float, folder: Path) -> TrainValidationSplit:
    """Split texts as a corpus is split."""
    folder.mkdir(exist_ok=True, parents=True)
    clusters, keys = DuplicateClusters(folder), []
    for text in texts:
        content, minima = hash_document(Document("", text))
        clusters.add(minima)
        keys.append(int.from_bytes(content[:8], "big"))
    sizes = np.array([len(text.encode()) for text in texts])
    return split_by_cluster(np.array(keys, dtype=np.uint64), clusters.cluster_ids(), sizes, share)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return set(zip(*(words[i:] for i in range(5)), strict=False))


def jaccard(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0


def test_validation_share(folder: Path) -> None:
    words = [random.Random(seed).choices("abcdefghijklmnop", k=200) for seed in range(1000)]
    held_out = split_of([" ".join(w) for w in words], 0.1, folder).validation
    assert 70 < held_out.sum() < 130


@given(order=st.permutations(range(40)))
@settings(max_examples=20)
def test_side_of_a_document_does_not_depend_on_the_order(folder: Path, order: list[int]) -> None:
    rng = random.Random(1)
    texts = [" ".join(rng.choices("abcdefgh", k=rng.randrange(20, 300))) for _ in range(25)]
    texts += [f"{texts[n % 3]} {n}" for n in range(15)]
    before = split_of(texts, 0.3, folder)
    after = split_of([texts[i] for i in order], 0.3, folder)
    assert before.validation[order].tolist() == after.validation.tolist()


def random_mixture(rng: np.random.Generator, families: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hash, cluster and size of each document, in random order, given the number of documents in each cluster."""
    n = sum(families)
    order = rng.permutation(n)
    clusters = np.repeat(np.arange(len(families)), families)[order]
    return rng.integers(0, 2**64, size=n, dtype=np.uint64), clusters, rng.lognormal(7, 1, size=n).astype(np.int64) + 1


@given(
    seed=st.integers(0, 2**32),
    large=st.lists(st.integers(2, 400), max_size=12),
    medium=st.lists(st.integers(2, 20), max_size=40),
    singles=st.integers(0, 1000),
    share=st.sampled_from([0.01, 0.05, 0.1, 0.3]),
)
@settings(max_examples=200)
def test_held_out_bytes_are_near_the_share_for_any_mixture(
    seed: int, large: list[int], medium: list[int], singles: int, share: float
) -> None:
    """Wherever clusters of at most half the requested size are enough to reach it."""
    keys, clusters, sizes = random_mixture(np.random.default_rng(seed), [*large, *medium, *[1] * singles])
    n_bytes = np.bincount(clusters, weights=sizes)
    requested = share * sizes.sum()
    assume(n_bytes[n_bytes <= requested / 2].sum() > requested)
    validation = split_by_cluster(keys, clusters, sizes, share).validation
    assert 1 / 1.3 <= sizes[validation].sum() / requested <= 1.3
    held_out = set(clusters[validation].tolist())
    assert not held_out & set(clusters[~validation].tolist())
    assert not held_out & set(np.flatnonzero(n_bytes > requested).tolist())


def test_clusters_are_held_out_equally_often_whatever_their_size() -> None:
    families = [1] * 4000 + [5] * 400 + [40] * 50
    held_out = np.zeros(len(families))
    documents = []
    for seed in range(100):
        keys, clusters, sizes = random_mixture(np.random.default_rng(seed), families)
        validation = split_by_cluster(keys, clusters, sizes, 0.1).validation
        held_out[np.unique(clusters[validation])] += 1
        documents.append(validation.mean())
    for part in (held_out[:4000], held_out[4000:4400], held_out[4400:]):
        assert 0.08 < part.mean() / 100 < 0.12
    assert 0.09 < np.mean(documents) < 0.11


def test_hash_of_a_single_document_is_compared_with_the_share() -> None:
    """Corpora without near-duplicates are split as before clusters had positions."""
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**64, size=5000, dtype=np.uint64)
    for share in (0.05, 0.2, 0.5, 0.9):
        parts = split_by_cluster(keys, np.arange(5000), np.full(5000, 9), share)
        assert parts.validation.tolist() == (keys / 2**64 < share).tolist()
        assert not parts.remarks


def test_few_documents_change_sides_when_others_are_added() -> None:
    rng = np.random.default_rng(0)
    keys, clusters, sizes = random_mixture(rng, [1] * 3000 + [10] * 100 + [2] * 500)
    for seed in range(20):
        kept = np.random.default_rng(seed).random(len(keys)) < 0.98
        before = split_by_cluster(keys[kept], clusters[kept], sizes[kept], 0.1).validation
        after = split_by_cluster(keys, clusters, sizes, 0.1).validation[kept]
        assert (before != after).mean() < 0.02
        alone = np.isin(clusters[kept], np.flatnonzero(np.bincount(clusters) == 1))
        assert (before != after)[alone].mean() < 0.003


def test_exact_copies_do_not_change_the_side() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**64, size=3000, dtype=np.uint64)
    clusters, sizes = np.arange(3000), np.full(3000, 1000)
    before = split_by_cluster(keys, clusters, sizes, 0.1).validation
    copied = rng.choice(3000, size=60, replace=False)
    copies = np.repeat(copied, 9)
    again = [np.concatenate([array, array[copies]]) for array in (keys, clusters, np.full(3000, 10))]
    assert split_by_cluster(*again, 0.1).validation[:3000].tolist() == before.tolist()


def test_cluster_larger_than_the_share_is_trained_on_with_a_remark() -> None:
    keys, clusters, sizes = random_mixture(np.random.default_rng(0), [300, 200, *[1] * 500])
    parts = split_by_cluster(keys, clusters, sizes, 0.05)
    assert not parts.validation[clusters < 2].any()
    assert 0.05 / 1.3 < sizes[parts.validation].sum() / sizes.sum() < 0.05 * 1.3
    [remark] = parts.remarks
    assert remark.startswith("300 documents are near-duplicates of each other and ")
    assert "they are all used for training" in remark


def test_smallest_cluster_is_held_out_if_all_are_larger_than_the_share() -> None:
    keys, clusters, sizes = random_mixture(np.random.default_rng(0), [30, 10, 20])
    parts = split_by_cluster(keys, clusters, sizes, 0.05)
    assert set(clusters[parts.validation].tolist()) == {np.bincount(clusters, weights=sizes).argmin()}
    [remark] = parts.remarks
    assert f"{sizes[parts.validation].sum() / sizes.sum():.1%} of the text is held out" in remark
    [remark] = split_by_cluster(keys, np.zeros(60, dtype=np.int64), sizes, 0.05).remarks
    assert remark.startswith("all 60 documents are near-duplicates")


def test_truncated_comparisons_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents with the same boilerplate share bands, but are not near-duplicates."""
    shared = " ".join(f"boilerplate{n}" for n in range(60))
    texts = [f"{shared} " + " ".join(random.Random(n).choices("abcdefghijklmnop", k=44)) for n in range(100)]
    for limit, truncated in ((100, False), (3, True)):
        monkeypatch.setattr(split_module, "MAX_CANDIDATES", limit)
        clusters = DuplicateClusters(folder)
        for text in texts:
            clusters.add(hash_document(Document("", text))[1])
        assert len(np.unique(clusters.cluster_ids())) > 1
        assert (0 < clusters.n_truncated <= 100) if truncated else clusters.n_truncated == 0


@pytest.mark.slow
def test_no_near_duplicates_across_the_split_of_the_default_corpus(folder: Path) -> None:
    """Brute force over all pairs with any overlap, with exact sets instead of MinHash."""
    found = list({document.text: document for document in read_documents("stdlib")}.values())
    held_out = split_of([document.text for document in found], 0.05, folder).validation
    sets = [shingles(document.text) for document in found]
    assert held_out.sum() > 10
    # MinHash is an estimate: a pair right at the threshold may fall on either side of it.
    worst = max(
        (jaccard(sets[i], sets[j]), found[i].id, found[j].id)
        for i in np.flatnonzero(held_out)
        for j in np.flatnonzero(~held_out)
        if sets[i]
    )
    assert worst[0] < NEAR_DUPLICATE + 0.1, worst


def test_edited_copies_stay_with_their_original(folder: Path) -> None:
    rng = random.Random(0)
    for seed in range(20):
        original = " ".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz", k=400)).split()
        copies = [original]
        for _ in range(4):  # a chain of edits
            words = list(copies[-1])
            for place in rng.sample(range(400), 12):
                words[place] = "changed"
            copies.append(words)
        others = [sentences(other) + f"signed {other}" * 30 for other in range(10)]
        parts = split_of([*others, *(" ".join(words) for words in copies)], 0.3, folder)
        assert len(set(parts.validation[10:].tolist())) == 1


@given(seed=st.integers(0, 10_000), n=st.integers(2, 40), at_once=st.integers(1, 50))
@settings(max_examples=60)
def test_clusters_match_brute_force(folder: Path, seed: int, n: int, at_once: int) -> None:
    """Link all pairs that agree in a band and in half of their positions, one by one."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 2**32, size=(3, 128), dtype=np.uint32)
    signatures = base[rng.integers(0, 3, size=n)]
    other = rng.random((n, 128)) < rng.random((n, 1))
    signatures = np.where(other, rng.integers(0, 2**32, size=(n, 128), dtype=np.uint32), signatures)
    family = list(range(n))
    for i in range(n):
        for j in range(i):
            band = (signatures[i].reshape(32, 4) == signatures[j].reshape(32, 4)).all(axis=1).any()
            if band and (signatures[i] == signatures[j]).mean() >= NEAR_DUPLICATE:
                family = [family[j] if member == family[i] else member for member in family]
    expected = [family.index(member) for member in family]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_module, "CHUNK_DOCUMENTS", at_once)
        clusters = DuplicateClusters(folder)
        for row in signatures:
            clusters.add(row)
        assert clusters.cluster_ids().tolist() == expected


def test_at_least_one_document_is_held_out(folder: Path) -> None:
    for n in range(2, 8):
        parts = split_of([" ".join(random.Random(i).choices("abcdef", k=200)) for i in range(n)], 0.001, folder)
        assert parts.validation.sum() == 1
        assert parts.tail is None


@given(n=st.integers(2, 6), seed=st.integers(0, 200), share=st.floats(0.01, 0.99))
@settings(max_examples=60)
def test_several_documents_are_never_split_inside(folder: Path, n: int, seed: int, share: float) -> None:
    texts = [" ".join(random.Random(f"{seed} {i}").choices("abcdef", k=99)) for i in range(n)]
    parts = split_of(texts, share, folder)
    assert parts.tail is None
    assert 0 < parts.validation.sum() < n


def test_single_text_is_split_at_its_end(folder: Path) -> None:
    text = "".join(map(chr, range(32, 1032)))
    train, validation = split_of([text], 0.1, folder).split_text(0, text)
    assert train + validation == text
    assert len(train) == 900
