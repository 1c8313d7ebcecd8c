"""Texts that are found in others, against sets of tuples."""

import random

from lit_gpt_scratch.evaluation.contamination import WORDS, contaminated


def test_what_is_found_is_what_brute_force_finds() -> None:
    rng = random.Random(0)
    for n in (3, 5):
        texts = [" ".join(rng.choices(["one", "Two,", "three", "four"], k=rng.randrange(0, 9))) for _ in range(60)]
        training = [" ".join(rng.choices(["One", "two", "three!", "four"], k=rng.randrange(0, 40))) for _ in range(9)]

        def words(text: str) -> list[str]:
            return text.lower().replace(",", "").replace("!", "").split()

        def runs(text: str, n: int) -> set[tuple[str, ...]]:
            return {tuple(words(text)[start : start + n]) for start in range(len(words(text)) - n + 1)}

        def found(text: str, n: int = n, training: list[str] = training) -> bool:
            n = min(n, len(words(text)))
            return bool(n) and any(runs(text, n) & runs(document, n) for document in training)

        expected = [found(text) for text in texts]
        assert any(expected)
        assert not all(expected)
        assert contaminated(texts, training, n).tolist() == expected


def test_gpt_3s_rule_by_example() -> None:
    alphabet = " ".join("abcdefghijklmnopqrstuvwxyz")
    assert WORDS == 13
    texts = [alphabet[:25], alphabet[:23] + " z z", "a b", "b a", "A, b. C!", ""]
    assert contaminated(texts, ["x " + alphabet]).tolist() == [True, False, True, False, True, False]
    assert contaminated(texts, []).sum() == 0
