"""The train/validation split: by document, stable, and without near-duplicates across it."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
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
    return split_by_cluster(np.array(keys, dtype=np.uint64), clusters.cluster_ids(), share)


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


@given(order=st.permutations(range(12)), drop=st.integers(0, 11))
@settings(max_examples=30)
def test_side_of_a_document_depends_on_its_content_alone(folder: Path, order: list[int], drop: int) -> None:
    rng = random.Random(1)
    texts = [" ".join(rng.choices("abcdefgh", k=300)) for _ in range(12)]
    before = split_of(texts, 0.4, folder)
    kept = [i for i in order if i != drop]
    after = split_of([texts[i] for i in kept], 0.4, folder)
    assert before.validation[kept].tolist() == after.validation.tolist()


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
