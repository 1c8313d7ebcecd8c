"""``prepare``: clean and tokenize text before a run, or compare tokenizers."""

import logging
import signal
import sys
from typing import Final

from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from lit_gpt_scratch.cli.error_formatting import silence_libraries
from lit_gpt_scratch.cli.fit import FitCLI
from lit_gpt_scratch.cli.help import HelpPage
from lit_gpt_scratch.cli.show_packing import render_windows, supports_colors
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.data.packing import PACKING_POLICIES, PackingCost, compute_packing_cost
from lit_gpt_scratch.data.prepare_tokens import DEFAULT_VOCAB_SIZE
from lit_gpt_scratch.data.token_store import TokenStore
from lit_gpt_scratch.distributed.hardware_defaults import limit_threads
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.schema import read_json
from lit_gpt_scratch.terminal_output import write_exact
from lit_gpt_scratch.text.cleaning_report import StoredAudit, format_step_table, read_remarks
from lit_gpt_scratch.text.markdown import Markdown, format_markdown_table
from lit_gpt_scratch.text.tokenizer_comparison import compare_tokenizers
from lit_gpt_scratch.text.tokenizer_training import TOKENIZER_KINDS

log = logging.getLogger(__name__)

COMPARISON_BYTES: Final = 2**25
"""Maximum size in bytes of the held-out text on which tokenizers are compared; a larger text is sampled."""
HELP: Final = {
    "prepare": ["config", "compare", "verify", "show"],
    "data": [
        "data.source", "data.text_column", "data.tokenizer", "data.vocab_size", "data.special_tokens",
        "data.validation_share", "data.cleaning", "data.max_bytes", "data.processes", "data.block_size",
        "data.packing", "data.document_mask", "data.mixture", "data.store", "data.cache",
    ],
}  # fmt: skip
"""Flags on the first page of ``--help``, keyed by heading."""


class PrepareCLI(FitCLI):
    """Command-line interface that parses the flags and configs of ``fit``, and builds only the data module."""

    help_page = HelpPage(
        usage="python -m lit_gpt_scratch.prepare [--config FILE ...] [--flag value ...]",
        description="Clean and tokenize text before a run, and report every step. fit reuses the tokens if it is "
        "started with\nthe same flags and configs. Alternatively, train several types of tokenizers and compare them "
        "on held-out text.\nModel and trainer flags are accepted but ignored, so that configs for fit can be used.",
        first=HELP,
        without=("trainer", "model", "runs", "experiment", "ckpt_path", "preset", "budget", "scaling_law",
                 "tensor_parallel", "hsdp_groups", "cpu_offload", "collective_timeout", "guard", "force", "plan",
                 "devices_like", "checkpoint", "inspect", "seed_everything"),
    )  # fmt: skip

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the flags that ``fit`` does not have."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--compare",
            metavar="KINDS",
            type=str | None,
            help=f"Tokenizer types to train and compare, separated by commas: {','.join(TOKENIZER_KINDS)}.",
        )
        parser.add_argument("--verify", action="store_true", help="Read all tokens and verify their checksums.")
        parser.add_argument("--show", metavar="N", type=int, default=0, help="Print the first N training windows.")

    def instantiate_classes(self) -> None:
        """Build the data module, without a model or a trainer."""
        self.config_init = self.parser.instantiate(Namespace(data=self.config.data))  # type: ignore[no-untyped-call]  # jsonargparse's
        self.datamodule = self.config_init.data


def main(args: ArgsType = None) -> None:
    """Run the ``prepare`` command: tokenize the data and print a summary, verify tokens, or compare tokenizers."""
    silence_libraries()
    limit_threads()
    cli = PrepareCLI(args)
    if not isinstance(cli.datamodule, PackedText):
        raise UserError(
            f"--data: {type(cli.datamodule).__name__} cannot be prepared before a run; use --data PackedText"
        )
    config = cli.config
    if config.show < 0:
        raise UserError(f"argument --show is {config.show}; it must be 0 or more")
    if (config.compare is not None) + config.verify + (config.show > 0) > 1:
        raise UserError("--compare, --verify and --show are mutually exclusive; use only one of them")
    try:
        if config.compare is not None:
            _compare(cli.datamodule, config.compare.split(","))
        elif config.verify:
            _verify(cli.datamodule)
        else:
            _prepare(cli.datamodule, config.show)
    except KeyboardInterrupt:
        log.warning("stopped; repeat the command to resume with the unfinished shards")
        sys.exit(128 + signal.SIGINT)


