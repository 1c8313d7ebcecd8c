"""Next-token prediction: pretraining, instruction tuning, and whatever else learns from labelled tokens."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lit_gpt_scratch.batch_types import IGNORE_INDEX, Batch
from lit_gpt_scratch.losses.cross_entropy import token_cross_entropy, token_logprobs
from lit_gpt_scratch.losses.metrics import LikelihoodMetric
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.tasks.gpt_module import GPTModule


class LanguageModel(GPTModule):
    """A GPT that learns to predict the next token, wherever it has a label.

    Validation and test measure loss, perplexity and bits per byte of the labelled tokens. If compiling is asked for,
    head and loss are compiled as well, which pays with a large vocabulary.
    """

    metrics: LikelihoodMetric
    token_bytes: Tensor

    @override
    def build_metrics(self) -> LikelihoodMetric:
        self.register_buffer("token_bytes", torch.tensor(self.data.token_bytes), persistent=False)
        return LikelihoodMetric()

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Logits of the next token: (B, T) int64 -> (B, T, vocab_size) float32; see ``GPT.forward``."""
        logits: Tensor = self.net(input_ids, document_ids)
        return logits

    @override
    def loss_and_count(self, batch: Batch) -> tuple[Tensor, Tensor]:
        given = batch["input_ids"], batch.get("document_ids")
        if not self._reads_compiled:
            return token_cross_entropy(self(*given), batch["labels"])
        nats, tokens = _compiled(_nats)(self.net, self.net.hidden_states(*given), batch["labels"])
        return nats, tokens

    @override
    def update_metrics(self, batch: Batch) -> Tensor:
        given, labels = (batch["input_ids"], batch.get("document_ids")), batch["labels"]
        if self._reads_compiled:
            lost: Tensor = _compiled(_lost)(self.net, self.net.hidden_states(*given), labels)
        else:
            lost = -token_logprobs(self(*given), labels)
        counted = labels != IGNORE_INDEX
        self.metrics.update(lost.sum(), counted.sum(), self.token_bytes[labels[counted]].sum())
        return lost

    @property
    def _reads_compiled(self) -> bool:
        """Whether head and loss are one program, which saves writing the logits back and forth."""
        return bool(self.device_mesh is None and self.compiled and self.compile_network is True)


def _nats(net: GPT, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return token_cross_entropy(net.apply_head(x), labels)


def _lost(net: GPT, x: Tensor, labels: Tensor) -> Tensor:
    return -token_logprobs(net.apply_head(x), labels)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Made when it is needed: the compiler takes seconds to import. No method, which a copy of a task would share."""
    return torch.compile(function)
