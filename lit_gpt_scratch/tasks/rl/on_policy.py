"""Base class of on-policy reinforcement learning: generate replies, score them, and train on them for a few passes."""

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.optimizer import Optimizer
from torchmetrics import MetricCollection, MinMetric
from typing_extensions import override

from lit_gpt_scratch.batch_types import IGNORE_INDEX, DataSplit, PromptIndexBatch, PromptSource, RolloutPhase
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.lightning_compat import global_seed
from lit_gpt_scratch.losses.cross_entropy import token_logprobs
from lit_gpt_scratch.losses.metrics import NamedSums
from lit_gpt_scratch.losses.rl import adapted_kl_coefficient, kl_k1, token_entropy
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.tasks.gpt_module import GPTModule
from lit_gpt_scratch.tasks.reference_model import ReferenceModel
from lit_gpt_scratch.tasks.rl.reward_functions import (
    RewardFunction,
    RewardModelScorer,
    TextFunctionScorer,
    is_checkpoint_path,
)
from lit_gpt_scratch.tasks.rl.rollout_generation import RolloutGenerator
from lit_gpt_scratch.tasks.rl.rollouts import (
    Rollouts,
    Stopwatch,
    eval_mode,
    merge_ranks,
    rank_rows,
    reply_seeds,
    rollout_means,
    trim_padding,
)

TRAIN_REPLIES, EVALUATION_REPLIES = 0, 1
"""Stream ids that are part of the seed of each reply, so that training and evaluation use different random numbers.

The seeds of evaluation replies are the same in every run.
"""
ROLLOUTS_KEY: Final = "rollouts"
"""Checkpoint key of the rollouts in the current rollout phase."""