def _prepare(data: PackedText, n_shown: int) -> None:
    data.prepare_data()
    for store in data.stores:
        report_file = store.folder / "audit.json"
        if report_file.exists():  # copies of a store may lack it
            try:
                audit = read_json(report_file, StoredAudit)
                print(f"{format_step_table(audit)}\n\ntokens      {audit['tokens']}")
            except ValueError as error:
                log.warning("%s is corrupted and is not shown (%s)", report_file, error)
        for remark in read_remarks(store.folder):
            print(f"remark      {remark}")
        for side, stream in (("training", store.train), ("validation", store.validation)):
            print(
                f"{side:<10}  {stream.n_documents:,} documents, {stream.n_bytes:,} bytes, {stream.n_tokens:,} tokens: "
                f"{stream.n_bytes / max(stream.n_tokens - stream.n_documents, 1):.2f} bytes per token"
            )
        kind = "" if data.mixture_folders else f"{data.preparation.tokenizer}, "
        print(f"tokenizer   {kind}{data.vocab_size:,} tokens")
        print(f"saved in    {store.folder}{', with audit.json and audit.md' if report_file.exists() else ''}\n")
    print(format_markdown_table(_compare_packing(data), "<>>>>>>"))
    if n_shown:
        data.setup("show")
        for paragraph in render_windows(data, n_shown, supports_colors()):
            write_exact(f"\n{paragraph}\n")


def _compare_packing(data: PackedText) -> list[list[str]]:
    """Return table rows with the ``PackingCost`` of each packing policy; an asterisk marks the selected policy."""
    rows = [[f"windows of {data.block_size}", *PackingCost.TABLE_HEADER]]
    for policy in PACKING_POLICIES:
        total = sum(
            (compute_packing_cost(store.train, data.block_size, policy) for store in data.stores), PackingCost()
        )
        rows.append([Markdown(f"{'*' if policy == data.packing else ' '} {policy}"), *total.table_row])
    return rows


def _verify(data: PackedText) -> None:
    # Verify an existing store without preparing it, even if its source has changed.
    for store in [TokenStore.open(data.store_folder)] if data.store_folder else data.stores:
        store.verify(all_files=True)
        tokens = store.train.n_tokens + store.validation.n_tokens
        print(f"{store.folder}: {len(store.shards)} shards, {tokens:,} tokens, all checksums match")


def _compare(data: PackedText, kinds: list[str]) -> None:
    unknown = [kind for kind in kinds if kind not in TOKENIZER_KINDS]
    if unknown:
        raise UserError(
            f"argument --compare: '{unknown[0]}' is not a tokenizer type; choose from {', '.join(TOKENIZER_KINDS)}"
        )
    if data.store_folder is not None:
        raise UserError("argument --data.store has no effect with --compare, which saves no tokens; omit it")
    recipe = data.preparation
    corpus = recipe.selection.prepare(data.cache / "corpora")
    training_texts = list(corpus.texts("train", recipe.tokenizer_training_share(corpus)))
    share = min(1.0, COMPARISON_BYTES / max(corpus.audit["split"]["validation"]["bytes"], 1))
    held_out = list(corpus.texts("validation", share))
    names: list[str] = []
    for row in compare_tokenizers(
        kinds, training_texts, held_out, recipe.vocab_size or DEFAULT_VOCAB_SIZE, recipe.special
    ):
        names = names or _print_header(row)
        print("  ".join(f"{row[name]:>{len(name)}}" for name in names), flush=True)


def _print_header(row: dict[str, str]) -> list[str]:
    print("  ".join(row))
    return list(row)
