"""Load trained models: checkpoints, ``.safetensors`` files and Hugging Face folders."""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from lit_gpt_scratch.checkpoint.checkpoint_io import load_archive
from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY, CheckpointMetadata
from lit_gpt_scratch.checkpoint.run_folder import find_checkpoint
from lit_gpt_scratch.checkpoint.safetensors_export import SAFETENSORS_SUFFIX, load_safetensors
from lit_gpt_scratch.checkpoint.sharded_checkpoint import ShardedCheckpoint, is_sharded
from lit_gpt_scratch.checkpoint.training_state import validate_training_state
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop import hf_checkpoint
from lit_gpt_scratch.interop.hf_weights import validate_tensors
from lit_gpt_scratch.interop.model_family import EMBEDDING, HEAD
from lit_gpt_scratch.interop.tensor_stream import LazyTensors, add_prefix, on_meta, strip_prefix
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.expected_weights import expected_weights
from lit_gpt_scratch.model.lora import ADAPTER_SUFFIXES, LoRA, adapter_names, merged_weight
from lit_gpt_scratch.schema import describe
from lit_gpt_scratch.text.tokenizer import Tokenizer
from lit_gpt_scratch.trust import Trusted

STATE_PREFIX: Final = "net."
"""Prefix of the network's weights in a task's state dict."""


class LoadedModel(NamedTuple):
    """Trained model that was loaded from a checkpoint.

    Attributes:
        net: The network in evaluation mode, with any adapters merged into its weights.
        tokenizer: The model's tokenizer.
        metadata: Metadata of the checkpoint.
        step: Number of optimizer steps for which the model was trained, or 0 if unknown.
    """

    net: GPT
    tokenizer: Tokenizer
    metadata: CheckpointMetadata
    step: int = 0

    def require_language_model(self) -> tuple[GPT, Tokenizer]:
        """Return the network and the tokenizer, after checking that the model is a language model.

        Raises:
            UserError: The model has a different type of head.
        """
        if self.metadata.non_lm_task is not None:
            raise UserError(f"the model is not a language model: it {self.metadata.non_lm_task}; use a language model")
        return self.net, self.tokenizer


def load_checkpoint(path: Path, mapped: bool = False) -> dict[str, Any]:
    """Load a checkpoint, a ``.safetensors`` file or a Hugging Face folder onto the CPU, without running code from it.

    Args:
        path: Path to the file or folder.
        mapped: Whether to map the tensors of a checkpoint in one file into memory instead of reading them.

    Raises:
        UserError: The file is missing, corrupted, or not a checkpoint.
    """
    if (opened := _open_portable(path)) is not None:
        weights = dict(opened["state_dict"])
        if (path / hf_checkpoint.CONFIG_FILE).is_file() and opened[METADATA_KEY]["gpt"]["tied_embeddings"]:
            weights[STATE_PREFIX + HEAD] = weights[STATE_PREFIX + EMBEDDING]  # save it once
        return {**opened, "state_dict": weights}
    if is_sharded(path):
        checkpoint = ShardedCheckpoint.open(path)
        validate_checkpoint(checkpoint.read_training_state(), path, ("cpu", "meta"))
        loaded = checkpoint.load()
    else:
        loaded = load_archive(path, mapped)
    validate_checkpoint(loaded, path, ("cpu",))
    return loaded


def load_training_state(path: Path) -> dict[str, Any]:
    """Load a checkpoint. If it is sharded, its weights and optimizer states are tensors on the meta device.

    Raises:
        UserError: The file is missing, corrupted, or not a checkpoint.
    """
    if not is_sharded(path):
        return load_checkpoint(path)
    loaded = ShardedCheckpoint.open(path, with_shards=False).read_training_state()
    validate_checkpoint(loaded, path, ("cpu", "meta"))
    return loaded


def load_lazily(path: Path) -> dict[str, Any]:
    """Load a checkpoint, a ``.safetensors`` file or a Hugging Face folder, whose weights are read when accessed.

    The optimizer states of a sharded checkpoint are omitted.

    Raises:
        UserError: The file is missing, corrupted, or not a checkpoint; also raised when a weight is read.
    """
    if (opened := _open_portable(path)) is not None:
        return opened
    if is_sharded(path):
        checkpoint = ShardedCheckpoint.open(path)
        validate_checkpoint(checkpoint.read_training_state(), path, ("cpu", "meta"))
        return checkpoint.load_lazily()
    return load_checkpoint(path, mapped=True)


