"""Datasets of the Hugging Face Hub, read by ``datasets``."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.document import TableRow
from lit_gpt_scratch.text.row_readers import Columns, require_columns
from lit_gpt_scratch.text.tables import iterate_dataset, quiet_datasets

DATASET_NAME: Final = r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?"
"""``owner/name``, and a revision where one is to be held on to."""
TIMEOUT_SECONDS: Final = 10.0
"""Seconds to wait for a first answer."""


def rows(name: str, columns: Columns | None, config: str | None, split: str, streaming: bool) -> Iterator[TableRow]:
    """The rows of a dataset; ``owner/name:3`` is the third.

    Raises:
        UserError: There is no such dataset, configuration, split or column, or the Hub cannot be reached.
    """
    import datasets

    path, revision = name.partition("@")[0], _revision(name)
    with _said(name), quiet_datasets():
        found = datasets.load_dataset(path, config, split=split, streaming=streaming, revision=revision)
        if columns is not None and found.column_names is not None:  # others need not be fetched, nor understood
            require_columns(columns, found.column_names, name)
            found = found.select_columns(list(columns.values()))
        for number, fields in enumerate(iterate_dataset(found, columns, name), 1):
            yield TableRow(f"{path}:{number}", f"{name}: row {number:,}", fields)


def asked(config: str | None, split: str, streaming: bool) -> bool:
    """Whether anything is asked for that only a dataset of the Hub has."""
    return (config, split, streaming) != (None, "train", False)


def stamp(name: str, config: str | None) -> str:
    """The commit that the Hub has now, or that was fetched before if ``HF_HUB_OFFLINE`` is set."""
    import datasets

    if revision := _revision(name):
        return revision
    with _said(name), quiet_datasets():
        builder: Any = datasets.load_dataset_builder(name.partition("@")[0], config)
        return str(builder.hash)


def _revision(name: str) -> str | None:
    """The commit that a name means; None where the Hub is not to be asked.

    Asked for before anything is loaded, because ``datasets`` tries for half a minute where there is no network.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    path, _, revision = name.partition("@")
    if datasets.config.HF_HUB_OFFLINE:
        return revision or None
    try:
        return HfApi().dataset_info(path, revision=revision or None, timeout=TIMEOUT_SECONDS).sha
    except GatedRepoError as error:
        raise UserError(f"{name} is gated: ask for access on its page, then `hf auth login`") from error
    except HfHubHTTPError as error:
        raise UserError(
            f"no such file or folder: {name}; nor has the Hub a dataset of that name that you may read "
            f"({' '.join(str(error).split())[:200]})"
        ) from error
    except Exception as error:  # the network library's own kinds
        raise UserError(
            f"no such file or folder: {name}; and the Hub, which may have a dataset of that name, cannot be reached "
            f"({error}); with HF_HUB_OFFLINE=1 what was fetched before is used"
        ) from error


@contextmanager
def _said(name: str) -> Iterator[None]:
    """What goes wrong in ``datasets``, in one line: it raises a kind of its own for most of what can."""
    import datasets

    try:
        yield
    except (UserError, GeneratorExit):
        raise
    except Exception as error:
        offline = "no such file or folder: " if datasets.config.HF_HUB_OFFLINE else ""
        said = " ".join(str(error).split())
        raise UserError(f"{offline}{name} as a dataset of the Hub: {said}") from error
