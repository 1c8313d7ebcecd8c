"""Fixtures: small realistic data and small models, so that a test takes seconds and needs no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # set before any library reads it at import: no test contacts a server

import gc
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.tasks import LanguageModel
from lit_gpt_scratch.text.token_shards import ShardedTokenStream, TokenShard

pytest_plugins = ["tests.missing_libraries"]
# A slow machine must not fail a test.
settings.register_profile("no deadline", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no deadline")

TINY = GPTConfig(n_layer=2, n_head=2, n_embd=32)


def pytest_collection_finish() -> None:
    """Do not traverse the objects of libraries and of collected tests again in each garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _reset_seed() -> None:
    """``seed_everything`` sets an environment variable that decides the order of samples in later tests."""
    os.environ.pop("PL_GLOBAL_SEED", None)


@pytest.fixture(autouse=True, scope="session")
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """``fit`` records the configs that it writes; tests leave the user's record alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_sync() -> Iterator[None]:
    """Do not wait for the disk: tests kill processes, which lose nothing that was written, but do not cut the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _n_threads() -> int:
    """Number of threads of slow tests; everything else, including fixtures of modules, uses one."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    return n_threads


@pytest.fixture(autouse=True)
def _single_thread(request: pytest.FixtureRequest, _n_threads: int) -> Iterator[None]:
    """Small tests are slower with several threads, above all when other tests run in parallel."""
    if "slow" in request.keywords:
        torch.set_num_threads(_n_threads)
    yield
    torch.set_num_threads(1)


def sentences(seed: int, n: int = 60) -> str:
    """Lines that look like English, with a grammar that a small model can learn."""
    rng = random.Random(seed)
    nouns, verbs = ["the cat", "a dog", "every bird", "some fish", f"person {seed}"], ["sees", "likes", "chases"]
    return "".join(f"{rng.choice(nouns)} {rng.choice(verbs)} {rng.choice(nouns)}.\n" for _ in range(n))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 different documents."""
    folder = tmp_path_factory.mktemp("corpus")
    for seed in range(30):
        (folder / f"{seed:02}.txt").write_text(sentences(seed), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache folder of the token stores of this session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def packed_text(corpus: Path, cache: Path) -> Callable[..., PackedText]:
    """Build a small ``PackedText``; arguments replace its defaults."""

    def build(**changes: object) -> PackedText:
        settings = {
            "source": str(corpus), "vocab_size": 300, "block_size": 32, "batch_size": 4, "cache": str(cache),
            "validation_share": 0.1,
        }  # fmt: skip
        return PackedText(**(settings | changes))

    return build


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """Build a quiet CPU trainer; arguments replace its defaults."""

    def build(**changes: object) -> L.Trainer:
        settings = {
            "accelerator": "cpu", "devices": 1, "max_steps": 8, "max_epochs": -1, "logger": False,
            "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
            "num_sanity_val_steps": 0, "default_root_dir": tmp_path, "use_distributed_sampler": False,
        }  # fmt: skip
        return L.Trainer(**(settings | changes))

    return build


@pytest.fixture
def task() -> Callable[..., LanguageModel]:
    """Build a small task, uncompiled; arguments replace its defaults."""

    def build(**changes: object) -> LanguageModel:
        return LanguageModel(**({"gpt": TINY, "compile": False} | changes))

    return build


def token_stream(folder: Path, *shards: list[list[int]]) -> ShardedTokenStream:
    """Build a token stream: per shard the ids of each document; one byte of text per token."""
    folder.mkdir(exist_ok=True)
    written = []
    for index, documents in enumerate(shards):
        sizes = np.array([len(ids) for ids in documents])
        spans = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1).astype("<u8")
        written.append(TokenShard.write(folder, f"train-{index:05}", np.concatenate(documents).astype("<u2"), spans))
    return ShardedTokenStream(tuple(written))


def randomised(config: GPTConfig, vocab_size: int = 61, block_size: int = 24) -> GPT:
    """A model with random parameters everywhere: none is zero or one by initialisation, so every part matters."""
    torch.manual_seed(0)
    model = GPT(config, vocab_size, block_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.ndim == 1 else 0.0))
    return model.eval()