def _open_portable(path: Path) -> dict[str, Any] | None:
    """Open a Hugging Face folder or a ``.safetensors`` file; return None if the path is neither."""
    if (path / hf_checkpoint.CONFIG_FILE).is_file():
        return load_hf_checkpoint(path)
    return load_safetensors(path, STATE_PREFIX) if path.suffix == SAFETENSORS_SUFFIX else None


def validate_checkpoint(loaded: dict[str, Any], path: Path, devices: Collection[str]) -> None:
    """Check the types of the contents of a checkpoint, and the devices of its tensors.

    Raises:
        UserError: It is not a checkpoint of this package, or is corrupted.
    """
    if not {METADATA_KEY, "state_dict"} <= loaded.keys():
        raise UserError(f"{path} is not a checkpoint of lit_gpt_scratch; use a checkpoint written by fit")
    _validate_tensors(loaded, path, devices)
    _validate_state_dict(loaded["state_dict"], path)
    if "loops" in loaded:
        try:
            validate_training_state(loaded)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def _validate_tensors(loaded: dict[str, Any], path: Path, devices: Collection[str]) -> None:
    """Check that all tensors in a checkpoint are dense, including those in the states of optimizers and callbacks.

    Raises:
        UserError: A tensor is not dense.
    """
    pending: list[tuple[str, Any]] = list(loaded.items())
    seen: set[int] = set()  # a corrupted file may have containers that contain themselves
    while pending:
        name, value = pending.pop()
        if isinstance(value, Tensor):
            if value.device.type not in devices or not _is_dense(value):
                raise UserError(f"{path} is corrupted: {name} is not a dense tensor; use another file")
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            pending += [(describe(key) if name == "state_dict" else name, item) for key, item in items]


def _validate_state_dict(state: Any, path: Path) -> None:
    """Check that a state dict maps names to tensors, and that their size is at most twice that of the stored data.

    Raises:
        UserError: The state dict contains other values, or tensors that repeat the stored data.
    """
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(weight, Tensor) for name, weight in state.items()
    ):
        raise UserError(f"{path} is corrupted: its state_dict does not map names to tensors; use another file")
    if any(weight.is_meta for weight in state.values()):  # their sizes are compared with those of the shards
        return
    stored = {storage.data_ptr(): storage.nbytes() for storage in (w.untyped_storage() for w in state.values())}
    if sum(weight.nbytes for weight in state.values()) > 2 * sum(stored.values()):  # tied weights are stored once
        raise UserError(f"{path} is corrupted: many of its tensors share the same data; use another file")


