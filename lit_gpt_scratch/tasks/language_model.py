"""Next-token prediction: pretraining and instruction tuning."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from typing_extensions import override

from lit_gpt_scratch.batch_types import IGNORE_INDEX, Batch
from lit_gpt_scratch.distributed.parallelize import TENSOR_PARALLEL
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.kernels.compiler_backend import CompilerBackend
from lit_gpt_scratch.losses.chunked_cross_entropy import chunked_cross_entropy, chunked_token_logprobs
from lit_gpt_scratch.losses.cross_entropy import (
    default_max_logits_mb,
    positions_per_chunk,
    token_cross_entropy,
    token_logprobs,
)
from lit_gpt_scratch.losses.labels_ahead import labels_ahead
from lit_gpt_scratch.losses.metrics import LikelihoodMetric
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.tasks.gpt_module import GPTModule

DEFAULT_MULTI_TOKEN_WEIGHT: Final = 0.3


class LanguageModel(GPTModule):
    """GPT trained by next-token prediction at all positions that have a label.

    The validation and test metrics are the loss, the perplexity and the bits per byte over the labeled tokens.

    If the logits of a micro-batch take up more memory than ``max_logits_mb``, the loss is computed in chunks of
    positions, in training and in validation. ``max_logits_mb`` has no effect in three cases. With ``compile=True``, the
    output head and the loss of a model that is not sharded are compiled together instead, so that the logits are not
    stored in memory. If tensor
    parallelism splits the head, all logits are computed at once. The same applies to ``16-mixed``, because the
    gradients that are computed in the forward pass could overflow before the loss is scaled.

    If ``model.gpt.multi_token_depth`` is set, an auxiliary loss trains modules that predict tokens further ahead. As in
    DeepSeek-V3 (https://arxiv.org/abs/2412.19437, section 2.2), it is the mean over these modules of the cross-entropy
    divided by the number of all labels. It is logged as ``multi_token_loss``; all other metrics are those
    of the next token.

    Args:
        args: Positional arguments of ``GPTModule``.
        max_logits_mb: Maximum size of the float32 logits that are in memory at once, in MB. If the logits of a
            micro-batch are larger, the loss is computed in chunks of positions; with its gradients, a chunk takes up
            four times the size of its logits. Larger chunks are faster. By default, 64 on a CPU and 1024 on other
            devices.
        multi_token_weight: Weight of the auxiliary loss of multi-token prediction.
        kwargs: Arguments of ``GPTModule``.

    Raises:
        UserError: ``max_logits_mb`` or ``multi_token_weight`` is not positive.
    """

    metrics: LikelihoodMetric
    multi_token_metric: LikelihoodMetric | None
    returns_label_losses = True
    predicts_ahead = True
    _scales_loss = False

    def __init__(
        self,
        *args: Any,
        max_logits_mb: float | None = None,
        multi_token_weight: float = DEFAULT_MULTI_TOKEN_WEIGHT,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if max_logits_mb is not None and max_logits_mb <= 0:
            raise UserError(f"model.max_logits_mb is {max_logits_mb}; it must be positive")
        if not 0 < multi_token_weight < math.inf:
            raise UserError(f"model.multi_token_weight is {multi_token_weight}; it must be positive and finite")
        self.max_logits_mb = max_logits_mb
        self.multi_token_weight = multi_token_weight

    @override
    def configure_model(self) -> None:
        super().configure_model()
        depth, shortest = self.gpt.multi_token_depth, self.data_info.shortest_window
        flag, length = "data.block_size is", self.data_info.block_size
        if shortest is not None:
            flag, length = "data.block_size_stages begins with", shortest
        if depth >= length:
            raise UserError(
                f"model.gpt.multi_token_depth is {depth}, but {flag} {length}, so that no token is so far "
                f"ahead; choose a smaller multi_token_depth"
            )
        if not depth and self.multi_token_weight != DEFAULT_MULTI_TOKEN_WEIGHT:
            raise UserError(
                f"model.multi_token_weight is {self.multi_token_weight}, but model.gpt.multi_token_depth is 0; "
                "set multi_token_depth, or remove multi_token_weight"
            )
        self._scales_loss = str(self.trainer.precision) == "16-mixed"

    @property
    @override
    def loss_chunk_size(self) -> int | None:
        is_split = self.device_mesh is not None and self.device_mesh[TENSOR_PARALLEL].size() > 1
        if is_split or self._compiles_loss or self._scales_loss:
            return None
        return positions_per_chunk(self.net.vocab_size, self.max_logits_mb or default_max_logits_mb(self.device))

    @override
    def build_metrics(self) -> LikelihoodMetric:
        self.multi_token_metric = LikelihoodMetric() if self.gpt.multi_token_depth else None
        return LikelihoodMetric()

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Compute next-token logits of shape (B, T, vocab_size) from token ids of shape (B, T); see ``GPT.forward``."""
        logits: Tensor = self.net(input_ids, document_ids)
        return logits

    @override
    def loss_and_count(self, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs, labels = (batch["input_ids"], batch.get("document_ids")), batch["labels"]
        if self.gpt.multi_token_depth:
            x, *ahead = self.net.hidden_states_by_depth(*inputs)
            pairs = zip(ahead, self._labels_ahead(batch), strict=True)
            nats = torch.stack([self._state_loss(*each)[0] for each in pairs])
            self.auxiliary_losses["multi_token_loss"] = self.multi_token_weight, nats.mean()
            return self._state_loss(x, labels)
        if not self._compiles_loss and (self.loss_chunk_size is None or labels.numel() <= self.loss_chunk_size):
            return token_cross_entropy(self(*inputs), labels)
        x = self.net.hidden_states(*inputs)
        if self.device_mesh is not None and torch.is_grad_enabled() and not x.requires_grad:
            # FSDP2 would not reduce the gradients of a head that is called outside of its forward methods, and whose
            # input does not require gradients.
            return token_cross_entropy(self.net.apply_head(x), labels)
        return self._state_loss(x, labels)

    def _state_loss(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the summed loss and the number of labels from hidden states of shape (B, T, n_embd)."""
        if self._compiles_loss:
            loss, count = _compile(_head_and_loss)(self.net, x, labels)
            return loss, count
        head, finalize = self.net.head, self.net.finalize_output
        if self.loss_chunk_size is None or labels.numel() <= self.loss_chunk_size:
            return token_cross_entropy(finalize(head(x)), labels)
        return chunked_cross_entropy(head, finalize, x, labels, self.loss_chunk_size)

    def _labels_ahead(self, batch: Batch) -> list[Tensor]:
        """Return the labels for each module of multi-token prediction."""
        ids, labels, documents = batch["input_ids"], batch["labels"], batch.get("document_ids")
        begin, end = self.data_info.start_of_text, self.data_info.end_of_text
        depths = range(1, self.gpt.multi_token_depth + 1)
        return [labels_ahead(ids, labels, depth, documents, begin, end) for depth in depths]

    @override
    def update_metrics(self, batch: Batch) -> Tensor:
        inputs, labels = (batch["input_ids"], batch.get("document_ids")), batch["labels"]
        count, n_bytes = (labels != IGNORE_INDEX).sum(), batch["text_bytes"].sum()
        x, *ahead = self.net.hidden_states_by_depth(*inputs)
        losses = self._label_losses(x, labels)
        self.metrics.update(losses.sum(), count, n_bytes)
        if self.multi_token_metric is not None:
            pairs = zip(ahead, self._labels_ahead(batch), strict=True)
            nats = torch.stack([self._label_losses(*each).sum() for each in pairs])
            self.multi_token_metric.update(nats.mean(), count, n_bytes)
        return losses

    def _label_losses(self, x: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of each label, of shape (B, T), from hidden states of shape (B, T, n_embd)."""
        if self._compiles_loss:
            losses: Tensor = _compile(_head_and_token_losses)(self.net, x, labels)
            return losses
        if self.loss_chunk_size is None or labels.numel() <= self.loss_chunk_size:
            return -token_logprobs(self.net.apply_head(x), labels)
        return -chunked_token_logprobs(self.net.apply_head, x, labels, self.loss_chunk_size)

    @override
    def log_metrics(self, split: str) -> None:
        super().log_metrics(split)
        if self.multi_token_metric is not None:
            self.log(f"{split}/multi_token_loss", self.multi_token_metric.compute()["loss"], sync_dist=True)
            self.multi_token_metric.reset()

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
