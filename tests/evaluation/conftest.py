"""A tokenizer, a random network and a uniform one."""

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
    """A network with random weights, none of them zero."""
    return randomised(TINY, vocab_size=tokenizer.vocab_size, block_size=64)


@pytest.fixture
def uniform(model: GPT) -> GPT:
    """A network that gives all tokens the same probability."""
    torch.nn.init.zeros_(model.head.weight)
    return model
