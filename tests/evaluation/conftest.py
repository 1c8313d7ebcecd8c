"""A tokenizer and a network that tell texts apart, and one that does not."""

import pytest
import torch

from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.tokenizer import Tokenizer
from tests.conftest import TINY, randomised, sentences


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([sentences(seed) for seed in range(3)], 300)


@pytest.fixture
def model(tokenizer: Tokenizer) -> GPT:
    """Random, and nothing of it is zero."""
    return randomised(TINY, vocab_size=tokenizer.vocab_size, block_size=64)


@pytest.fixture
def uniform(model: GPT) -> GPT:
    """All tokens are equally likely."""
    torch.nn.init.zeros_(model.head.weight)
    return model
