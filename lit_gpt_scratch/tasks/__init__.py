"""The LightningModules: what is learned, from which batches, by which optimizer."""

from lit_gpt_scratch.tasks.classification import Classification
from lit_gpt_scratch.tasks.language_model import LanguageModel

__all__ = ["Classification", "LanguageModel"]
