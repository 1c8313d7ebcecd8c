"""Class probabilities against one forward pass per text, and metrics against their formulas."""

import numpy as np
import pytest
import torch

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.evaluation.classification_eval import ClassificationExample, classify, evaluate_classification
from lit_gpt_scratch.evaluation.intervals import summarize
from lit_gpt_scratch.evaluation.registry import summary_to_dict
from lit_gpt_scratch.evaluation.results_table import format_results
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.output_heads import ClassificationHead
from lit_gpt_scratch.text.document import TableRow
from lit_gpt_scratch.text.tokenizer import Tokenizer
from lit_gpt_scratch.text.windows import Windows
from tests.conftest import TINY, sentences

NAMES = ("good", "neutral", "bad")


@pytest.fixture
def classifier(tokenizer: Tokenizer) -> GPT:
    torch.manual_seed(0)
    model = GPT(TINY, tokenizer.vocab_size, 64, output_head=ClassificationHead(3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.ndim == 1 else 0.0))
    return model


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_probabilities_are_independent_of_the_batch(classifier: GPT, tokenizer: Tokenizer, pooling: str) -> None:
    texts = [line[: 2 + 3 * k] for k, line in enumerate(sentences(1, 9).splitlines())]
    found = classify(classifier, tokenizer, texts, pooling)
    assert found.shape == (9, 3)
    for text, chances in zip(texts, found, strict=True):
        logits = classifier(torch.tensor([[tokenizer.start_of_text, *tokenizer.encode(text)]]))[0]  # (T, 3)
        expected = (logits[-1] if pooling == "last" else logits.mean(0)).softmax(-1)
        assert chances.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_accuracy_f1_and_confusion_by_hand(classifier: GPT, tokenizer: Tokenizer) -> None:
    texts = sentences(2, 40).splitlines()
    given = classify(classifier, tokenizer, texts).argmax(1).tolist()
    assert len(set(given)) == 3
    true = [(label + (k % 3 == 0)) % 3 for k, label in enumerate(given)]
    labelled = [ClassificationExample("", text, label) for text, label in zip(texts, true, strict=True)]
    found = summarize(evaluate_classification(classifier, tokenizer, labelled, NAMES))
    pairs = list(zip(true, given, strict=True))
    f1 = []
    for label in range(3):
        both, predicted, is_ = pairs.count((label, label)), given.count(label), true.count(label)
        f1.append(2 * both / (predicted + is_))
    assert found.metrics["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / 40)
    assert found.metrics["f1"] == pytest.approx(sum(f1) / 3)
    auroc = []
    chances = classify(classifier, tokenizer, texts)
    for label in range(3):
        is_ = np.array(true) == label
        above = chances[is_, label][:, None] - chances[~is_, label]  # of the class against the others
        auroc.append(((above > 0) + (above == 0) / 2).mean())
    assert found.metrics["auroc"] == pytest.approx(np.mean(auroc))
    confusion = found.extra["confusion"]
    assert {(a, b): confusion[NAMES[a]][NAMES[b]] for a in range(3) for b in range(3)} == {
        (a, b): pairs.count((a, b)) for a in range(3) for b in range(3)
    }


@pytest.mark.filterwarnings("error")
def test_no_auroc_for_texts_of_a_single_class(classifier: GPT, tokenizer: Tokenizer) -> None:
    labelled = [ClassificationExample("", text, 1) for text in sentences(3, 5).splitlines()]
    found = summary_to_dict(summarize(evaluate_classification(classifier, tokenizer, labelled, NAMES)))
    assert found["auroc"] is None
    assert found["intervals"]["auroc"] is None
    assert "auroc" not in format_results(found)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "x"}, " has no label column 'label'; set --data.label_column to an existing column (text)"),
        ({"text": "x", "label": " "}, ": the label in 'label' is missing"),
        ({"text": "x", "label": "ugly"}, ": the label 'ugly' is not one of the model's classes (good, neutral, bad)"),
        ({"text": "", "label": "good"}, " has no text in column 'text'"),
        ({"text": 3, "label": "good"}, ": 'text' must be a string, but its type is int"),
    ],
)
def test_invalid_rows_are_reported(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        ClassificationExample.from_row(TableRow("r:7", "r: line 7", fields), "text", "label", NAMES)
    assert str(error.value).startswith(f"r: line 7{message}")


def test_long_text_is_truncated_to_the_context(classifier: GPT, tokenizer: Tokenizer) -> None:
    """As in training with ``--data.too_long cut``: the rest of the text changes nothing."""
    texts = ["word " * 60, "word " * 60 + "and more"]
    long = classify(classifier, tokenizer, texts)
    np.testing.assert_allclose(long[0], long[1], rtol=1e-5)
    ids = torch.tensor([[tokenizer.start_of_text, *tokenizer.encode(texts[0])][:64]])
    with torch.inference_mode():
        expected = classifier(ids)[0, -1].softmax(-1)
    np.testing.assert_allclose(long[0], expected.numpy(), rtol=1e-5)


def test_long_text_is_split_into_windows(classifier: GPT, tokenizer: Tokenizer) -> None:
    texts = ["word " * 60, "short", "other words " * 200]
    found = classify(classifier, tokenizer, texts, "mean", Windows(16, 5))
    for text, chances in zip(texts, found, strict=True):
        parts = Windows(16, 5).split(tokenizer.encode(text), tokenizer.start_of_text)
        logits = torch.cat([classifier(torch.tensor([part]))[0] for part in parts])  # (T, 3)
        assert chances.tolist() == pytest.approx(logits.mean(0).softmax(-1).tolist(), abs=1e-6)


def test_label_may_be_a_number() -> None:
    assert (
        ClassificationExample.from_row(TableRow("", "", {"text": "x", "label": 1}), "text", "label", ("0", "1")).label
        == 1
    )
