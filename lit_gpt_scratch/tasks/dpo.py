"""Direct preference optimization (DPO, Rafailov et al. 2023): preference tuning without a reward model."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchmetrics import MetricCollection
from typing_extensions import override

from lit_gpt_scratch.batch_types import PairBatch
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.losses.cross_entropy import sequence_logprobs
from lit_gpt_scratch.losses.dpo_loss import PREFERENCE_LOSSES
from lit_gpt_scratch.losses.metrics import ReplyLoss
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.tasks.pairwise import PairComparison, PairwiseModule, split_pairs
from lit_gpt_scratch.tasks.reference_model import ReferenceModel


class DPO(PairwiseModule):
    """GPT trained to prefer chosen over rejected replies, with a KL penalty relative to the initial model.

    The implicit reward of a reply is ``beta * log(policy / reference)``, the reward for which the policy is optimal.
    The validation and test metrics are those of a reward model, computed from the implicit rewards, plus
    ``reply_loss``, the loss on the chosen replies in nats per token, which shows whether the policy degrades as a
    language model.

    Args:
        loss: Preference loss: ``sigmoid`` (DPO) or ``ipo``; see ``losses.dpo_loss``.
        beta: Strength of the KL penalty; larger values keep the policy closer to the initial model.
        label_smoothing: Assumed probability that a preference label is flipped.
        per_token: Whether to average log-probabilities over the tokens of each reply instead of summing them, so that
            long replies do not have a larger weight. For IPO, its authors recommend the average.
        reference_free: Whether to train without a reference model. The reference is then a policy that assigns the same
            probability to all replies.
        kwargs: Arguments of ``GPTModule``. Dropout is not supported, because the policy and the reference model
            must be identical at the start of training.

    Raises:
        UserError: ``loss`` is unknown, or another argument is out of range.
    """

    allows_dropout = False
    metrics: MetricCollection

    def __init__(
        self,
        loss: str = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        per_token: bool = False,
        reference_free: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if loss not in PREFERENCE_LOSSES:
            raise UserError(f"model.loss is {loss}; it must be one of {', '.join(PREFERENCE_LOSSES)}")
        if not 0.0 < beta < float("inf"):
            raise UserError(f"model.beta is {beta}; it must be positive and finite")
        if not 0.0 <= label_smoothing < 0.5:
            raise UserError(f"model.label_smoothing is {label_smoothing}; it must be at least 0 and below 0.5")
        self.loss = loss
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.per_token = per_token
        self.reference_free = reference_free

    @override
    def build_auxiliary_networks(self) -> Sequence[GPT]:
        if self.reference_free:
            return ()
        self.reference = ReferenceModel(self.net, self.trains_only_adapters)
        return self.reference.networks

    def logprobs(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Return each reply's log-probability in nats and its number of tokens (int64), both of shape (2 B,)."""
        return sequence_logprobs(self.net(batch["input_ids"]), batch["labels"])

    @override
    def compare(self, batch: PairBatch) -> PairComparison:
        return self._compare(batch, *self.logprobs(batch))

    def _compare(self, batch: PairBatch, logprobs: Tensor, tokens: Tensor) -> PairComparison:
        log_ratios = logprobs  # (2 B,), log(policy / reference)
        if not self.reference_free:
            log_ratios = logprobs - self.reference(batch["input_ids"], batch["labels"]).sum(-1)
        if self.per_token:
            log_ratios = log_ratios / tokens.clamp(min=1)
        chosen, rejected = split_pairs(log_ratios, batch["lengths"])
        losses = PREFERENCE_LOSSES[self.loss](chosen - rejected, self.beta, self.label_smoothing)
        return PairComparison(losses, self.beta * chosen.detach(), self.beta * rejected.detach())

    @override
    def build_metrics(self) -> MetricCollection:
        return MetricCollection([super().build_metrics(), ReplyLoss()])

    @override
    def update_metrics(self, batch: PairBatch) -> None:
        logprobs, tokens = self.logprobs(batch)
        pairs = self._compare(batch, logprobs, tokens)
        chosen = slice(len(tokens) // 2)
        self.metrics.update(**pairs._asdict(), nats=-logprobs[chosen].sum(), tokens=tokens[chosen].sum())
