"""Custom reward functions, as a config names them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def letters(prompts: Sequence[str], replies: Sequence[str]) -> list[float]:
    """The share of letters in each reply."""
    return [sum(map(str.isalpha, reply)) / max(len(reply), 1) for reply in replies]


def even_tokens(prompts: Sequence[str], replies: Sequence[str]) -> Tensor:
    """The number of characters of each reply with an even code point."""
    return torch.tensor([float(sum(ord(character) % 2 == 0 for character in reply)) for reply in replies])


def brevity(prompts: Sequence[str], replies: Sequence[str]) -> list[float]:
    """Rewards short replies: an empty one is best."""
    return [-float(len(reply)) for reply in replies]


def length(prompts: Sequence[str], replies: Sequence[str]) -> list[float]:
    """Rewards long replies: one that never ends is best."""
    return [float(len(reply)) for reply in replies]


def not_a_number(prompts: Sequence[str], replies: Sequence[str]) -> list[float]:
    return [0.0] * (len(replies) - 1) + [math.nan]


def too_few(prompts: Sequence[str], replies: Sequence[str]) -> list[float]:
    return [0.0]


def words(prompts: Sequence[str], replies: Sequence[str]) -> list[str]:
    return ["good"] * len(replies)


NUMBER = 3