def _is_dense(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_quantized:
        return False
    return (
        tensor.is_meta or tensor.nbytes <= tensor.untyped_storage().nbytes()
    )  # false if a stride of 0 repeats the data


def load_hf_checkpoint(path: Path) -> dict[str, Any]:
    """Load a Hugging Face folder as a checkpoint dict, whose weights are read when they are accessed.

    It contains neither optimizer state nor loop counters.

    Raises:
        UserError: The folder is missing, or its model is not supported.
    """
    (gpt, vocab_size, block_size), weights, tokenizer = hf_checkpoint.read_hf_checkpoint(path)
    published = None if tokenizer.published is None else asdict(tokenizer.published)
    metadata = CheckpointMetadata(
        asdict(gpt), vocab_size, block_size, tokenizer.to_json(), tokenizer.start_of_text, published=published
    )
    return {METADATA_KEY: asdict(metadata), "state_dict": add_prefix(weights, STATE_PREFIX)}


class StoredModel(NamedTuple):
    """Trained model whose network has not been built.

    Attributes:
        config: The architecture.
        lora: LoRA settings, or None if the weights contain no adapters.
        weights: The network's state dict; its tensors may be read only when they are accessed.
        metadata: Metadata of the checkpoint.
    """

    config: GPTConfig
    lora: LoRA | None
    weights: Mapping[str, Tensor]
    metadata: CheckpointMetadata


def open_model(checkpoint: dict[str, Any], path: Path, trusted: Trusted = None) -> StoredModel:
    """Check that the config and the weights of a checkpoint match; see ``build_model`` for the arguments and errors."""
    metadata = CheckpointMetadata.from_checkpoint(checkpoint)
    if not metadata.tokenizer:
        raise UserError(
            f"{path} contains only adapters; pass the base model as the checkpoint and this file as --adapter"
        )
    gpt, lora = metadata.build_configs(path, trusted)
    weights = strip_prefix(checkpoint["state_dict"], STATE_PREFIX)
    shapes = on_meta(weights)
    try:  # before memory is allocated, since the sizes in the metadata may be wrong
        expected = expected_weights(shapes, gpt, metadata.vocab_size, metadata.block_size, metadata.head, lora)
    except UserError as error:
        raise UserError(
            f"{path} contains a model that cannot be built: {error}; use an intact file, and the version "
            "of lit_gpt_scratch that wrote it"
        ) from error
    validate_tensors(shapes, expected, str(path))
    return StoredModel(gpt, lora, weights, metadata)


def merge_adapters(stored: StoredModel) -> StoredModel:
    """Merge the adapters of a stored model into its weights, each when it is accessed.

    Weights with adapters are in at least float32, because bfloat16 cannot represent small updates.

    Raises:
        UserError: The head has an adapter, but is tied to the embedding, which has none.
    """
    if stored.lora is None:
        return stored
    scaling = stored.lora.alpha / stored.lora.rank
    weights, shapes = stored.weights, on_meta(stored.weights)
    if stored.config.tied_embeddings and adapter_names(HEAD)[0] in shapes:
        raise UserError(
            "the head has an adapter and is tied to the embedding, so its weights cannot be merged; exclude the head "
            "from lora.pattern, or untie the weights"
        )

    def merge(name: str) -> Tensor:
        a, b = adapter_names(name)
        return merged_weight(weights[name], weights[a], weights[b], scaling) if a in shapes else weights[name]

    plain = {name: tensor.to("meta") for name, tensor in shapes.items() if not name.endswith(ADAPTER_SUFFIXES)}
    for name, tensor in plain.items():
        if adapter_names(name)[0] in shapes:
            plain[name] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return stored._replace(lora=None, weights=LazyTensors(plain, merge))


def build_model(checkpoint: dict[str, Any], path: Path, trusted: Trusted = None) -> LoadedModel:
    """Build the model from a loaded checkpoint, and merge its adapters.

    Args:
        checkpoint: Checkpoint dict returned by ``load_checkpoint``.
        path: Path to the checkpoint, used in error messages.
        trusted: Import paths that the checkpoint may import, such as a custom attention class. Building the model runs
            the imported code.

    Raises:
        UserError: The checkpoint refers to code that is not trusted, or its config and weights are inconsistent.
    """
    gpt, _, weights, metadata = merge_adapters(open_model(checkpoint, path, trusted))
    tokenizer = metadata.load_tokenizer(path)
    net = GPT(gpt, metadata.vocab_size, metadata.block_size, metadata.head, initialise=False)
    net.load_state_dict(dict(weights))
    step = checkpoint.get("global_step", 0)
    return LoadedModel(net.eval(), tokenizer, metadata, step if isinstance(step, int) else 0)


def load_model(path: Path, trusted: Trusted = None) -> tuple[GPT, Tokenizer]:
    """Load a language model, in evaluation mode, and its tokenizer.

    Args:
        path: Path to a checkpoint, a ``.safetensors`` file, or a Hugging Face folder.
        trusted: See ``build_model``.

    Raises:
        UserError: The file is missing or not a checkpoint, refers to code that is not trusted, or does not contain a
            valid language model.
    """
    return build_model(load_checkpoint(path), path, trusted).require_language_model()


def load_reward_model(place: str, tokenizer_json: str, trusted: Trusted = None) -> GPT:
    """Load a reward model (a network with a ``ScalarHead``), frozen and in evaluation mode.

    Args:
        place: Path to a run folder, a checkpoint or a ``.safetensors`` file.
        tokenizer_json: The policy's ``tokenizer.json`` as a string.
        trusted: See ``build_model``.

    Raises:
        UserError: The file is missing, is not a reward model, or has a different tokenizer than the policy.
    """
    path = find_checkpoint(place, Path(), None)
    loaded = build_model(load_checkpoint(path), path, trusted)
    if not loaded.metadata.rewards:
        task = loaded.metadata.non_lm_task or "predicts tokens"
        raise UserError(f"{path} is not a reward model: it {task}; train one with fit --model Reward")
    if loaded.metadata.tokenizer != tokenizer_json:
        raise UserError(
            f"the reward model {path} has a different tokenizer than the policy; initialize both from the same model "
            "(--model.init_from)"
        )
    return loaded.net.requires_grad_(False)
