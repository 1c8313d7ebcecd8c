"""Reward models, which predict a scalar reward for each conversation; preferred replies should get higher rewards."""

from dataclasses import replace
from functools import cached_property

from torch import Tensor
from torchmetrics import MetricCollection
from typing_extensions import override

from lit_gpt_scratch.batch_types import PairBatch
from lit_gpt_scratch.checkpoint.metadata import CheckpointMetadata
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.losses.dpo_loss import bradley_terry_loss
from lit_gpt_scratch.losses.metrics import PreferenceMetrics
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.output_heads import ScalarHead
from lit_gpt_scratch.tasks.pairwise import PairComparison, PairwiseModule, split_pairs


class Reward(PairwiseModule):
    """GPT reward model, trained with the Bradley-Terry loss to predict which of two replies is preferred.

    The reward of a conversation is computed at its last token, the end-of-text token after the last reply. Only
    differences between rewards for the same prompt are learned; their offset is arbitrary. The head is never tied to
    the embedding, regardless of ``gpt.tied_embeddings``.
    """

    next_command = "convert to-safetensors {} reward.safetensors"

    @property
    @override
    def output_head(self) -> ScalarHead:
        return ScalarHead()

    @cached_property
    @override
    def gpt(self) -> GPTConfig:
        return replace(super().gpt, tied_embeddings=False)

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Compute the reward of each conversation.

        Args:
            input_ids: Right-padded token ids, int64 tensor of shape (B, T).
            lengths: Number of tokens in each conversation, int64 tensor of shape (B,).

        Returns:
            Rewards, float32 tensor of shape (B,).
        """
        return self.net.forward_pooled(input_ids, lengths)

    @override
    def compare(self, batch: PairBatch) -> PairComparison:
        chosen, rejected = split_pairs(self(batch["input_ids"], batch["lengths"]), batch["lengths"])
        return PairComparison(bradley_terry_loss(chosen, rejected), chosen, rejected)

    @override
    def build_metrics(self) -> PreferenceMetrics | MetricCollection:
        if self.data_info.truncates:
            raise UserError(
                "data.too_long is 'cut', but a reward model requires complete replies; set it to 'refuse' or 'drop'"
            )
        return super().build_metrics()

    @override
    def checkpoint_metadata(self) -> CheckpointMetadata:
        return replace(super().checkpoint_metadata(), rewards=True)
