"""The transformer in plain PyTorch, independent of Lightning and of devices."""

from lit_gpt_scratch.model.config import GPTConfig
from lit_gpt_scratch.model.gpt import GPT

__all__ = ["GPT", "GPTConfig"]
