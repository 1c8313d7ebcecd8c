"""A policy: a GPT that replies to prompts, and is told how good its replies are."""

import math
import os
from collections.abc import Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.optimizer import Optimizer
from torchmetrics import MetricCollection, MinMetric
from typing_extensions import override

from lit_gpt_scratch.batch_types import IGNORE_INDEX, BatchLayout, PromptIndexBatch, RolloutPhase
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.losses.cross_entropy import token_logprobs
from lit_gpt_scratch.losses.metrics import NamedSums
from lit_gpt_scratch.losses.rl import adapted_kl_coefficient, kl_k1, token_entropy
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.tasks.gpt_module import GPTModule
from lit_gpt_scratch.tasks.reference_model import ReferenceModel
from lit_gpt_scratch.tasks.rl.reward_functions import RewardModelScorer, TextFunctionScorer, is_checkpoint_path
from lit_gpt_scratch.tasks.rl.rollout_generation import PromptData, RolloutGenerator
from lit_gpt_scratch.tasks.rl.rollouts import (
    Rollouts,
    Stopwatch,
    eval_mode,
    merge_ranks,
    reply_seeds,
    rollout_means,
    trim_padding,
)

LEARNED, MEASURED = 0, 1
"""Purposes of a reply's seed. What is measured is drawn alike in every run."""


ROLLOUTS: Final = "rollouts"
"""What a checkpoint calls the rows that are being learned from."""


