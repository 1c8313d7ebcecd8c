"""``prepare``: text into tokens ahead of a run."""

import json
from typing import Final

from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from lit_gpt_scratch.cli.fit import FitCLI
from lit_gpt_scratch.cli.messages import quieten
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.data.recipe import VOCABULARY
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.hardware.defaults import use_allowed_cores
from lit_gpt_scratch.text.audit import table
from lit_gpt_scratch.text.comparing import compare
from lit_gpt_scratch.text.training import KINDS

COMPARED_ON: Final = 2**25
"""Bytes of held-out text that tokenizers are measured on; of more, a share."""


class PrepareCLI(FitCLI):
    """Fit's flags and configs, of which only the data is built."""

    description = (
        "Clean a text and make it into tokens ahead of a run, with an audit: with the same flags, and the same "
        "configs, fit finds them. Or train tokenizers of several kinds on it, and compare them on what is held out. "
        "All flags of the data: --data.help PackedText."
    )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what fit has not."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--compare", metavar="KINDS", type=str | None, help=f"Tokenizers to compare, as in {','.join(KINDS)}."
        )

    def instantiate_classes(self) -> None:
        """Build the data alone."""
        self.config_init = self.parser.instantiate(Namespace(data=self.config.data))  # type: ignore[no-untyped-call]  # the library's
        self.datamodule = self.config_init.data


def main(args: ArgsType = None) -> None:
    """The door ``prepare``: what was made of the text, or how tokenizers compare, on standard output."""
    quieten()
    use_allowed_cores()
    cli = PrepareCLI(args)
    if not isinstance(cli.datamodule, PackedText):
        raise UserError(f"--data: {type(cli.datamodule).__name__} has no tokens to prepare ahead; PackedText has")
    if cli.config.compare is None:
        _prepare(cli.datamodule)
    else:
        _compare(cli.datamodule, cli.config.compare.split(","))


def _prepare(data: PackedText) -> None:
    data.prepare_data()
    store = data.store
    folder = store.folder
    audit = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    print(f"{table(audit)}\n\ntokens      {audit['tokens']}")
    for side, stream in (("training", store.train), ("validation", store.validation)):
        print(
            f"{side:<10}  {stream.n_documents:,} documents, {stream.n_bytes:,} bytes, {stream.n_tokens:,} tokens: "
            f"{stream.n_bytes / max(stream.n_tokens - stream.n_documents, 1):.2f} bytes each"
        )
    print(f"tokenizer   {data.recipe.tokenizer}, {data.vocab_size:,} tokens")
    print(f"kept in     {folder}, with audit.json and audit.md")


def _compare(data: PackedText, kinds: list[str]) -> None:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UserError(f"argument --compare: there is no kind '{unknown[0]}'; there are {', '.join(KINDS)}")
    if data.kept_in is not None:
        raise UserError("argument --compare: no tokens are kept, so that --data.store means nothing; leave it out")
    recipe = data.recipe
    corpus = recipe.selection.prepare(data.cache / "corpora")
    learned_from = list(corpus.texts("train", recipe.learned_from(corpus)))
    share = min(1.0, COMPARED_ON / max(corpus.audit["split"]["validation"]["bytes"], 1))
    held_out = list(corpus.texts("validation", share))
    names: list[str] = []
    for row in compare(kinds, learned_from, held_out, recipe.vocab_size or VOCABULARY, recipe.special):
        names = names or _head(row)
        print("  ".join(f"{row[name]:>{len(name)}}" for name in names), flush=True)


def _head(row: dict[str, str]) -> list[str]:
    print("  ".join(row))
    return list(row)
