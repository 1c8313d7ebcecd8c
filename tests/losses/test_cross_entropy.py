"""Cross-entropy, log-probabilities and likelihood metrics against explicit sums."""

import math

import pytest
import torch

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.losses.cross_entropy import sequence_logprobs, token_cross_entropy, token_logprobs
from lit_gpt_scratch.losses.metrics import LikelihoodMetric


def test_cross_entropy_sums_over_labels_that_count() -> None:
    logits, labels = torch.randn(3, 4, 7), torch.randint(7, (3, 4))
    labels[0, 1] = labels[2, 3] = IGNORE_INDEX
    expected = sum(
        -math.log(math.exp(logits[b, t, labels[b, t]]) / sum(math.exp(x) for x in logits[b, t].tolist()))
        for b in range(3)
        for t in range(4)
        if labels[b, t] != IGNORE_INDEX
    )
    nats, tokens = token_cross_entropy(logits, labels)
    assert nats.item() == pytest.approx(expected, rel=1e-5)
    assert tokens.item() == 10


def test_batch_without_labels_is_zero_not_nan() -> None:
    nats, tokens = token_cross_entropy(torch.randn(1, 2, 5), torch.full((1, 2), IGNORE_INDEX))
    assert (nats.item(), tokens.item()) == (0.0, 0)


def test_metric_weights_batches_by_tokens() -> None:
    metric = LikelihoodMetric()
    metric.update(torch.tensor(30.0), torch.tensor(10), torch.tensor(25))
    metric.update(torch.tensor(2.0), torch.tensor(2), torch.tensor(7))
    values = metric.compute()
    assert values["loss"].item() == pytest.approx(32 / 12)
    assert values["perplexity"].item() == pytest.approx(math.exp(32 / 12), rel=1e-6)
    assert values["bits_per_byte"].item() == pytest.approx(32 / 32 / math.log(2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_non_finite_loss_makes_the_metric_nan(bad: float) -> None:
    metric = LikelihoodMetric()
    for nats in (3.0, bad, 5.0, bad):
        metric.update(torch.tensor(nats), torch.tensor(1), torch.tensor(1))
    assert all(value.isnan() for value in metric.compute().values())
    metric.reset()
    metric.update(torch.tensor(3.0), torch.tensor(1), torch.tensor(1))
    assert metric.compute()["loss"].item() == 3.0


def test_metric_does_not_depend_on_the_order_of_batches() -> None:
    nats = (torch.rand(1000) * 5000).tolist()

    def total(values: list[float]) -> float:
        metric = LikelihoodMetric()
        for value in values:
            metric.update(torch.tensor(value), torch.tensor(1), torch.tensor(1))
        return metric.compute()["loss"].item()

    assert total(nats) == total(nats[::-1]) == pytest.approx(sum(nats) / 1000, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sequence_logprobs_are_products_of_probabilities(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(4, 5, 7, dtype=torch.float64).to(dtype), torch.randint(7, (4, 5))
    labels[0, 1] = labels[2, 3] = IGNORE_INDEX
    labels[3] = IGNORE_INDEX
    nats, counts = sequence_logprobs(logits, labels)
    chances = logits.double().softmax(-1)
    for b in range(4):
        counted = [t for t in range(5) if labels[b, t] != IGNORE_INDEX]
        product = math.prod(chances[b, t, labels[b, t]].item() for t in counted)
        assert nats[b].item() == pytest.approx(math.log(product), rel=1e-5, abs=1e-12)
        assert counts[b].item() == len(counted)
    assert nats.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert token_logprobs(logits, labels)[labels == IGNORE_INDEX].tolist() == [0.0] * 7
    assert -nats.sum().item() == pytest.approx(token_cross_entropy(logits, labels)[0].item(), rel=1e-5)


def test_gradient_of_sequence_logprobs() -> None:
    """d log p(y) / d logits = onehot(y) - p where there is a label, else 0."""
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, IGNORE_INDEX, 4], [0, 2, IGNORE_INDEX]])
    sequence_logprobs(logits, labels)[0].sum().backward()
    expected = torch.nn.functional.one_hot(labels.clamp(min=0), 5) - logits.detach().softmax(-1)
    expected[labels == IGNORE_INDEX] = 0
    assert torch.allclose(logits.grad, expected)
