"""Text classifiers based on word counts, used as baselines for neural classifiers."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

MAX_TRAINING_TEXTS: Final = 20_000
"""Maximum number of training texts. Training on this many texts takes a few seconds."""
WORD: Final = re.compile(r"\b\w\w+\b")
"""Pattern that matches words of two or more characters, as in scikit-learn's vectorizers."""


class LabelledTexts(NamedTuple):
    """Texts with class indices.

    Attributes:
        texts: N texts.
        labels: Class index of each text, N integers.
    """

    texts: Sequence[str]
    labels: Sequence[int]


def word_baseline(train: LabelledTexts, validation: LabelledTexts) -> dict[str, float]:
    """Return the validation accuracy of a classifier based on word counts, keyed by the classifier's name.

    The classifier is a logistic regression on TF-IDF features (``tf-idf``) if scikit-learn is installed, and otherwise
    ``naive bayes``. The result is empty if logistic regression cannot be trained, because the training texts have only
    one class or no words.

    Args:
        train: Training texts, of which at most ``MAX_TRAINING_TEXTS`` are used.
        validation: Validation texts.
    """
    every = max(1, -(-len(train.texts) // MAX_TRAINING_TEXTS))  # spread out, because a table may be sorted by label
    train = LabelledTexts(train.texts[::every], train.labels[::every])
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError:
        return {"naive bayes": accuracy(naive_bayes(train, validation.texts), validation.labels)}
    if len(set(train.labels)) < 2 or not any(map(WORD.search, train.texts)):
        return {}
    model = make_pipeline(TfidfVectorizer(token_pattern=WORD.pattern), LogisticRegression(max_iter=1000))
    predicted = model.fit(train.texts, train.labels).predict(validation.texts)
    return {"tf-idf": accuracy(predicted.tolist(), validation.labels)}


def naive_bayes(train: LabelledTexts, texts: Sequence[str]) -> list[int]:
    """Classify texts by multinomial naive Bayes on word counts, with add-one smoothing.

        P(class | text) ~ P(class) * product over words of (count(word, class) + 1) / (count(class) + V)

    Args:
        train: Training texts. ``V`` is the number of distinct words in them; other words are ignored.
        texts: N texts to classify.

    Returns:
        Predicted class of each text, N integers.
    """
    classes = sorted(set(train.labels))
    words = {word: index for index, word in enumerate(sorted({w for text in train.texts for w in count_words(text)}))}
    counts = np.ones((len(classes), len(words)))
    for text, label in zip(train.texts, train.labels, strict=True):
        for word, n in count_words(text).items():
            counts[classes.index(label), words[word]] += n
    log_likelihood = np.log(counts / counts.sum(1, keepdims=True))  # (n_classes, V)
    log_prior = np.log([train.labels.count(label) / len(train.labels) for label in classes])
    predicted = []
    for text in texts:
        known = [(words[word], n) for word, n in count_words(text).items() if word in words]
        index, count = np.array(known, dtype=np.int64).reshape(-1, 2).T
        predicted.append(classes[int(np.argmax(log_prior + log_likelihood[:, index] @ count))])
    return predicted


def count_words(text: str) -> Counter[str]:
    """Count the words of a text, ignoring case."""
    return Counter(WORD.findall(text.lower()))


def accuracy(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """Return the fraction of predictions that equal the labels."""
    return sum(a == b for a, b in zip(predicted, labels, strict=True)) / len(labels)
