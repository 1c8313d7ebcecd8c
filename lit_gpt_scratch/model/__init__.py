"""The GPT model in plain PyTorch, without dependencies on Lightning or a particular device."""

from lit_gpt_scratch.model.config import GPTConfig
from lit_gpt_scratch.model.gpt import GPT

__all__ = ["GPT", "GPTConfig"]
