"""Word-based classifiers against scikit-learn, and by hand."""

import random
import sys

import pytest

from lit_gpt_scratch.evaluation.text_classifiers import LabelledTexts, naive_bayes, word_baseline

WORDS = ["the", "film", "was", "good", "bad", "fine", "dull", "GOOD", "Awful", "a", "I", "it's", "x1", "naïve", "好的"]


def draw(n: int, seed: int) -> LabelledTexts:
    """Draw texts of three classes, each of which prefers some words."""
    rng = random.Random(seed)
    labels = [rng.randrange(3) for _ in range(n)]
    weights = [[1 + 3 * ((word + label) % 3 == 0) for word in range(len(WORDS))] for label in range(3)]
    texts = [" ".join(rng.choices(WORDS, weights[label], k=rng.randrange(12))) for label in labels]
    return LabelledTexts(texts, labels)


@pytest.mark.parametrize("seed", range(5))
def test_naive_bayes_matches_scikit_learn(seed: int) -> None:
    pytest.importorskip("sklearn")
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    train, other = draw(60, seed), draw(200, seed + 100)
    expected = make_pipeline(CountVectorizer(), MultinomialNB()).fit(*train).predict(other.texts)
    assert naive_bayes(train, other.texts) == expected.tolist()


def test_naive_bayes_by_hand() -> None:
    """P(1 | "fine film") ~ 1/3 * 2/6 * 2/6 = 1/27, and P(0 | ...) ~ 2/3 * 1/8 * 2/8 = 1/48."""
    train = LabelledTexts(["dull dull", "film awful", "fine film"], [0, 0, 1])
    assert naive_bayes(train, ["fine film", "dull", "words not seen"]) == [1, 0, 0]


def test_baseline_is_logistic_regression_on_tf_idf() -> None:
    pytest.importorskip("sklearn")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train, other = draw(60, 0), draw(200, 1)
    model = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(*train)
    assert word_baseline(train, other) == {"tf-idf": model.score(*other)}


def test_baseline_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    train, other = draw(60, 0), draw(50, 1)
    right = sum(a == b for a, b in zip(naive_bayes(train, other.texts), other.labels, strict=True))
    assert word_baseline(train, other) == {"naive bayes": right / 50}


@pytest.mark.parametrize("train", [LabelledTexts(["", "!", "1"], [0, 1, 1]), LabelledTexts(["one", "two"], [1, 1])])
def test_texts_without_words_or_classes(train: LabelledTexts) -> None:
    for name, value in word_baseline(train, LabelledTexts(["a text"], [1])).items():
        assert (name, value) == ("naive bayes", 1.0)


def test_many_training_texts_are_sampled_from_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first texts of a table that is sorted by label have one class."""
    monkeypatch.setattr("lit_gpt_scratch.evaluation.text_classifiers.MAX_TRAINING_TEXTS", 10)
    train = LabelledTexts(["good film"] * 15 + ["bad film"] * 15, [0] * 15 + [1] * 15)
    [found] = word_baseline(train, LabelledTexts(["good", "bad"], [0, 1])).values()
    assert found == 1.0
