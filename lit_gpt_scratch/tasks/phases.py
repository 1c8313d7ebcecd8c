"""Learning from one's own replies: what PPO and GRPO have in common, which is all but how good a token was."""

import os
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.optimizer import Optimizer
from typing_extensions import override

from lit_gpt_scratch.batch import IGNORED, Layout, Phase
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.objectives.policy import adapted_coefficient, token_entropy
from lit_gpt_scratch.tasks.policy import LEARNED, Policy, refuse_not_positive, refuse_out_of_range
from lit_gpt_scratch.tasks.rollouts import Rollouts, Stopwatch, evaluating, gathered, means, seeds, trimmed

ROLLOUTS: Final = "rollouts"
"""What a checkpoint calls the rows that are being learned from."""


class PhasedPolicy(Policy):
    """A policy that writes many replies, learns from them in a few passes, and writes the next ones.

    The data module numbers the rows of the run. When a row of a new phase comes up, the network as it then is writes
    all replies of the phase; they are scored, gathered on every rank and kept, in checkpoints too, while they are
    learned from in several passes. So a step is the trainer's own, and a run that was killed goes on anywhere. A reply
    depends on the weights, its prompt, the run's seed and the row's number: not on which rank writes it.

    Args:
        steps_per_phase: Optimizer steps that it takes to see every reply of a phase once.
        passes: How often each is seen.
        clip: How far from 1 the ratio of probabilities is rewarded.
        kl_target: Nats of KL of a whole reply that the coefficient is adapted to reach, from phase to phase, beginning
            with ``kl_coefficient``; by default it stays as it is.
        entropy_coefficient: What a nat of entropy of a token is worth.
        kwargs: As for ``Policy``.

    Raises:
        UserError: A number is out of its range.
    """

    group = 1
    """Replies to a prompt."""

    def __init__(
        self,
        steps_per_phase: int = 4,
        passes: int = 2,
        clip: float = 0.2,
        kl_target: float | None = None,
        entropy_coefficient: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        refuse_out_of_range(1, steps_per_phase=steps_per_phase, passes=passes)
        refuse_out_of_range(0, entropy_coefficient=entropy_coefficient)
        refuse_not_positive(clip=clip, kl_target=kl_target)
        if kl_target is not None and self.kl_coefficient == 0:
            raise UserError(
                f"model.kl_target is {kl_target}, but model.kl_coefficient is 0, and whatever is multiplied by that "
                "stays 0; give it a value to begin with"
            )
        self.phase = Phase(steps_per_phase, passes)
        self.clip = clip
        self.kl_target = kl_target
        self.entropy_coefficient = entropy_coefficient
        self.writing = Stopwatch()
        self._rollouts: Rollouts | None = None
        self._noted: dict[str, Tensor] = {}

    @override
    def setup(self, stage: str) -> None:
        """Begin a run with no replies of an earlier one; those of a checkpoint are loaded after this."""
        super().setup(stage)
        if stage == "fit":
            self._rollouts = None
            self._noted.clear()
            self.writing = Stopwatch()

    def advantages(self, rollouts: Rollouts) -> dict[str, Tensor]:
        """How much better each token was than expected, as ``advantages``, and whatever else is learned: (N, T)."""
        raise NotImplementedError

    @override
    def apart(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        return []  # the data module has prompts, and not what was replied

    @override
    def positions(self, batch: dict[str, Tensor]) -> int:
        return len(batch["labels"]) * self.data.block_size  # each micro-batch is as wide as its longest row

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Give the rows of a training batch what is known of them; at the first of a phase, write them."""
        if not self.trainer.training:
            return batch
        numbers, rows = batch["numbers"], self.phase.steps * self._layout.windows_per_step
        phase = int(numbers[0]) // rows
        kept = self._rollouts
        if kept is None or kept.phase != phase or len(kept.rows["labels"]) != rows:
            with self.writing.running(), torch.no_grad(), self.trainer.precision_plugin.forward_context():
                self._rollouts = kept = self._roll_out(phase, rows)
        return kept.take(numbers % rows)

    @property
    def _layout(self) -> Layout:
        assert self.layout is not None  # the data's, which has been asked for prompts
        return self.layout

    def _roll_out(self, phase: int, n: int) -> Rollouts:
        if n % self.group:
            raise UserError(
                f"model.group is {self.group}, but a phase has {n} replies, which is no multiple of it (batch_size x "
                "ranks x micro-batches x steps_per_phase)"
            )
        numbers = [phase * n + place for place in self.prompted.own_rows]
        asked = self.prompted.drawn([number // self.group for number in numbers])
        with evaluating(self.net):
            rows = self.writer.replies("train", asked, seeds(_run_seed(), LEARNED, numbers=numbers))
            # In the micro-batches of the first pass: the same numbers come out, uncompiled to the last bit.
            parts = [
                self.known({name: values[first : first + self._layout.batch_size] for name, values in rows.items()})
                for first in range(0, len(numbers), self._layout.batch_size)
            ]
        rows |= {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if self.trainer.world_size > 1:
            gather = self.trainer.strategy.all_gather
            rows = {name: gathered(own, gather(own), self._layout.batch_size) for name, own in rows.items()}
        if self.unended_is_least:
            rows["scores"] = torch.where(rows["ended"] > 0, rows["scores"], rows["scores"].min())
        found = Rollouts(phase, self._coefficient(), means(rows), rows)
        rows |= self.advantages(found)
        return found

    def _coefficient(self) -> float:
        before = self._rollouts
        if self.kl_target is None or before is None:
            return self.kl_coefficient
        return adapted_coefficient(before.coefficient, before.figures["kl"], self.kl_target)

    def known(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the policy and its start say of replies, in rows of their full width: (B, T) by name."""
        narrow = trimmed(rows)
        ids, labels = narrow["input_ids"], narrow["labels"]
        logprobs, _, stream = self(ids, labels)
        found = {"logprobs": logprobs, "reference": self.of_start(ids, labels)} | self.values(stream)
        return {name: F.pad(each, (0, rows["labels"].size(1) - each.size(1))) for name, each in found.items()}

    def values(self, stream: Tensor) -> dict[str, Tensor]:
        """What is expected to come, if that is learned: ``values``, (B, T)."""
        return {}

    def note(self, labels: Tensor, logits: Tensor, **sums: Tensor) -> None:
        """Add what is to be logged of a step, at log points alone: sums over tokens. Looking is no step."""
        if not (self.at_log_point and torch.is_grad_enabled()):
            return
        with torch.no_grad():
            within = labels != IGNORED
            sums |= {"tokens": within.sum(), "entropy": token_entropy(logits)[within].sum()}
        for name, more in sums.items():
            self._noted[name] = self._noted.get(name, torch.zeros((), device=self.device)) + more.detach()

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        if self.at_log_point and self._rollouts is not None:
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


def _run_seed() -> int:
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
