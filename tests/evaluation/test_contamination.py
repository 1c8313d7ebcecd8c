"""Contaminated texts against a brute-force search with sets of tuples."""

import random

from lit_gpt_scratch.evaluation.contamination import NGRAM_WORDS, find_contaminated


def test_equals_brute_force_search() -> None:
    rng = random.Random(0)
    for n in (3, 5):
        texts = [" ".join(rng.choices(["one", "Two,", "three", "four"], k=rng.randrange(0, 9))) for _ in range(60)]
        training = [" ".join(rng.choices(["One", "two", "three!", "four"], k=rng.randrange(0, 40))) for _ in range(9)]
        training += ["TWO", texts[-1].title()]

        def words(text: str) -> list[str]:
            return text.lower().replace(",", "").replace("!", "").split()

        def runs(text: str, n: int) -> set[tuple[str, ...]]:
            return {tuple(words(text)[start : start + n]) for start in range(len(words(text)) - n + 1)}

        def found(text: str, n: int = n, training: list[str] = training) -> bool:
            if len(words(text)) < n:  # fewer than 8 words: compared with whole documents
                return bool(words(text)) and words(text) in map(words, training)
            return any(runs(text, n) & runs(document, n) for document in training)

        expected = [found(text) for text in texts]
        assert any(expected)
        assert not all(expected)
        assert find_contaminated(texts, training, n).tolist() == expected


def test_gpt3_rule_by_example() -> None:
    alphabet = " ".join("abcdefghijklmnopqrstuvwxyz")
    assert NGRAM_WORDS == 13
    texts = [alphabet[:25], alphabet[:23] + " z z", alphabet[:15].title(), alphabet[:13], "A, b. C!", ""]
    assert find_contaminated(texts, ["x " + alphabet]).tolist() == [True, False, True, False, False, False]
    assert find_contaminated(texts, []).sum() == 0


def test_short_text_only_matches_a_whole_document() -> None:
    """GPT-3's n-grams had at least 8 words; shorter ones can be requested."""
    texts = ["Ok", "I am", "a b c d e f g"]
    assert not find_contaminated(texts, ["he said ok then", "I am the walrus", "a b c d e f g h"]).any()
    assert find_contaminated(texts, ["OK!", "i am.", "a, b, c, d, e, f, g"]).all()
    assert find_contaminated(texts, ["he said ok then", "I am the walrus"], words=1).tolist() == [True, True, False]
