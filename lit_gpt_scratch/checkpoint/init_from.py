"""A trained model to begin another training with."""

from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from lit_gpt_scratch.checkpoint.loading import LoadedModel, build_model, load_checkpoint
from lit_gpt_scratch.checkpoint.metadata import CheckpointMetadata, require_same_model
from lit_gpt_scratch.checkpoint.run_folder import find_checkpoint
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.text.tokenizer import Tokenizer

MAY_DIFFER: Final = ("dropout", "attention_backend", "initialisation", "classes", "pooling", "rewards", "block_size")
"""What a network may have otherwise than the one whose weights it begins with."""


def load_initial_model(place: str, trusted: str | None = None) -> LoadedModel:
    """The model that ``init_from`` names.

    Args:
        place: A run folder, a checkpoint, a ``.safetensors`` file, or a folder of Hugging Face's.
        trusted: The attention class of somebody's own that it may name: to build it is to run that code.

    Raises:
        UserError: There is none, or none that can be used.
    """
    path, checkpoint = _opened(place)
    try:
        return build_model(checkpoint, path, trusted)
    except UserError as error:
        raise UserError(f"model.init_from: {str(error).replace('--trust ', '--model.gpt.attention ')}") from error


def load_initial_metadata(place: str) -> CheckpointMetadata:
    """What it says of itself."""
    return CheckpointMetadata.from_checkpoint(_opened(place)[1])


def load_initial_tokenizer(place: str) -> Tokenizer:
    """Its tokenizer."""
    contents = load_initial_metadata(place)
    return Tokenizer.from_json(contents.tokenizer, contents.start_of_text)


def let_go() -> None:
    """Free the memory of what was opened last: task and data ask for it one after the other."""
    _read.cache_clear()


def _opened(place: str) -> tuple[Path, dict[str, Any]]:
    try:
        path = find_checkpoint(place, Path(), None)
        return path, _read(path, path.stat().st_mtime_ns)
    except UserError as error:
        raise UserError(f"model.init_from: {error}") from error


@lru_cache(maxsize=1)
def _read(path: Path, written: int) -> dict[str, Any]:
    return load_checkpoint(path)


def resolve_context(trained: LoadedModel, gpt: GPTConfig, block_size: int) -> int:
    """The longest window of a network that begins with it and is to see windows of ``block_size``.

    It keeps its own, if that is longer.

    Raises:
        UserError: Every place in a window has a learned vector, and there are fewer of them.
    """
    if gpt.position == "learned" and block_size > trained.net.block_size:
        raise UserError(
            f"data.block_size is {block_size}, but the model of model.init_from has learned "
            f"{trained.net.block_size} positions; choose at most so many"
        )
    return max(block_size, trained.net.block_size)


def copy_weights(trained: LoadedModel, net: GPT) -> bool:
    """Copy the weights; a head that reads something else stays as it is.

    Args:
        trained: Where they are.
        net: Where they go.

    Returns:
        Whether the head is the trained one.

    Raises:
        UserError: The two networks are not alike.
    """
    own = CheckpointMetadata(asdict(net.config), net.vocab_size, net.block_size, "")
    same_head = net.output_head == trained.net.output_head and trained.net.head.weight.shape == net.head.weight.shape
    free = MAY_DIFFER if same_head else (*MAY_DIFFER, "tied_embeddings")
    require_same_model(replace(trained.metadata, lora=None), own, free)
    weights = trained.net.state_dict()
    if not same_head:
        weights.pop("head.weight")
    missing, unexpected = net.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"head.weight"}
    return same_head
