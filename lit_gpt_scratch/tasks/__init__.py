"""LightningModules: one class per training stage."""

from lit_gpt_scratch.tasks.classification import Classification
from lit_gpt_scratch.tasks.dpo import DPO
from lit_gpt_scratch.tasks.language_model import LanguageModel
from lit_gpt_scratch.tasks.reward_model import Reward
from lit_gpt_scratch.tasks.rl.grpo import GRPO
from lit_gpt_scratch.tasks.rl.ppo import PPO

__all__ = ["DPO", "GRPO", "PPO", "Classification", "LanguageModel", "Reward"]
