"""``convert``: convert checkpoints to and from Hugging Face folders and safetensors files."""

import logging
import math
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_gpt_scratch.cli.entrypoint import TRUST, CommandParser
from lit_gpt_scratch.errors import UserError

if TYPE_CHECKING:
    from lit_gpt_scratch.interop.hf_checkpoint import PortableModel
    from lit_gpt_scratch.trust import Trusted

log = logging.getLogger(__name__)


def main(args: Sequence[str] | None = None) -> None:
    """Run the ``convert`` command."""
    parser = CommandParser(
        prog="python -m lit_gpt_scratch.convert",
        description="Export a checkpoint to another format, or import a published model as a checkpoint.",
    )
    formats = parser.add_subparsers(dest="format", metavar="FORMAT", required=True, title="formats")
    checkpoint: dict[str, Any] = {"metavar": "CKPT", "help": "checkpoint file or run folder"}
    file: dict[str, Any] = {"metavar": "FILE", "type": Path, "help": "output file; its name must end with .safetensors"}
    to_safetensors = formats.add_parser(
        "to-safetensors",
        help="export weights, architecture and tokenizer as one .safetensors file",
        description="Export a checkpoint's weights, architecture and tokenizer to one .safetensors file. The file "
        "cannot contain code; generate and evaluate read it like a checkpoint. LoRA adapters are merged into the "
        "weights.",
    )
    to_safetensors.add_argument("checkpoint", **checkpoint)
    to_safetensors.add_argument("file", **file)
    to_safetensors.add_argument("--trust", **TRUST)
    to_hf = formats.add_parser(
        "to-hf",
        help="export a folder for Hugging Face transformers",
        description="Export a folder that AutoModelForCausalLM and AutoTokenizer can load, in the architecture that "
        "matches the model, such as Llama, Qwen3 or GPT-2. The folder includes a model card with the training data, "
        "procedure and results that the run folder of the checkpoint records.",
    )
    to_hf.add_argument("checkpoint", **checkpoint)
    to_hf.add_argument("folder", metavar="FOLDER", type=Path, help="output folder; must be empty if it exists")
    to_hf.add_argument(
        "--model_type",
        metavar="NAME",
        help="architecture to export to, such as llama or phi3; by default, that of an imported model, or the first "
        "that matches",
    )
    to_hf.add_argument("--license", metavar="ID", help="license in the model card, such as apache-2.0")
    to_hf.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload the folder to this model repository on the Hugging Face Hub, with the token in HF_TOKEN or of "
        "`hf auth login`",
    )
    to_hf.add_argument("--public", action="store_true", help="make a new repository public instead of private")
    to_adapter = formats.add_parser(
        "to-adapter",
        help="export the LoRA adapters of a run",
        description="Export the weights trained by a run with --model.lora.rank to one .safetensors file. generate and "
        "evaluate apply the adapters to the base model with --adapter FILE.",
    )
    to_adapter.add_argument("checkpoint", **checkpoint)
    to_adapter.add_argument("file", **file)
    to_sharded = formats.add_parser(
        "to-sharded",
        help="convert a checkpoint in one file to a sharded checkpoint",
        description="Convert a checkpoint in one file to a sharded checkpoint, as written with --checkpoint.format "
        "sharded, including the state that is required to resume its run.",
    )
    to_sharded.add_argument("checkpoint", **checkpoint)
    to_sharded.add_argument("folder", metavar="FOLDER", type=Path, help="output folder, which must not exist")
    to_file = formats.add_parser(
        "to-file",
        help="convert a sharded checkpoint to one file",
        description="Convert a sharded checkpoint to one file, including the state that is required to resume its run. "
        "At most one tensor, or 256 MB, is held in memory.",
    )
    to_file.add_argument("checkpoint", **checkpoint)
    to_file.add_argument("file", metavar="FILE", type=Path, help="output file, which must not exist")
    merge = formats.add_parser(
        "merge",
        help="average the weights of several checkpoints",
        description="Average the weights of several checkpoints of the same architecture and tokenizer (model soups), "
        "such as runs fine-tuned from one model, or steps of one run, and write one .safetensors file, which generate, "
        "evaluate and fit --model.init_from read. LoRA adapters are first merged into the weights. One tensor of each "
        "checkpoint is held in memory at a time.",
    )
    merge.add_argument("checkpoints", metavar="CKPT", nargs="+", help="checkpoint files or run folders, at least two")
    merge.add_argument(
        "file", **{**file, "help": "output file, which must not exist; its name must end with .safetensors"}
    )
    merge.add_argument(
        "--weights", metavar="W,W,...", type=_parse_weights, help="weights of the checkpoints (default: all equal)"
    )
    merge.add_argument("--trust", **TRUST)
    from_hf = formats.add_parser(
        "from-hf",
        help="import a folder from Hugging Face transformers",
        description="Import a folder written by save_pretrained, of a model such as Llama, Qwen3 or Gemma, as a "
        "checkpoint that generate and evaluate can read. No code in the folder is executed.",
    )
    from_hf.add_argument(
        "folder", metavar="FOLDER", type=Path, help="folder with config.json, .safetensors files and tokenizer.json"
    )
    from_hf.add_argument(
        "checkpoint", metavar="CKPT", type=Path, help="output file; its name may end with .ckpt or .safetensors"
    )
    given = parser.parse_args(args)
    convert = {
        "to-safetensors": _to_safetensors, "to-adapter": _to_adapter, "to-hf": _to_hf, "from-hf": _from_hf,
        "to-sharded": _to_sharded, "to-file": _to_file, "merge": _merge,
    }  # fmt: skip
    convert[given.format](given)


