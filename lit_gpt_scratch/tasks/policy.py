"""A policy: a GPT that replies to prompts, and is told how good its replies are."""

import math
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor
from torchmetrics import MetricCollection, MinMetric
from typing_extensions import override

from lit_gpt_scratch.batch import IGNORED, NumberedBatch
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.objectives.likelihood import token_logprobs
from lit_gpt_scratch.objectives.metrics import Sums
from lit_gpt_scratch.objectives.policy import kl_k1, token_entropy
from lit_gpt_scratch.tasks.gpt_task import GPTTask
from lit_gpt_scratch.tasks.reference import Reference
from lit_gpt_scratch.tasks.rollouts import seeds, trimmed
from lit_gpt_scratch.tasks.scoring import FunctionScore, ModelScore, is_run
from lit_gpt_scratch.tasks.writing import PromptData, Writer

LEARNED, MEASURED = 0, 1
"""Purposes of a reply's seed. What is measured is drawn alike in every run."""


class Policy(GPTTask):
    """A GPT that replies to prompts, what it began with, and what says how good a reply is.

    Validation and test let it reply to each prompt once: the mean ``reward``, the ``kl`` of a whole reply from the
    start, the ``entropy`` of a token, the share of replies that are ``ended``. Their ``loss`` is
    ``kl_coefficient * kl - reward``, with the coefficient that the run was given: what PPO lessens, as long as it keeps
    that coefficient. GRPO weighs the KL of tokens, not of replies; by this figure runs of both compare.

    Args:
        reward: What says how good a reply is: the run of a reward model, a function of prompts and replies such as
            ``my_file.my_reward``, or the name of a preference that can be checked; by default that of the data.
        unended_score: The score of a reply that does not come to its end. By default a function is asked as of any
            other, and a checkable preference gives it 0. A reward model reads where a reply ends, and knows nothing of
            one that does not: it counts as the least that the model gives any reply of the phase, or of all that are
            measured, so that nothing is won by going on.
        kl_coefficient: What the KL from the start costs; PPO and GRPO say which KL that is.
        temperature: At which replies are written and their tokens' probabilities are taken.
        rows_at_once: Replies that are written side by side.
        kwargs: As for ``GPTTask``, without dropout: before an update the policy is the one that wrote the replies.

    Raises:
        UserError: A number is out of its range.
    """

    drops = False
    metrics: MetricCollection

    def __init__(
        self,
        reward: str | None = None,
        unended_score: float | None = None,
        kl_coefficient: float = 0.05,
        temperature: float = 1.0,
        rows_at_once: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        refuse_out_of_range(1, rows_at_once=rows_at_once)
        refuse_out_of_range(0, kl_coefficient=kl_coefficient)
        refuse_not_positive(temperature=temperature)
        if unended_score is not None and not math.isfinite(unended_score):
            raise UserError(f"model.unended_score is {unended_score}; it must be finite")
        self.reward = reward
        self.unended_score = unended_score
        self.unended_is_least = unended_score is None and is_run(reward)
        self.kl_coefficient = kl_coefficient
        self.temperature = temperature
        self.rows_at_once = rows_at_once

    @property
    def prompted(self) -> PromptData:
        """The data module, as one of prompts.

        Raises:
            UserError: It is none.
        """
        if not hasattr(self.data, "drawn"):
            raise UserError(f"data: {type(self.data).__name__} has no prompts; {type(self).__name__} needs Prompts")
        return cast(PromptData, self.data)

    @override
    def setup(self, stage: str) -> None:
        """Write to the prompts of this run, be the network that of an earlier one."""
        super().setup(stage)
        if hasattr(self, "writer"):
            self.writer.data = data = self.prompted
            if not is_run(self.reward):
                data.scoring(self.reward)  # which lets it know what rewards

    @override
    def build_beside(self) -> Sequence[GPT]:
        """The start, and what says how good a reply is."""
        if self.device_mesh is not None:
            raise UserError(f"{type(self).__name__} writes on each process by itself; --trainer.strategy ddp does, too")
        self.reference = Reference(self.net, self.only_adapters)
        data, unended = self.prompted, self.unended_score
        score: ModelScore | FunctionScore
        if is_run(self.reward):
            given = data.tokenizer_json, data.block_size, self.rows_at_once, self.gpt.attention
            score = ModelScore(str(self.reward), *given)
            score.net.to(self.trainer.strategy.root_device)
        else:
            scoring = data.scoring(self.reward)
            score = FunctionScore(scoring)
            unended = scoring.unended if unended is None else unended
        self.writer = Writer(self.net, data, score, unended, self.temperature, self.rows_at_once)
        return ()

    @override
    def build_metrics(self) -> MetricCollection:
        sums = Sums(("reward", "of_ended", "kl", "ended", "entropy", "tokens", "replies"))
        return MetricCollection({"sums": sums, "least": MinMetric()})

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of each label, logits, and the stream: (B, T), (B, T, vocab_size), (B, T, n_embd)."""
        stream = self.net.hidden(input_ids)
        logits = self.net.read(stream) / self.temperature
        return token_logprobs(logits, labels), logits, stream

    def of_start(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Log-probability of each label, as the start has it: (B, T)."""
        with self.reference.network() as start:
            return token_logprobs(start(input_ids) / self.temperature, labels)

    @override
    def measure(self, batch: NumberedBatch) -> None:
        side = "test" if self.trainer.testing else "validation"
        there = self.prompted.n_prompts(side)
        numbers = [number for number in batch["numbers"].tolist() if number < there]  # others fill the batch up
        if not numbers:
            return
        rows = trimmed(self.writer.replies(side, numbers, seeds(0, MEASURED, numbers=numbers)))
        logprobs, logits, _ = self(rows["input_ids"], rows["labels"])
        within = rows["labels"] != IGNORED
        sums = {
            "reward": rows["scores"].sum(),
            "of_ended": (rows["scores"] * rows["ended"]).sum(),
            "kl": kl_k1(logprobs, self.of_start(rows["input_ids"], rows["labels"]))[within].sum(),
            "ended": rows["ended"].sum(),
            "entropy": token_entropy(logits)[within].sum(),
            "tokens": within.sum(),
            "replies": within.any(1).sum(),
        }
        self.metrics["sums"].update(sums)
        self.metrics["least"].update(rows["scores"])

    @override
    def figures(self) -> dict[str, Tensor]:
        sums = self.metrics.compute()
        tokens, replies = sums.pop("tokens"), sums.pop("replies")
        least, of_ended = sums.pop("least"), sums.pop("of_ended")
        if self.unended_is_least:
            sums["reward"] = of_ended + least * (replies - sums["ended"])
        entropy = sums.pop("entropy") / tokens
        each = {name: value / replies for name, value in sums.items()}
        return {"loss": self.kl_coefficient * each["kl"] - each["reward"], **each, "entropy": entropy}


def refuse_out_of_range(least: float, **given: float) -> None:
    """Refuse what is below, or infinite; the command line knows types alone.

    Raises:
        UserError: One is.
    """
    for name, value in given.items():
        if not least <= value < math.inf:
            raise UserError(f"model.{name} is {value}; it must be {least} or more, and finite")


def refuse_not_positive(**given: float | None) -> None:
    """Refuse 0 and less, and what is infinite.

    Raises:
        UserError: One is.
    """
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"model.{name} is {value}; it must be positive and finite")