class OnPolicyModule(GPTModule):
    """A GPT that replies to prompts, what it began with, and what says how good a reply is.

    Validation and test let it reply to each prompt once: the mean ``reward``, the ``kl`` of a whole reply from the
    start, the ``entropy`` of a token, the share of replies that are ``ended``. Their ``loss`` is
    ``kl_coefficient * kl - reward``, with the coefficient that the run was given: what PPO lessens, as long as it keeps
    that coefficient. GRPO weighs the KL of tokens, not of replies; by this figure runs of both compare.

    The data module numbers the rows of the run. When a row of a new phase comes up, the network as it then is writes
    all replies of the phase; they are scored, gathered on every rank and kept, in checkpoints too, while they are
    learned from in several passes. So a step is the trainer's own, and a run that was killed goes on anywhere. A reply
    depends on the weights, its prompt, the run's seed and the row's number: not on which rank writes it.

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
        steps_per_phase: Optimizer steps that it takes to see every reply of a phase once.
        passes: How often each is seen.
        clip: How far from 1 the ratio of probabilities is rewarded.
        kl_target: Nats of KL of a whole reply that the coefficient is adapted to reach, from phase to phase, beginning
            with ``kl_coefficient``; by default it stays as it is.
        entropy_coefficient: What a nat of entropy of a token is worth.
        kwargs: As for ``GPTModule``, without dropout: before an update the policy is the one that wrote the replies.

    Raises:
        UserError: A number is out of its range.
    """

    allows_dropout = False
    metrics: MetricCollection
    group = 1
    """Replies to a prompt."""

    def __init__(
        self,
        reward: str | None = None,
        unended_score: float | None = None,
        kl_coefficient: float = 0.05,
        temperature: float = 1.0,
        rows_at_once: int = 256,
        steps_per_phase: int = 4,
        passes: int = 2,
        clip: float = 0.2,
        kl_target: float | None = None,
        entropy_coefficient: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require_at_least(1, rows_at_once=rows_at_once)
        require_at_least(0, kl_coefficient=kl_coefficient)
        require_positive(temperature=temperature)
        if unended_score is not None and not math.isfinite(unended_score):
            raise UserError(f"model.unended_score is {unended_score}; it must be finite")
        self.reward = reward
        self.unended_score = unended_score
        self.unended_is_least = unended_score is None and is_checkpoint_path(reward)
        self.kl_coefficient = kl_coefficient
        self.temperature = temperature
        self.rows_at_once = rows_at_once
        require_at_least(1, steps_per_phase=steps_per_phase, passes=passes)
        require_at_least(0, entropy_coefficient=entropy_coefficient)
        require_positive(clip=clip, kl_target=kl_target)
        if kl_target is not None and self.kl_coefficient == 0:
            raise UserError(
                f"model.kl_target is {kl_target}, but model.kl_coefficient is 0, and whatever is multiplied by that "
                "stays 0; give it a value to begin with"
            )
        self.phase = RolloutPhase(steps_per_phase, passes)
        self.clip = clip
        self.kl_target = kl_target
        self.entropy_coefficient = entropy_coefficient
        self.generation_stopwatch = Stopwatch()
        self._rollouts: Rollouts | None = None
        self._noted: dict[str, Tensor] = {}

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
        if stage == "fit":
            self._rollouts = None
            self._noted.clear()
            self.generation_stopwatch = Stopwatch()
        if hasattr(self, "writer"):
            self.writer.data = data = self.prompted
            if not is_checkpoint_path(self.reward):
                data.scoring(self.reward)  # which lets it know what rewards

    @override
    def build_auxiliary_networks(self) -> Sequence[GPT]:
        """The start, and what says how good a reply is."""
        if self.device_mesh is not None:
            raise UserError(f"{type(self).__name__} writes on each process by itself; --trainer.strategy ddp does, too")
        self.reference = ReferenceModel(self.net, self.trains_only_adapters)
        data, unended = self.prompted, self.unended_score
        score: RewardModelScorer | TextFunctionScorer
        if is_checkpoint_path(self.reward):
            given = data.tokenizer_json, data.block_size, self.rows_at_once, self.gpt.attention
            score = RewardModelScorer(str(self.reward), *given)
            score.net.to(self.trainer.strategy.root_device)
        else:
            scoring = data.scoring(self.reward)
            score = TextFunctionScorer(scoring)
            unended = scoring.unended if unended is None else unended
        self.writer = RolloutGenerator(self.net, data, score, unended, self.temperature, self.rows_at_once)
        return ()

    @override
    def build_metrics(self) -> MetricCollection:
        sums = NamedSums(("reward", "of_ended", "kl", "ended", "entropy", "tokens", "replies"))
        return MetricCollection({"sums": sums, "least": MinMetric()})

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of each label, logits, and the stream: (B, T), (B, T, vocab_size), (B, T, n_embd)."""
        stream = self.net.hidden_states(input_ids)
        logits = self.net.apply_head(stream) / self.temperature
        return token_logprobs(logits, labels), logits, stream

    def reference_logprobs(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Log-probability of each label, as the start has it: (B, T)."""
        with self.reference.network() as start:
            return token_logprobs(start(input_ids) / self.temperature, labels)

    @override
    def update_metrics(self, batch: PromptIndexBatch) -> None:
        side = "test" if self.trainer.testing else "validation"
        there = self.prompted.prompt_count(side)
        numbers = [number for number in batch["numbers"].tolist() if number < there]  # others fill the batch up
        if not numbers:
            return
        rows = trim_padding(self.writer.replies(side, numbers, reply_seeds(0, MEASURED, numbers=numbers)))
        logprobs, logits, _ = self(rows["input_ids"], rows["labels"])
        within = rows["labels"] != IGNORE_INDEX
        sums = {
            "reward": rows["scores"].sum(),
            "of_ended": (rows["scores"] * rows["ended"]).sum(),
            "kl": kl_k1(logprobs, self.reference_logprobs(rows["input_ids"], rows["labels"]))[within].sum(),
            "ended": rows["ended"].sum(),
            "entropy": token_entropy(logits)[within].sum(),
            "tokens": within.sum(),
            "replies": within.any(1).sum(),
        }
        self.metrics["sums"].update(sums)
        self.metrics["least"].update(rows["scores"])

    @override
    def compute_metrics(self) -> dict[str, Tensor]:
        sums = self.metrics.compute()
        tokens, replies = sums.pop("tokens"), sums.pop("replies")
        least, of_ended = sums.pop("least"), sums.pop("of_ended")
        if self.unended_is_least:
            sums["reward"] = of_ended + least * (replies - sums["ended"])
        entropy = sums.pop("entropy") / tokens
        each = {name: value / replies for name, value in sums.items()}
        return {"loss": self.kl_coefficient * each["kl"] - each["reward"], **each, "entropy": entropy}

    def advantages(self, rollouts: Rollouts) -> dict[str, Tensor]:
        """How much better each token was than expected, as ``advantages``, and whatever else is learned: (N, T)."""
        raise NotImplementedError

    @override
    def split_batch(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        return []  # the data module has prompts, and not what was replied

    @override
    def positions(self, batch: dict[str, Tensor]) -> int:
        return len(batch["labels"]) * self.data.block_size  # each micro-batch is as wide as its longest row

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Give the rows of a training batch what is known of them; at the first of a phase, write them."""
        if not self.trainer.training:
            return batch
        numbers, rows = batch["numbers"], self.phase.steps * self._layout.rows_per_step
        phase = int(numbers[0]) // rows
        kept = self._rollouts
        if kept is None or kept.phase != phase or len(kept.rows["labels"]) != rows:
            with self.generation_stopwatch.running(), torch.no_grad(), self.trainer.precision_plugin.forward_context():
                self._rollouts = kept = self._roll_out(phase, rows)
        return kept.take(numbers % rows)

    @property
    def _layout(self) -> BatchLayout:
        assert self.layout is not None  # the data's, which has been asked for prompts
        return self.layout

    def _roll_out(self, phase: int, n: int) -> Rollouts:
        if n % self.group:
            raise UserError(
                f"model.group is {self.group}, but a phase has {n} replies, which is no multiple of it (batch_size x "
                "ranks x micro-batches x steps_per_phase)"
            )
        numbers = [phase * n + place for place in self.prompted.rank_rows]
        asked = self.prompted.drawn([number // self.group for number in numbers])
        with eval_mode(self.net):
            rows = self.writer.replies("train", asked, reply_seeds(_run_seed(), LEARNED, numbers=numbers))
            # In the micro-batches of the first pass: the same numbers come out, uncompiled to the last bit.
            parts = [
                self.known({name: values[first : first + self._layout.batch_size] for name, values in rows.items()})
                for first in range(0, len(numbers), self._layout.batch_size)
            ]
        rows |= {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if self.trainer.world_size > 1:
            gather = self.trainer.strategy.all_gather
            rows = {name: merge_ranks(own, gather(own), self._layout.batch_size) for name, own in rows.items()}
        if self.unended_is_least:
            rows["scores"] = torch.where(rows["ended"] > 0, rows["scores"], rows["scores"].min())
        found = Rollouts(phase, self._coefficient(), rollout_means(rows), rows)
        rows |= self.advantages(found)
        return found

    def _coefficient(self) -> float:
        before = self._rollouts
        if self.kl_target is None or before is None:
            return self.kl_coefficient
        return adapted_kl_coefficient(before.coefficient, before.figures["kl"], self.kl_target)

    def known(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the policy and its start say of replies, in rows of their full width: (B, T) by name."""
        narrow = trim_padding(rows)
        ids, labels = narrow["input_ids"], narrow["labels"]
        logprobs, _, stream = self(ids, labels)
        found = {"logprobs": logprobs, "reference": self.reference_logprobs(ids, labels)} | self.values(stream)
        return {name: F.pad(each, (0, rows["labels"].size(1) - each.size(1))) for name, each in found.items()}

    def values(self, stream: Tensor) -> dict[str, Tensor]:
        """What is expected to come, if that is learned: ``values``, (B, T)."""
        return {}

    def note(self, labels: Tensor, logits: Tensor, **sums: Tensor) -> None:
        """Add what is to be logged of a step, at log points alone: sums over tokens. Looking is no step."""
        if not (self.is_log_step and torch.is_grad_enabled()):
            return
        with torch.no_grad():
            within = labels != IGNORE_INDEX
            sums |= {"tokens": within.sum(), "entropy": token_entropy(logits)[within].sum()}
        for name, more in sums.items():
            self._noted[name] = self._noted.get(name, torch.zeros((), device=self.device)) + more.detach()

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        if self.is_log_step and self._rollouts is not None:
            noted = self.trainer.strategy.reduce(torch.stack(list(self._noted.values())), reduce_op="sum")
            found = dict(zip(self._noted, noted, strict=True))
            tokens = found.pop("tokens")
            each = {name: value / tokens for name, value in found.items()}
            each |= {"kl_coefficient": self._rollouts.coefficient, **self._rollouts.figures}
            self.log_dict({f"train/{name}": value for name, value in each.items()})
        self._noted.clear()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._rollouts is not None:
            checkpoint[ROLLOUTS] = self._rollouts.state()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.trainer.state.fn == "fit" and ROLLOUTS in checkpoint:
            self._rollouts = Rollouts.of(checkpoint[ROLLOUTS], self.trainer.strategy.root_device)


def require_at_least(least: float, **given: float) -> None:
    """Refuse what is below, or infinite; the command line knows types alone.

    Raises:
        UserError: One is.
    """
    for name, value in given.items():
        if not least <= value < math.inf:
            raise UserError(f"model.{name} is {value}; it must be {least} or more, and finite")


def require_positive(**given: float | None) -> None:
    """Refuse 0 and less, and what is infinite.

    Raises:
        UserError: One is.
    """
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"model.{name} is {value}; it must be positive and finite")


def _run_seed() -> int:
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
