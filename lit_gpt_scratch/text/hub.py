"""Reader for datasets on the Hugging Face Hub, based on ``datasets``."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.document import TableRow
from lit_gpt_scratch.text.file_readers import Columns, iterate_dataset, quiet_datasets, require_columns

DATASET_NAME: Final = r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?"
"""Regular expression for ``owner/name`` with an optional ``@revision``."""
TIMEOUT_SECONDS: Final = 10.0
"""Timeout for the first response from the Hub."""


def read_dataset_rows(
    name: str, columns: Columns | None, config: str | None, split: str, streaming: bool
) -> Iterator[TableRow]:
    """Yield the rows of a Hub dataset; the id of the third row is ``owner/name:3``.

    Raises:
        UserError: The dataset, configuration, split or column does not exist, or the Hub cannot be reached.
    """
    import datasets

    path, revision = name.partition("@")[0], _resolve_revision(name)
    with _as_user_errors(name), quiet_datasets():
        dataset = datasets.load_dataset(path, config, split=split, streaming=streaming, revision=revision)
        if columns is not None and dataset.column_names is not None:  # avoids fetching and decoding other columns
            require_columns(columns, dataset.column_names, name)
            dataset = dataset.select_columns(list(columns.values()))
        for number, fields in enumerate(iterate_dataset(dataset, columns, name), 1):
            yield TableRow(f"{path}:{number}", f"{name}: row {number:,}", fields)


def has_hub_options(config: str | None, split: str, streaming: bool) -> bool:
    """Return whether any option that applies only to Hub datasets differs from its default."""
    return (config, split, streaming) != (None, "train", False)


def dataset_revision(name: str, config: str | None) -> str:
    """Return the commit hash of a Hub dataset, or a hash of its cached version if ``HF_HUB_OFFLINE`` is set."""
    import datasets

    if revision := _resolve_revision(name):
        return revision
    with _as_user_errors(name), quiet_datasets():
        builder: Any = datasets.load_dataset_builder(name.partition("@")[0], config)
        return str(builder.hash)


def _resolve_revision(name: str) -> str | None:
    """Return the commit hash of a dataset; None if ``HF_HUB_OFFLINE`` is set and the name includes no revision.

    The commit hash is requested before the dataset is loaded, because ``datasets`` retries for half a minute if there
    is no network connection.
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
        raise UserError(
            f"the Hub dataset {name} is gated; request access on its page, then run `hf auth login`"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(
            f"no such file or folder: {name}; the Hub has no dataset with this name that you can access "
            f"({' '.join(str(error).split())[:200]})"
        ) from error
    except Exception as error:  # exceptions of the HTTP library
        raise UserError(
            f"no such file or folder: {name}; the Hub, which may have this dataset, cannot be reached ({error}); "
            "set HF_HUB_OFFLINE=1 to use a cached dataset"
        ) from error


@contextmanager
def _as_user_errors(name: str) -> Iterator[None]:
    """Context manager that converts all exceptions from ``datasets`` to a one-line ``UserError``."""
    import datasets

    try:
        yield
    except (UserError, GeneratorExit):
        raise
    except Exception as error:
        offline = f"no such file or folder: {name}; " if datasets.config.HF_HUB_OFFLINE else ""
        message = " ".join(str(error).split())
        raise UserError(f"{offline}cannot load the Hub dataset {name}: {message}") from error