class OnPolicyModule(GPTModule):
    """GPT policy that alternates between generating replies and training on them for a few passes.

    Training is divided into rollout phases. At the start of each phase, the current network generates all rollouts
    (replies to prompts) of the phase. They are scored, gathered on every rank and kept (also in checkpoints) while
    training makes several passes over them. Training batches contain only the indices of rollouts, which are numbered
    consecutively over the whole run. The optimizer steps are therefore ordinary steps of the trainer, and a run can be
    resumed at any step. A reply depends on the weights, its prompt, the seed of the run and the index of the rollout,
    but not on the rank that generates it.

    Validation and testing generate one reply to each prompt. The metrics are the mean ``reward``, the mean ``kl``
    (KL divergence of a whole reply from the initial policy), the mean ``entropy`` per token, the fraction of replies
    that ``ended``, and the ``loss``, which is ``kl_coefficient * kl - reward`` with the configured coefficient. If the
    coefficient is constant, this loss is the negative of PPO's objective. GRPO penalizes the KL per token instead of
    per reply; it is evaluated with the same loss, so that its runs can be compared with those of PPO.

    Args:
        reward: Reward for generated replies: the run folder or checkpoint of a reward model; the import path of a
            function that takes prompts and replies, such as ``my_file.my_reward``; or the name of a verifiable
            reward (a rule that a program can check, see ``text.verifiable_rewards``). By default, the data module
            defines the reward.
        unended_score: Score of truncated replies, which have no end-of-text token. The default depends on the reward:
            reward functions score truncated replies like other replies; verifiable rewards give them 0; a reward model,
            which can only score complete replies, gives them the minimum score of the complete replies in the same
            rollout phase or evaluation, so that the policy does not benefit from replies that never end.
        kl_coefficient: Coefficient of the KL penalty, which PPO and GRPO define differently; 0 disables the penalty.
        temperature: Sampling temperature for replies, also used for their log-probabilities.
        rows_at_once: Number of replies to generate in one batch.
        steps_per_phase: Number of optimizer steps per pass over the replies of a rollout phase.
        passes: Number of training passes over the replies of a rollout phase.
        clip: Clipping range; the probability ratio is clipped to ``[1 - clip, 1 + clip]``.
        kl_target: Target for the KL divergence of the policy from the initial policy, summed over the tokens of a
            reply, in nats. If set, the KL coefficient is adapted after each rollout phase to approach the target,
            starting from ``kl_coefficient``. By default, the coefficient is constant.
        entropy_coefficient: Weight of the entropy bonus in the loss; 0 disables the bonus.
        kwargs: Arguments of ``GPTModule``. Dropout is not supported, because before the first update the policy must be
            identical to the policy that generated the replies.

    Raises:
        UserError: An argument is out of range.
    """

    allows_dropout = False
    metrics: MetricCollection
    group = 1
    """Number of replies per prompt."""

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
        require_at_least(1, rows_at_once=rows_at_once, steps_per_phase=steps_per_phase, passes=passes)
        require_at_least(0, kl_coefficient=kl_coefficient, entropy_coefficient=entropy_coefficient)
        require_positive(temperature=temperature, clip=clip, kl_target=kl_target)
        if unended_score is not None and not math.isfinite(unended_score):
            raise UserError(f"model.unended_score is {unended_score}; it must be finite")
        if kl_target is not None and kl_coefficient == 0:
            raise UserError(
                f"model.kl_target is {kl_target}, but model.kl_coefficient is 0 and would stay 0, because the adaptive "
                "update is multiplicative; set model.kl_coefficient to a positive initial value"
            )
        self.reward = reward
        self.unended_score = unended_score
        self.unended_gets_minimum = unended_score is None and is_checkpoint_path(reward)
        self.kl_coefficient = kl_coefficient
        self.temperature = temperature
        self.rows_at_once = rows_at_once
        self.phase = RolloutPhase(steps_per_phase, passes)
        self.clip = clip
        self.kl_target = kl_target
        self.entropy_coefficient = entropy_coefficient
        self.generator: RolloutGenerator | None = None
        self._generation_stopwatch = Stopwatch()
        """Stopwatch for the time spent generating rollouts."""
        self.rollouts: Rollouts | None = None
        """Rollouts of the current rollout phase, or None before the first phase."""
        self._log_sums: dict[str, Tensor] = {}

    # Methods for subclasses to override.

    def compute_advantages(self, rollouts: Rollouts) -> dict[str, Tensor]:
        """Return a dict with ``advantages`` and any other tensors required by the loss.

        The advantages have shape (N,) if computed per reply, or (N, T) if computed per token.
        """
        raise NotImplementedError

    def compute_values(self, hidden: Tensor) -> dict[str, Tensor]:
        """Compute the critic's values from hidden states of shape (B, T, n_embd).

        Returns:
            A dict that contains ``values``, a tensor of shape (B, T); empty if there is no critic.
        """
        return {}

    def count_labels(self, labels: Tensor) -> Tensor:
        """Return the divisor of the summed loss as a scalar; by default, the number of reply tokens in ``labels``."""
        return (labels != IGNORE_INDEX).sum()

    # Setup.

    @override
    def setup(self, stage: str) -> None:
        """Prepare the data module and the reward function, and discard the rollouts of an earlier run.

        The data module receives the length of a rollout phase. The rollouts in a checkpoint are loaded later, in
        ``on_load_checkpoint``.
        """
        super().setup(stage)
        self.prompts.phase = self.phase
        if not is_checkpoint_path(self.reward):
            self.prompts.text_reward(self.reward)  # the data module then checks replies with the same rule
        if self.generator is not None:
            self.generator.data = self.data_info
        if stage == "fit":
            self.rollouts = None
            self._log_sums.clear()
            self._generation_stopwatch = Stopwatch()

    def take_generation_seconds(self) -> float:
        """Return the time in seconds spent generating and scoring rollouts since the last call."""
        return self._generation_stopwatch.take()

    @property
    def prompts(self) -> PromptSource:
        """Prompts from the data module, to which the policy replies.

        Raises:
            UserError: The data has no prompts.
        """
        if self.data_info.prompts is None:
            raise UserError(
                f"data: {self.data_info.name} has no prompts; {type(self).__name__} requires --data Prompts"
            )
        return self.data_info.prompts

    @override
    def build_auxiliary_networks(self) -> Sequence[GPT]:
        """Build the reference model and the reward model or function."""
        if self.device_mesh is not None:  # each process generates independently, with a different number of tokens
            raise UserError(f"{type(self).__name__} supports only DDP; set --trainer.strategy ddp")
        self.reference = ReferenceModel(self.net, self.trains_only_adapters)
        unended_score, score = self.unended_score, self._build_reward_model()
        if score is None:
            name, function, default = self.prompts.text_reward(self.reward)
            score, unended_score = (
                TextFunctionScorer(name, function),
                default if unended_score is None else unended_score,
            )
        self.generator = RolloutGenerator(
            self.net, self.data_info, score, unended_score, self.temperature, self.rows_at_once
        )
        return ()

    def _build_reward_model(self) -> RewardFunction | None:
        if not is_checkpoint_path(self.reward):
            return None
        data = self.data_info
        scorer = RewardModelScorer(
            str(self.reward), data.tokenizer_json, data.block_size, self.rows_at_once, self.trusted
        )
        scorer.net.to(self.trainer.strategy.root_device)
        return scorer

    # Forward passes.

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the policy on a batch.

        Returns:
            The log-probabilities of the labels, of shape (B, T); the logits, of shape (B, T, vocab_size); and the
            hidden states, of shape (B, T, n_embd).
        """
        hidden = self.net.hidden_states(input_ids)
        logits = self.net.apply_head(hidden) / self.temperature
        return token_logprobs(logits, labels), logits, hidden

    def reference_logprobs(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the log-probabilities of the labels under the initial policy, a tensor of shape (B, T)."""
        with self.reference.network() as net:
            return token_logprobs(net(input_ids) / self.temperature, labels)

    # Rollouts.

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Replace the indices in a training batch with rollouts; generate them at the start of each rollout phase."""
        if not self.trainer.training:
            return batch
        n = self.phase.steps * self.data_info.layout.rows_per_step
        phase = int(batch["indices"][0]) // n
        if self.rollouts is None or self.rollouts.phase != phase or len(self.rollouts.rows["labels"]) != n:
            with self._generation_stopwatch.running(), torch.no_grad(), self.trainer.precision_plugin.forward_context():
                self.rollouts = self._generate_phase(phase, n)
        rows = self.rollouts.take(batch["indices"] % n)
        if "step_indices" in batch:
            rows["step_labels"] = self.count_labels(self.rollouts.rows["labels"][batch["step_indices"] % n])
        return rows

    def _generate_phase(self, phase: int, n: int) -> Rollouts:
        if n % self.group:
            raise UserError(
                f"model.group is {self.group}, but a rollout phase has {n} replies (batch_size x ranks x micro-batches "
                "x steps_per_phase), which is not a multiple of model.group; change one of these settings"
            )
        assert self.generator is not None
        layout = self.data_info.layout
        indices = [phase * n + row for row in rank_rows(layout, self.data_info.rank, n)]
        prompts = self.prompts.shuffled([index // self.group for index in indices])
        with eval_mode(self.net):
            seeds = reply_seeds(global_seed(), TRAIN_REPLIES, numbers=indices)
            rows = self.generator.generate("train", prompts, seeds)
            # The rollouts are evaluated in the same micro-batches as in the first pass, so that training computes the
            # same log-probabilities bit for bit (without compilation).
            parts = [
                self._evaluate_rollouts({name: values[i : i + layout.batch_size] for name, values in rows.items()})
                for i in range(0, len(indices), layout.batch_size)
            ]
        rows |= {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if self.trainer.world_size > 1:
            gather = self.trainer.strategy.all_gather
            rows = {name: merge_ranks(own, gather(own), layout.batch_size) for name, own in rows.items()}
        if self.unended_gets_minimum:
            rows["scores"] = torch.where(rows["ended"] > 0, rows["scores"], rows["scores"].min())
        rollouts = Rollouts(phase, self._adapt_kl_coefficient(), rollout_means(rows), rows)
        rows |= self.compute_advantages(rollouts)
        return rollouts

    def _evaluate_rollouts(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the log-probabilities and values of rollouts before training, as (B, T) tensors keyed by name."""
        trimmed = trim_padding(rows)
        ids, labels = trimmed["input_ids"], trimmed["labels"]
        logprobs, _, hidden = self(ids, labels)
        values = {"logprobs": logprobs, "reference": self.reference_logprobs(ids, labels)}
        values |= self.compute_values(hidden)
        return {name: F.pad(each, (0, rows["labels"].size(1) - each.size(1))) for name, each in values.items()}

    def _adapt_kl_coefficient(self) -> float:
        before = self.rollouts
        if self.kl_target is None or before is None:
            return self.kl_coefficient
        return adapted_kl_coefficient(before.coefficient, before.means["kl"], self.kl_target)

    # Logging.

    def accumulate_logs(self, labels: Tensor, logits: Tensor, **sums: Tensor) -> None:
        """Accumulate sums over tokens for logging; do nothing unless the step is logged and gradients are enabled."""
        if not (self.is_log_step and torch.is_grad_enabled()):
            return
        with torch.no_grad():
            mask = labels != IGNORE_INDEX
            sums |= {"tokens": mask.sum(), "entropy": token_entropy(logits)[mask].sum()}
        for name, value in sums.items():
            self._log_sums[name] = self._log_sums.get(name, torch.zeros((), device=self.device)) + value.detach()

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        if self.is_log_step and self.rollouts is not None:
            totals = self.trainer.strategy.reduce(torch.stack(list(self._log_sums.values())), reduce_op="sum")
            sums = dict(zip(self._log_sums, totals, strict=True))
            tokens = sums.pop("tokens")
            values: dict[str, Any] = {name: value / tokens for name, value in sums.items()}
            values |= {"kl_coefficient": self.rollouts.coefficient, **self.rollouts.means}
            self.log_dict({f"train/{name}": value for name, value in values.items()})
        self._log_sums.clear()

    # Validation and test.

    @override
    def build_metrics(self) -> MetricCollection:
        sums = NamedSums(("reward", "of_ended", "kl", "ended", "entropy", "tokens", "replies"))
        return MetricCollection({"sums": sums, "least": MinMetric()})

    @override
    def update_metrics(self, batch: PromptIndexBatch) -> None:
        split: DataSplit = "test" if self.trainer.testing else "validation"
        n = self.prompts.counts[split]
        indices = [index for index in batch["indices"].tolist() if index < n]  # other indices are padding rows
        if not indices:
            return
        assert self.generator is not None
        seeds = reply_seeds(0, EVALUATION_REPLIES, numbers=indices)
        rows = trim_padding(self.generator.generate(split, indices, seeds))
        logprobs, logits, _ = self(rows["input_ids"], rows["labels"])
        mask = rows["labels"] != IGNORE_INDEX
        sums = {
            "reward": rows["scores"].sum(),
            "of_ended": (rows["scores"] * rows["ended"]).sum(),
            "kl": kl_k1(logprobs, self.reference_logprobs(rows["input_ids"], rows["labels"]))[mask].sum(),
            "ended": rows["ended"].sum(),
            "entropy": token_entropy(logits)[mask].sum(),
            "tokens": mask.sum(),
            "replies": mask.any(1).sum(),
        }
        self.metrics["sums"].update(sums)
        self.metrics["least"].update(rows["scores"])

    @override
    def compute_metrics(self) -> dict[str, Tensor]:
        sums = self.metrics.compute()
        tokens, replies = sums.pop("tokens"), sums.pop("replies")
        minimum, of_ended = sums.pop("least"), sums.pop("of_ended")
        if self.unended_gets_minimum:
            sums["reward"] = of_ended + minimum * (replies - sums["ended"])
        entropy = sums.pop("entropy") / tokens
        means = {name: value / replies for name, value in sums.items()}
        return {"loss": self.kl_coefficient * means["kl"] - means["reward"], **means, "entropy": entropy}

    # Checkpoints and callbacks.

    @override
    def split_batch(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        return []  # the rows are rollouts, which do not come from the data module

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.rollouts is not None:
            checkpoint[ROLLOUTS_KEY] = self.rollouts.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.trainer.state.fn == "fit" and ROLLOUTS_KEY in checkpoint:
            self.rollouts = Rollouts.from_state_dict(checkpoint[ROLLOUTS_KEY], self.trainer.strategy.root_device)


def require_at_least(minimum: float, **given: float) -> None:
    """Check that model flags are finite and at least ``minimum``.

    Raises:
        UserError: A value is less than the minimum, or not finite.
    """
    for name, value in given.items():
        if not minimum <= value < math.inf:
            bound = "finite" if value == math.inf else f"{minimum} or more"
            raise UserError(f"model.{name} is {value}; it must be {bound}")


def require_positive(**given: float | None) -> None:
    """Check that each model flag is either None or both positive and finite.

    Raises:
        UserError: A value is 0 or less, or not finite.
    """
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"model.{name} is {value}; it must be positive and finite")
