"""``prepare``: text into tokens ahead of a run."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from lit_gpt_scratch.cli.messages import quieten, user_errors
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.data.token_store import learned_share
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.comparing import compare
from lit_gpt_scratch.text.sources import documents
from lit_gpt_scratch.text.split import split
from lit_gpt_scratch.text.training import KINDS


def main(args: Sequence[str] | None = None) -> None:
    """The door ``prepare``: what was made of the text, or how tokenizers compare, on standard output."""
    quieten()
    parser = ArgumentParser(
        prog="python -m lit_gpt_scratch.prepare",
        description="Make a text into tokens ahead of a run, which fit with the same flags then finds; or train "
        "tokenizers of several kinds on it, and compare them on what is held out.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_class_arguments(PackedText, "data")
    parser.add_argument(
        "--compare", metavar="KINDS", type=str | None, help=f"Tokenizers to compare, as in {','.join(KINDS)}."
    )
    with user_errors():
        given = parser.parse_args(args)
        data = parser.instantiate(given).data
        if given.compare is None:
            _prepare(data)
        else:
            _compare(data, given.compare.split(","))


def _prepare(data: PackedText) -> None:
    data.prepare_data()
    store = data.store
    for side, stream in (("training", store.train), ("validation", store.validation)):
        print(
            f"{side:<10}  {stream.n_documents:,} documents, {stream.n_bytes:,} bytes, {stream.n_tokens:,} tokens: "
            f"{stream.n_bytes / max(stream.n_tokens - stream.n_documents, 1):.2f} bytes each"
        )
    print(f"tokenizer   {data.recipe.tokenizer}, {data.vocab_size:,} tokens")
    print(f"kept in     {Path(store.train.path).parent}")


def _compare(data: PackedText, kinds: list[str]) -> None:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UserError(f"argument --compare: there is no kind '{unknown[0]}'; there are {', '.join(KINDS)}")
    recipe = data.recipe
    corpus = split(documents(recipe.source), recipe.validation_share)
    learned_from = list(recipe.texts(corpus, "train", learned_share(corpus)))
    held_out = list(recipe.texts(corpus, "validation"))
    names: list[str] = []
    for row in compare(kinds, learned_from, held_out, recipe.vocab_size, recipe.special):
        names = names or _head(row)
        print("  ".join(f"{row[name]:>{len(name)}}" for name in names), flush=True)


def _head(row: dict[str, str]) -> list[str]:
    print("  ".join(row))
    return list(row)
