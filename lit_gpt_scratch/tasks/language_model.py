"""Next-token prediction: pretraining and instruction tuning."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lit_gpt_scratch.batch_types import IGNORE_INDEX, Batch
from lit_gpt_scratch.kernels.compiler_backend import CompilerBackend
from lit_gpt_scratch.losses.cross_entropy import token_cross_entropy, token_logprobs
from lit_gpt_scratch.losses.metrics import LikelihoodMetric
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.tasks.gpt_module import GPTModule


class LanguageModel(GPTModule):
    """GPT trained by next-token prediction at all positions that have a label.

    The validation and test metrics are the loss, the perplexity and the bits per byte over the labeled tokens. With
    ``compile=True``, the output head and the loss are compiled together, so that the logits are not stored in memory.
    """

    metrics: LikelihoodMetric
    returns_label_losses = True

    @override
    def build_metrics(self) -> LikelihoodMetric:
        return LikelihoodMetric()

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Compute next-token logits of shape (B, T, vocab_size) from token ids of shape (B, T); see ``GPT.forward``."""
        logits: Tensor = self.net(input_ids, document_ids)
        return logits

    @override
    def loss_and_count(self, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs, labels = (batch["input_ids"], batch.get("document_ids")), batch["labels"]
        if not self._compiles_loss:
            return token_cross_entropy(self(*inputs), labels)
        loss, count = _compile(_head_and_loss)(self.net, self.net.hidden_states(*inputs), labels)
        return loss, count

    @override
    def update_metrics(self, batch: Batch) -> Tensor:
        inputs, labels = (batch["input_ids"], batch.get("document_ids")), batch["labels"]
        if self._compiles_loss:
            losses: Tensor = _compile(_head_and_token_losses)(self.net, self.net.hidden_states(*inputs), labels)
        else:
            losses = -token_logprobs(self(*inputs), labels)  # (B, T)
        self.metrics.update(losses.sum(), (labels != IGNORE_INDEX).sum(), batch["text_bytes"].sum())
        return losses

    @property
    def _compiles_loss(self) -> bool:
        """Whether the head and the loss are compiled together, which avoids storing the logits in memory."""
        return bool(self.device_mesh is None and self.compiled and self.compile_network is True)


def _head_and_loss(net: GPT, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return token_cross_entropy(net.apply_head(x), labels)


def _head_and_token_losses(net: GPT, x: Tensor, labels: Tensor) -> Tensor:
    return -token_logprobs(net.apply_head(x), labels)


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function on first use, because importing the compiler takes seconds.

    Pass only module-level functions, because copies of a module would share a compiled method.
    """
    return torch.compile(function, backend=CompilerBackend(required=True))
