"""The split: by document, stable, and with no near-duplicate across it."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.text.sources import Document, documents
from lit_gpt_scratch.text.split import NEAR_DUPLICATE, split
from tests.conftest import sentences


def corpus(n: int) -> list[Document]:
    return [Document(f"{seed}.txt", sentences(seed) + f"signed {seed}" * 30) for seed in range(n)]


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return set(zip(*(words[i:] for i in range(5)), strict=False))


def jaccard(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0


def test_about_the_share_is_held_out() -> None:
    words = [random.Random(seed).choices("abcdefghijklmnop", k=200) for seed in range(1000)]
    held_out = split([Document(str(i), " ".join(w)) for i, w in enumerate(words)], 0.1).validation
    assert 70 < len(held_out) < 130


@given(order=st.permutations(range(12)), drop=st.integers(0, 11))
@settings(max_examples=30, deadline=None)
def test_a_documents_side_depends_on_nothing_else(order: list[int], drop: int) -> None:
    rng = random.Random(1)
    texts = [" ".join(rng.choices("abcdefgh", k=300)) for _ in range(12)]
    before = split([Document(str(i), text) for i, text in enumerate(texts)], 0.4)
    kept = [i for i in order if i != drop]
    after = split([Document(f"renamed {i}", texts[i]) for i in kept], 0.4)
    assert [i for i in kept if i in before.validation] == [
        kept[place] for place in range(len(kept)) if place in after.validation
    ]


def test_no_near_duplicate_stands_on_both_sides_of_the_default_corpus() -> None:
    """Brute force over all pairs that share anything, with exact sets instead of MinHash."""
    found = list(documents("stdlib"))
    parts = split(found, 0.05)
    sets = [shingles(document.text) for document in found]
    held_out = [i for i in range(len(found)) if i in parts.validation]
    training = [i for i in range(len(found)) if i not in parts.validation and i not in parts.duplicates]
    assert len(held_out) > 10
    # MinHash estimates: a pair right at the threshold may fall on either side of it.
    worst = max((jaccard(sets[i], sets[j]), found[i].id, found[j].id) for i in held_out for j in training if sets[i])
    assert worst[0] < NEAR_DUPLICATE + 0.1, worst


def test_edited_copies_stay_with_their_original() -> None:
    rng = random.Random(0)
    for seed in range(20):
        original = " ".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz", k=400)).split()
        copies = [original]
        for _ in range(4):  # a chain: each an edit of the one before
            words = list(copies[-1])
            for place in rng.sample(range(400), 12):
                words[place] = "changed"
            copies.append(words)
        others = corpus(10)
        parts = split([*others, *(Document(f"copy {i}", " ".join(w)) for i, w in enumerate(copies))], 0.3)
        assert len({place in parts.validation for place in range(10, 15)}) == 1


def test_exact_copies_are_used_once() -> None:
    texts = corpus(10)
    parts = split([*texts, Document("copy", texts[3].text)], 0.2)
    assert parts.duplicates == {10}
    assert parts.parts(10, texts[3]) == ("", "")


def test_some_document_is_always_held_out() -> None:
    for n in range(2, 8):
        parts = split([Document(str(i), " ".join(random.Random(i).choices("abcdef", k=200))) for i in range(n)], 0.001)
        assert len(parts.validation) == 1
        assert parts.cut is None


@given(n=st.integers(2, 6), seed=st.integers(0, 200), share=st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None)
def test_several_documents_are_never_cut(n: int, seed: int, share: float) -> None:
    documents = [Document(str(i), " ".join(random.Random(f"{seed} {i}").choices("abcdef", k=99))) for i in range(n)]
    parts = split(documents, share)
    assert parts.cut is None
    assert 0 < len(parts.validation) < n


def test_a_single_text_is_cut_at_its_end() -> None:
    text = "".join(map(chr, range(32, 1032)))
    parts = split([Document("one", text)], 0.1)
    train, validation = parts.parts(0, Document("one", text))
    assert train + validation == text
    assert len(train) == 900


def test_the_fingerprint_sees_every_change() -> None:
    texts = corpus(5)
    seen = {split(texts, 0.2).fingerprint}
    for i, document in enumerate(texts):
        for changed in (Document(document.id, document.text + " "), Document(document.id + "x", document.text)):
            seen.add(split([*texts[:i], changed, *texts[i + 1 :]], 0.2).fingerprint)
    assert len(seen) == 11