def _to_sharded(given: Namespace) -> None:
    from lit_gpt_scratch.checkpoint.convert_format import to_sharded
    from lit_gpt_scratch.checkpoint.run_folder import find_checkpoint

    to_sharded(find_checkpoint(given.checkpoint, Path(), None), given.folder)


def _to_file(given: Namespace) -> None:
    from lit_gpt_scratch.checkpoint.convert_format import to_one_file
    from lit_gpt_scratch.checkpoint.run_folder import find_checkpoint

    to_one_file(find_checkpoint(given.checkpoint, Path(), None), given.file)


def _to_adapter(given: Namespace) -> None:
    from lit_gpt_scratch.checkpoint.adapters import save_adapter
    from lit_gpt_scratch.checkpoint.run_folder import find_checkpoint

    _require_safetensors_suffix(given.file)
    save_adapter(find_checkpoint(given.checkpoint, Path(), None), given.file)


def _parse_weights(text: str) -> list[float]:
    try:
        weights = [float(weight) for weight in text.split(",")]
    except ValueError:
        weights = [0.0]
    if not all(0 < weight < math.inf for weight in weights):
        raise ArgumentTypeError(f"{text} is not a list of positive numbers, such as 3,1")
    return weights


def _merge(given: Namespace) -> None:
    from lit_gpt_scratch.checkpoint.loading import STATE_PREFIX
    from lit_gpt_scratch.checkpoint.merge_checkpoints import merge_checkpoints
    from lit_gpt_scratch.checkpoint.run_folder import find_checkpoint
    from lit_gpt_scratch.checkpoint.safetensors_export import export_safetensors

    _require_safetensors_suffix(given.file)
    count = len(given.checkpoints)
    if count < 2:
        raise UserError(f"argument CKPT: merge requires at least two checkpoints before the output file {given.file}")
    weights = given.weights or [1.0] * count
    if len(weights) != count:
        raise UserError(f"argument --weights: there are {len(weights)} weights for {count} checkpoints")
    if given.file.exists():
        raise UserError(f"argument FILE: {given.file} already exists; pass another file, or delete it")
    paths = [find_checkpoint(checkpoint, Path(), None) for checkpoint in given.checkpoints]
    export_safetensors(merge_checkpoints(paths, weights, given.trust), STATE_PREFIX, given.file)


def _require_safetensors_suffix(file: Path) -> None:
    from lit_gpt_scratch.checkpoint.safetensors_export import SAFETENSORS_SUFFIX

    if file.suffix != SAFETENSORS_SUFFIX:
        raise UserError(f"argument FILE: {file} does not end with {SAFETENSORS_SUFFIX}; append this suffix")


def _to_safetensors(given: Namespace) -> None:
    from lit_gpt_scratch.checkpoint.loading import STATE_PREFIX, load_lazily
    from lit_gpt_scratch.checkpoint.run_folder import find_checkpoint
    from lit_gpt_scratch.checkpoint.safetensors_export import export_safetensors

    _require_safetensors_suffix(given.file)
    path = find_checkpoint(given.checkpoint, Path(), None)
    export_safetensors(_merge_adapters(load_lazily(path), path, given.trust), STATE_PREFIX, given.file)


