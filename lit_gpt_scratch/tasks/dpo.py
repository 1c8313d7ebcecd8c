"""Direct preference optimisation: a policy that learns from preferences without a reward model."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchmetrics import MetricCollection
from typing_extensions import override

from lit_gpt_scratch.batch_types import PairBatch
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.losses.cross_entropy import sequence_logprobs
from lit_gpt_scratch.losses.metrics import ReplyLoss
from lit_gpt_scratch.losses.preference import PREFERENCE_LOSSES
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.tasks.pairwise import PairComparison, PairwiseModule, split_pairs
from lit_gpt_scratch.tasks.reference_model import ReferenceModel


class DPO(PairwiseModule):
    """A GPT that learns to prefer replies that people prefer, and not to leave its start for anything else.

    Its reward of a reply is ``beta * log(policy / reference)``, the one for which it would be the best policy.
    Validation and test measure these as they do those of a reward model; and ``reply_loss``, the nats a token of the
    preferred replies, which tells whether the model still speaks as it did.

    Args:
        loss: ``sigmoid`` (DPO) or ``ipo``; see ``losses.preference``.
        beta: How dear it is to leave the reference.
        label_smoothing: The probability that a label is the wrong way round.
        per_token: Compare means over the tokens of replies instead of sums, so that long replies do not count for more;
            IPO's authors did.
        reference_free: Do without a reference: what is held to is a policy that finds all replies equally likely.
        kwargs: As for ``GPTModule``, without dropout: at the start policy and reference agree.

    Raises:
        UserError: There is no such loss, or a number is out of its range.
    """

    allows_dropout = False

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
            raise UserError(f"model.beta is {beta}; it must be positive")
        if not 0.0 <= label_smoothing < 0.5:
            raise UserError(f"model.label_smoothing is {label_smoothing}; it must be at least 0 and below 0.5")
        self.loss = loss
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.per_token = per_token
        self.reference_free = reference_free

    metrics: MetricCollection

    @override
    def build_auxiliary_networks(self) -> Sequence[GPT]:
        if self.reference_free:
            return ()
        self.reference = ReferenceModel(self.net, self.trains_only_adapters)
        return self.reference.networks

    @override
    def build_metrics(self) -> MetricCollection:
        return MetricCollection([super().build_metrics(), ReplyLoss()])

    def logprobs(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """What the policy gives the replies of a batch: (2 B,) nats, and how many tokens each has, (2 B,) int64."""
        return sequence_logprobs(self.net(batch["input_ids"]), batch["labels"])

    @override
    def compare(self, batch: PairBatch) -> PairComparison:
        return self._compare(batch, *self.logprobs(batch))

    def _compare(self, batch: PairBatch, nats: Tensor, tokens: Tensor) -> PairComparison:
        ratios = nats  # (2 B,), log(policy / reference)
        if not self.reference_free:
            ratios = nats - self.reference(batch["input_ids"], batch["labels"]).sum(-1)
        if self.per_token:
            ratios = ratios / tokens.clamp(min=1)
        chosen, rejected = split_pairs(ratios, batch["lengths"])
        losses = PREFERENCE_LOSSES[self.loss](chosen - rejected, self.beta, self.label_smoothing)
        return PairComparison(losses, self.beta * chosen.detach(), self.beta * rejected.detach())

    @override
    def update_metrics(self, batch: PairBatch) -> None:
        nats, tokens = self.logprobs(batch)
        chosen = slice(len(tokens) // 2)
        losses, liked, others = self._compare(batch, nats, tokens)
        given = {"losses": losses, "chosen": liked, "rejected": others}
        self.metrics.update(**given, nats=-nats[chosen].sum(), tokens=tokens[chosen].sum())
