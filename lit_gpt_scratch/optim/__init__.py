"""Optimizers, parameter groups, gradient clipping, weight averaging and learning-rate schedules."""

from lit_gpt_scratch.optim.lr_schedule import Schedule
from lit_gpt_scratch.optim.optimizers import AdamW, Muon, OptimizerRecipe

__all__ = ["AdamW", "Muon", "OptimizerRecipe", "Schedule"]
