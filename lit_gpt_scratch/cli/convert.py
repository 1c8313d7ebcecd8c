"""``convert``: a checkpoint into a form for others."""

from collections.abc import Sequence
from pathlib import Path

from lit_gpt_scratch.cli.door import Flags
from lit_gpt_scratch.errors import UserError


def main(args: Sequence[str] | None = None) -> None:
    """Write the model of a checkpoint as one safetensors file."""
    flags = Flags(
        prog="python -m lit_gpt_scratch.convert",
        description="Write the weights of a checkpoint, its shape and its tokenizer as one .safetensors file, which "
        "generate and evaluate read as they read a checkpoint, and in which nothing can run.",
    )
    flags.add_argument("to", choices=["to-safetensors"], help="the form")
    flags.add_argument("checkpoint", metavar="CKPT", help="a checkpoint file or a run folder")
    flags.add_argument("file", metavar="FILE", type=Path, help="what to write; its name ends with .safetensors")
    given = flags.parse_args(args)

    from lit_gpt_scratch.checkpoint.loading import NETWORK, load_checkpoint
    from lit_gpt_scratch.checkpoint.run_folder import find_checkpoint
    from lit_gpt_scratch.checkpoint.sharing import SUFFIX, share

    if given.file.suffix != SUFFIX:
        raise UserError(f"argument FILE: {given.file} does not end with {SUFFIX}")
    share(load_checkpoint(find_checkpoint(given.checkpoint, Path(), None)), NETWORK, given.file)
