"""Load the pretrained model that initializes a run (``--model.init_from``)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch

from lit_gpt_scratch.checkpoint.loading import StoredModel, load_lazily, merge_adapters, open_model
from lit_gpt_scratch.checkpoint.metadata import TRAINING_SETTINGS, CheckpointMetadata, require_same_model
from lit_gpt_scratch.checkpoint.run_folder import find_checkpoint
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.model_family import HEAD
from lit_gpt_scratch.interop.tensor_stream import on_meta
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.local_shard import shard_slices, to_local
from lit_gpt_scratch.model.lora import ADAPTER_SUFFIXES
from lit_gpt_scratch.model.multi_token_prediction import MULTI_TOKEN_PREFIX
from lit_gpt_scratch.text.tokenizer import Tokenizer
from lit_gpt_scratch.trust import Trusted, UntrustedCodeError

MAY_DIFFER: Final = (*TRAINING_SETTINGS, "multi_token_depth", "classes", "pooling", "rewards", "block_size")
"""Settings that may differ between a network and the pretrained model from which it is initialized."""


@dataclass(frozen=True)
class InitialModel:
    """Pretrained checkpoint whose weights have not been copied yet.

    Attributes:
        path: Path to the file or folder from which the checkpoint was read.
        checkpoint: Checkpoint dict returned by ``load_lazily``.
    """

    path: Path
    checkpoint: dict[str, Any]

    @classmethod
    def read(cls, place: str) -> "InitialModel":
        """Read a checkpoint from a file or folder.

        Args:
            place: Path to a run folder, a checkpoint, a ``.safetensors`` file, or a Hugging Face folder.

        Raises:
            UserError: The checkpoint does not exist or cannot be read.
        """
        try:
            path = find_checkpoint(place, Path(), None)
            return cls(path, load_lazily(path))
        except UserError as error:
            raise UserError(f"model.init_from: {error}") from error

    @cached_property
    def metadata(self) -> CheckpointMetadata:
        """The checkpoint's metadata: model config, tokenizer and head type."""
        return CheckpointMetadata.from_checkpoint(self.checkpoint)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.metadata.load_tokenizer(self.path)

    def build_config(self, trusted: Trusted = None) -> GPTConfig:
        """Build the config of the network; see ``open_weights`` for the argument and the exceptions."""
        with explain_untrusted("model.init_from"):
            return self.metadata.build_configs(self.path, trusted)[0]

    def open_weights(self, trusted: Trusted = None) -> StoredModel:
        """Check that the config and the weights match, and return the model, with merged adapters, without building it.

        Args:
            trusted: Import paths that the checkpoint may import, such as a custom attention class. Importing them runs
                their code.

        Raises:
            UserError: The checkpoint refers to code that is not trusted, or its config and weights are inconsistent.
        """
        with explain_untrusted("model.init_from"):
            return merge_adapters(open_model(self.checkpoint, self.path, trusted))


@contextmanager
def explain_untrusted(argument: str) -> Iterator[None]:
    """Context manager that adds the name of a task argument to errors raised while loading the file that it specifies.

    If the file refers to untrusted code, the error also suggests the flag that can name it, such as
    ``--model.gpt.attention``.
    """
    try:
        yield
    except UntrustedCodeError as error:
        flag = f", or pass --{error.setting} {error.name}" if error.setting else ""
        raise UserError(f"{argument}: {error}{flag}") from error
    except UserError as error:
        raise UserError(f"{argument}: {error}") from error


def resolve_context(trained: CheckpointMetadata, gpt: GPTConfig, block_size: int) -> int:
    """Return the context length of a new network: the larger of the pretrained model's context and ``block_size``.

    Args:
        trained: Metadata of the pretrained model.
        gpt: Config of the new network.
        block_size: Tokens per training sequence.

    Raises:
        UserError: The pretrained model has fewer than ``block_size`` learned positions.
    """
    if gpt.position == "learned" and block_size > trained.block_size:
        raise UserError(
            f"--data.block_size is {block_size}, but the pretrained model (--model.init_from) has only "
            f"{trained.block_size} learned positions; set --data.block_size to at most {trained.block_size}"
        )
    return max(block_size, trained.block_size)


def has_same_head(trained: StoredModel, net: GPT) -> bool:
    """Check that a pretrained model fits a network, and return whether their heads have the same type and size.

    Raises:
        UserError: The two models differ in settings that are not in ``MAY_DIFFER``.
    """
    own = CheckpointMetadata(asdict(net.config), net.vocab_size, net.block_size, "")
    same_shape = on_meta(trained.weights)[HEAD].shape == net.head.weight.shape
    same = net.output_head == trained.metadata.head and same_shape
    may_differ = MAY_DIFFER if same else (*MAY_DIFFER, "tied_embeddings")
    require_same_model(replace(trained.metadata, lora=None), own, may_differ)
    return same


@torch.no_grad()
def copy_weights(trained: StoredModel, net: GPT) -> None:
    """Copy a trained model's weights, one tensor at a time, into a network that may be sharded and have new adapters.

    A head of another type or size, adapters, and modules for multi-token prediction that the trained model does not
    have keep their initial weights. Those that only the trained model has are omitted.

    Args:
        trained: The model to copy from; see ``has_same_head``.
        net: The network to copy to.
    """
    weights = net.state_dict()
    kept = {name for name in weights if name.endswith(ADAPTER_SUFFIXES)}
    if not has_same_head(trained, net):
        kept.add(HEAD)
    kept |= {name for name in weights if name.startswith(MULTI_TOKEN_PREFIX) and name not in trained.weights}
    omitted = {name for name in trained.weights if name.startswith(MULTI_TOKEN_PREFIX) and name not in weights}
    assert weights.keys() - kept == trained.weights.keys() - kept - omitted
    for name in weights.keys() - kept:
        to_local(weights[name]).copy_(trained.weights[name][tuple(shard_slices(weights[name]))])
