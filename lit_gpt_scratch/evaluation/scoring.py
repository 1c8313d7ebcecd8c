"""How well a model predicts a text."""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_gpt_scratch.batch import IGNORED
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.objectives.likelihood import token_nats
from lit_gpt_scratch.objectives.metrics import LikelihoodMetric
from lit_gpt_scratch.text.tokenizer import Tokenizer

WINDOWS_AT_ONCE = 16


@torch.inference_mode()
def score(model: GPT, tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, float | int]:
    """Score whole documents: every byte of each, with no context from another document.

    A document is preceded by the start of text and cut into windows of the model's ``block_size``; each of its
    tokens is predicted once. That the document ends is not scored.

    Returns:
        ``loss`` (nats per token), ``perplexity`` (per token), ``bits_per_byte``, ``tokens``, ``bytes``.
    """
    device = next(model.parameters()).device
    metric = LikelihoodMetric().to(device)
    n_bytes = 0

    def windows() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal n_bytes
        T = model.block_size
        for text in texts:
            n_bytes += len(text.encode())
            ids = torch.tensor([tokenizer.start_of_text, *tokenizer.encode(text)])
            for start in range(0, len(ids) - 1, T):
                inputs, labels = ids[start : start + T], ids[start + 1 : start + T + 1]
                yield inputs[: len(labels)], labels

    pending = windows()
    while batch := list(islice(pending, WINDOWS_AT_ONCE)):
        # Filled up behind the last token: seen by none before it, and not scored.
        inputs, labels = (
            pad_sequence(list(column), batch_first=True, padding_value=fill).to(device)  # (B, T)
            for column, fill in zip(zip(*batch, strict=True), (0, IGNORED), strict=True)
        )
        nats, tokens = token_nats(model(inputs), labels)
        metric.update(nats, tokens, torch.zeros_like(tokens))
    metric.bytes += n_bytes
    values = {name: value.item() for name, value in metric.compute().items()}
    return {**values, "tokens": int(metric.tokens.item()), "bytes": n_bytes}
