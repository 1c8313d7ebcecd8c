"""The transformer in plain PyTorch; knows neither Lightning nor devices."""

from lit_gpt_scratch.model.config import GPTConfig
from lit_gpt_scratch.model.gpt import GPT

__all__ = ["GPT", "GPTConfig"]