def _to_hf(given: Namespace) -> None:
    from lit_gpt_scratch.checkpoint.loading import load_lazily
    from lit_gpt_scratch.checkpoint.model_card import RunRecord, build_model_card
    from lit_gpt_scratch.checkpoint.run_folder import find_checkpoint
    from lit_gpt_scratch.checkpoint.safetensors_export import SAFETENSORS_SUFFIX
    from lit_gpt_scratch.interop.hf_checkpoint import write_hf_checkpoint
    from lit_gpt_scratch.interop.hub_upload import require_hub_access, upload_model

    if given.folder.suffix == SAFETENSORS_SUFFIX:
        raise UserError(f"argument FOLDER: to-hf writes a folder; to write the file {given.folder}, use to-safetensors")
    if given.public and given.push is None:
        raise UserError("argument --public: the model is not uploaded; add --push owner/name")
    if given.push is not None:
        require_hub_access(given.push)
    path = find_checkpoint(given.checkpoint, Path(), None)
    checkpoint = load_lazily(path)
    model = _open_model(checkpoint, path)
    run = RunRecord.read(path, checkpoint.get("global_step"))

    def build_card(architecture: str, parameters: int) -> str:
        name = given.push or given.folder.resolve().name
        return build_model_card(name, model.shape, model.tokenizer, run, architecture, parameters, given.license)

    architecture = write_hf_checkpoint(model, given.folder, given.model_type, build_card)
    log.info("%s contains a %s", given.folder, architecture)
    if given.push is not None:
        log.info("uploaded to %s", upload_model(given.folder, given.push, given.public))


def _from_hf(given: Namespace) -> None:
    from lit_gpt_scratch.checkpoint.checkpoint_io import save_checkpoint
    from lit_gpt_scratch.checkpoint.loading import STATE_PREFIX, load_checkpoint, load_hf_checkpoint
    from lit_gpt_scratch.checkpoint.safetensors_export import SAFETENSORS_SUFFIX, export_safetensors

    if given.checkpoint.exists():
        raise UserError(f"argument CKPT: {given.checkpoint} already exists; pass another file, or delete it")
    checkpoint = load_hf_checkpoint(given.folder)
    if given.checkpoint.suffix == SAFETENSORS_SUFFIX:
        export_safetensors(checkpoint, STATE_PREFIX, given.checkpoint)
    else:
        save_checkpoint(load_checkpoint(given.folder), given.checkpoint)


def _open_model(checkpoint: dict[str, Any], path: Path) -> "PortableModel":
    """Open a model whose weights are read when they are accessed; weights without adapters keep their dtype."""
    from lit_gpt_scratch.checkpoint.loading import STATE_PREFIX
    from lit_gpt_scratch.checkpoint.metadata import CheckpointMetadata
    from lit_gpt_scratch.interop.hf_checkpoint import PortableModel
    from lit_gpt_scratch.interop.model_family import ModelShape
    from lit_gpt_scratch.interop.tensor_stream import select, strip_prefix
    from lit_gpt_scratch.model.config import custom_classes
    from lit_gpt_scratch.model.multi_token_prediction import MULTI_TOKEN_PREFIX

    if custom := custom_classes(CheckpointMetadata.from_checkpoint(checkpoint).gpt):
        raise UserError(
            f"{path} has the custom class {next(iter(custom.values()))}, which no published architecture supports; "
            "only models with built-in classes can be converted"
        )
    checkpoint = _merge_adapters(checkpoint, path)
    contents = CheckpointMetadata.from_checkpoint(checkpoint)
    gpt, _ = contents.build_configs(path, None)
    if contents.non_lm_task is not None:
        raise UserError(f"the model in {path} {contents.non_lm_task}; only language models can be converted")
    weights = strip_prefix(checkpoint["state_dict"], STATE_PREFIX)
    if gpt.multi_token_depth:
        log.warning("the modules for multi-token prediction are omitted, because no supported family has them")
        gpt = replace(gpt, multi_token_depth=0)
        weights = select(weights, {name: name for name in weights if not name.startswith(MULTI_TOKEN_PREFIX)})
    shape = ModelShape(gpt, contents.vocab_size, contents.block_size)
    return PortableModel(shape, weights, contents.load_tokenizer(path))


def _merge_adapters(checkpoint: dict[str, Any], path: Path, trusted: "Trusted" = None) -> dict[str, Any]:
    """Return a checkpoint with its LoRA adapters merged into the weights, so that it does not require a base model."""
    from lit_gpt_scratch.checkpoint.loading import STATE_PREFIX, merge_adapters, open_model
    from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY, CheckpointMetadata
    from lit_gpt_scratch.interop.tensor_stream import add_prefix

    contents = CheckpointMetadata.from_checkpoint(checkpoint)
    if contents.lora is None:
        return checkpoint
    merged = merge_adapters(open_model(checkpoint, path, trusted))
    own = replace(contents, lora=None, base=None, new_head=False)
    return {METADATA_KEY: asdict(own), "state_dict": add_prefix(merged.weights, STATE_PREFIX)}
