"""Import and export model folders (config, weights and tokenizer) in Hugging Face Transformers' format."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.family_differences import describe_differences
from lit_gpt_scratch.interop.gemma_family import Gemma2Family, Gemma3Family
from lit_gpt_scratch.interop.gpt2 import GPT2Family
from lit_gpt_scratch.interop.gpt_oss_family import GptOssFamily
from lit_gpt_scratch.interop.hf_config import HFConfigReader, shorten
from lit_gpt_scratch.interop.hf_tokenizer import (
    TEMPLATE_FILE,
    build_settings_files,
    read_published_settings,
    special_ids,
)
from lit_gpt_scratch.interop.hf_weights import WEIGHTS_FILE, open_tensors, validate_tensors
from lit_gpt_scratch.interop.llama_family import (
    LlamaFamily,
    MistralFamily,
    MixtralFamily,
    Olmo2Family,
    Phi3Family,
    Qwen2Family,
    Qwen3Family,
    Qwen3MoEFamily,
    SmolLM3Family,
)
from lit_gpt_scratch.interop.model_family import EMBEDDING, HEAD, NORM, ModelFamily, ModelShape
from lit_gpt_scratch.interop.tensor_stream import LazyTensors, on_meta, select, write_safetensors
from lit_gpt_scratch.model.expected_weights import expected_weights
from lit_gpt_scratch.model.output_heads import padded_vocab_size
from lit_gpt_scratch.model.weight_init import INIT_STD
from lit_gpt_scratch.schema import read_json
from lit_gpt_scratch.text.atomic_files import fill_folder_atomically
from lit_gpt_scratch.text.published_settings import PublishedSettings
from lit_gpt_scratch.text.tokenizer import GPT2_FILES, TOKENIZER_FILE, Tokenizer

log = logging.getLogger(__name__)

FAMILIES: Final[dict[str, ModelFamily]] = {
    family.model_type: family
    for family in (
        Qwen3Family(),
        LlamaFamily(),
        MistralFamily(),
        Qwen2Family(),
        Olmo2Family(),
        SmolLM3Family(),
        MixtralFamily(),
        Qwen3MoEFamily(),
        Phi3Family(),
        Gemma2Family(),
        Gemma3Family(),
        GptOssFamily(),
        GPT2Family(),
    )
}
"""Supported model families, keyed by ``model_type``. By default, the first one that supports a config exports it."""
CONFIG_FILE: Final = "config.json"
CARD_FILE: Final = "README.md"


class PortableModel(NamedTuple):
    """Config, weights and tokenizer of an imported or exported model.

    Attributes:
        shape: Config, vocabulary size and context length.
        weights: The network's state dict; its tensors may be read only when they are accessed.
        tokenizer: The model's tokenizer.
    """

    shape: ModelShape
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer


def read_hf_checkpoint(folder: Path) -> PortableModel:
    """Read a Hugging Face model from a folder; the weights keep their dtype, and are read when they are accessed.

    Raises:
        UserError: A file is missing, or the model is not supported.
    """
    config = _read_config(folder)
    family = FAMILIES.get(config.values["model_type"])
    if family is None:
        differences = describe_differences(config, _find_tensor_names(folder), [*FAMILIES.values()])
        raise UserError(
            f"{config.path}: model_type is {shorten(config.values['model_type'])}; it must be one of "
            f"{', '.join(sorted(FAMILIES))}{differences and '; '}{differences}"
        )
    shape = family.read_config(config)
    tokenizer = _read_tokenizer(folder, family, read_published_settings(folder, config.values, config.path))
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(
            f"{config.path}: vocab_size is {shape.vocab_size}, but the tokenizer in the same folder has ids up to "
            f"{tokenizer.vocab_size - 1}; use the tokenizer of this model"
        )
    # Use the token that the tokenizer prepends. If it prepends none, use the config's bos_token_id.
    start = next(iter(tokenizer.post_processor_ids), config.values.get("bos_token_id"))
    if isinstance(start, int) and 0 <= start < tokenizer.vocab_size:
        tokenizer.start_of_text = start
    found = open_tensors(folder)
    if not any(name.startswith(family.prefix) for name in found):  # the model was saved without its head
        found = select(found, {name if name.startswith("lm_head.") else family.prefix + name: name for name in found})
    if shape.gpt.tied_embeddings:
        found = _omit_tied_head(found, next(family.tensor_mappings(shape.gpt)).hf_name, folder)
    try:
        expected = dict(family.to_hf_weights(shape.gpt, expected_weights(found.on_meta, *shape)))
    except UserError as error:
        raise UserError(f"{config.path} does not match the tensors in {folder}: {error}; download it again") from error
    validate_tensors(found.on_meta, expected, str(folder))
    return PortableModel(shape, family.from_hf_weights(shape.gpt, found), tokenizer)


def write_hf_checkpoint(
    model: PortableModel,
    folder: Path,
    model_type: str | None = None,
    build_card: Callable[[str, int], str] | None = None,
) -> str:
    """Write a folder that can be loaded with ``AutoModelForCausalLM`` and ``AutoTokenizer`` from ``transformers``.

    Args:
        model: Model to export. Padding rows are removed from its embedding and head.
        folder: Path to the folder to create. The folder is written atomically and must be empty if it exists.
        model_type: Key of ``FAMILIES``. By default, a model that was imported keeps its family, if that still supports
            its settings; otherwise, the first family that does is used.
        build_card: Function that returns the model card from the name of the ``transformers`` class and the number of
            parameters; None to write no card.

    Returns:
        Name of the ``transformers`` class that can load the model.

    Raises:
        UserError: The folder is not empty or cannot be written, or the model family does not exist or does not support
            the model's settings.
    """
    model = fold_multipliers(model)
    shape, shapes = model.shape, dict(on_meta(model.weights))
    try:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"{folder} already exists and is not an empty folder; use another folder")
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}; check its permissions") from error
    published = model.tokenizer.published
    family = _choose_family(shape, model_type, published.model_type if published else None)
    validate_tensors(shapes, expected_weights(shapes, *shape), "the checkpoint")
    unpadded = LazyTensors(
        {name: _without_padding(name, tensor, shape) for name, tensor in shapes.items()},
        lambda name: _without_padding(name, model.weights[name], shape),
    )
    hf_shapes = {name: tensor.to("meta") for name, tensor in family.to_hf_weights(shape.gpt, unpadded.on_meta)}
    if shape.gpt.dropout and not family.has_dropout:
        log.warning(
            "dropout is %s, but %s does not support dropout; dropout is not exported",
            shape.gpt.dropout,
            family.model_type,
        )

    def fill(place: Path) -> None:
        for name, content in _build_json_files(family, model, hf_shapes).items():
            (place / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (place / TOKENIZER_FILE).write_text(model.tokenizer.to_json(), encoding="utf-8")
        if published and published.chat_template is not None:
            (place / TEMPLATE_FILE).write_bytes(published.chat_template.encode())
        if build_card is not None:
            card = build_card(family.architecture, sum(tensor.numel() for tensor in hf_shapes.values()))
            (place / CARD_FILE).write_text(card, encoding="utf-8")
        with (place / WEIGHTS_FILE).open("xb") as file:
            write_safetensors(file, hf_shapes, family.to_hf_weights(shape.gpt, unpadded), {"format": "pt"})

    try:
        place = folder.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        fill_folder_atomically(place, fill)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror}; check the permissions and the free disk space"
        ) from error
    return family.architecture


def fold_multipliers(model: PortableModel) -> PortableModel:
    """Return the same model in the standard parametrization, with the multipliers of mup as part of its weights.

    The query multiplier becomes part of the projection to queries, or of their norm if there is one, and the logit
    multiplier part of the final norm.
    """
    gpt = model.shape.gpt
    query = "query_norm" if gpt.qk_norm else "query"
    multipliers = {f"blocks.{layer}.attention.{query}": gpt.query_multiplier for layer in range(gpt.n_layer)}
    multipliers |= {NORM.removesuffix(".weight"): gpt.logit_multiplier}

    def scaled(name: str) -> Tensor:
        multiplier = multipliers.get(name.rpartition(".")[0], 1.0)
        return model.weights[name] if multiplier == 1 else model.weights[name] * multiplier

    standard = replace(gpt, parametrisation="standard", mup_base_width=None, mup_base_head_dim=None)
    weights = LazyTensors(on_meta(model.weights), scaled)
    return model._replace(shape=model.shape._replace(gpt=standard), weights=weights)


def _without_padding(name: str, tensor: Tensor, shape: ModelShape) -> Tensor:
    """Return a weight without the rows by which the vocabulary is padded."""
    padded = name in (EMBEDDING, HEAD) and padded_vocab_size(shape.gpt, shape.vocab_size) != shape.vocab_size
    return tensor[: shape.vocab_size] if padded else tensor


def _choose_family(shape: ModelShape, asked: str | None, imported: str | None) -> ModelFamily:
    """Return the family to export to; see ``write_hf_checkpoint``.

    Args:
        shape: Shape of the model.
        asked: ``model_type`` for which the user asked, or None.
        imported: ``model_type`` from which the model was imported, or None.
    """
    names = ", ".join(sorted(FAMILIES))
    if asked is not None and asked not in FAMILIES:
        raise UserError(f"model_type is {shorten(asked)}; it must be one of {names}")
    unsupported = {name: family.unsupported_settings(shape.gpt) for name, family in FAMILIES.items()}
    name = asked or min(unsupported, key=lambda name: (len(unsupported[name]), name != imported))
    if unsupported[name]:
        raise UserError(
            f"the model cannot be exported to {name if asked else f'any supported family ({names})'}; "
            f"{'' if asked else f'for the closest family, {name}, '}change these settings of model.gpt: "
            f"{'; '.join(unsupported[name])}"
        )
    return FAMILIES[name]


def _build_json_files(
    family: ModelFamily, model: PortableModel, shapes: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """Return the JSON objects to write, keyed by file name."""
    shape, dtype = model.shape, reduce(torch.promote_types, (tensor.dtype for tensor in shapes.values()))
    return {
        CONFIG_FILE: {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            "dtype": str(dtype).removeprefix("torch."),
            "vocab_size": shape.vocab_size,
            "tie_word_embeddings": shape.gpt.tied_embeddings,
            "initializer_range": INIT_STD,
            "use_cache": True,
            **special_ids(model.tokenizer),
            **family.build_config(shape),
        },
        **build_settings_files(model.tokenizer, shape.block_size),
    }


def _find_tensor_names(folder: Path) -> list[str]:
    """Return the names of all tensors in a folder, or an empty list if its files cannot be read."""
    try:
        return [*open_tensors(folder)]
    except UserError:
        return []


def _omit_tied_head(found: LazyTensors, embedding: str, folder: Path) -> LazyTensors:
    """Omit a tied output head, which some files contain in addition to the embedding.

    Raises:
        UserError: The head differs from the embedding.
    """
    head = "lm_head.weight"
    if head in found and embedding in found and not torch.equal(found[head], found[embedding]):
        raise UserError(
            f"{folder / CONFIG_FILE}: tie_word_embeddings is true or absent, but lm_head.weight is not equal to "
            f"{embedding}; set tie_word_embeddings to false"
        )
    return select(found, {name: name for name in found if name != head})


def _read_config(folder: Path) -> HFConfigReader:
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise UserError(
            f"no folder at {folder}; download a model from the Hub first: hf download NAME --local-dir FOLDER"
        )
    try:
        values = read_json(path, dict[str, Any])
    except FileNotFoundError as error:
        raise UserError(f"no {CONFIG_FILE} in {folder}; use a folder written by save_pretrained") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a valid config, or cannot be read ({error}); download it again") from error
    if not isinstance(values.get("model_type"), str):
        raise UserError(f"{path} has no model_type; it must be one of {', '.join(sorted(FAMILIES))}")
    return HFConfigReader(path, values)


def _read_tokenizer(folder: Path, family: ModelFamily, published: PublishedSettings) -> Tokenizer:
    if (folder / TOKENIZER_FILE).is_file():
        return Tokenizer.load(folder / TOKENIZER_FILE, published)
    # vocab.json and merges.txt do not specify how text is split into words, but for GPT-2 this is known.
    if not isinstance(family, GPT2Family) or not any(
        all((folder / name).is_file() for name in names) for names in GPT2_FILES
    ):
        raise UserError(
            f"no {TOKENIZER_FILE} in {folder}; create it with "
            "transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return Tokenizer.load(folder, published)
