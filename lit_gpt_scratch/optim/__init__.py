"""Optimizers, their parameter groups, and learning-rate schedules."""

from lit_gpt_scratch.optim.recipes import AdamW, Muon, OptimizerRecipe
from lit_gpt_scratch.optim.schedule import Schedule

__all__ = ["AdamW", "Muon", "OptimizerRecipe", "Schedule"]
