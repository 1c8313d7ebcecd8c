"""Reader for datasets on the Hugging Face Hub, based on ``datasets``."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.arrow_limits import BATCH_ROWS
from lit_gpt_scratch.text.document import TableRow
from lit_gpt_scratch.text.file_readers import (
    MAX_REASON_CHARACTERS,
    Columns,
    Fields,
    convert_class_labels,
    require_columns,
    shorten,
)

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
    with _as_user_errors(name), _quiet_datasets():
        dataset = datasets.load_dataset(path, config, split=split, streaming=streaming, revision=revision)
        if columns is not None and dataset.column_names is not None:  # avoids fetching and decoding other columns
            require_columns(columns, dataset.column_names, name)
            dataset = dataset.select_columns(list(columns.values()))
        for number, fields in enumerate(_iterate_dataset(dataset, columns, name), 1):
            yield TableRow(f"{path}:{number}", f"{name}: row {number:,}", fields)


def has_hub_options(config: str | None, split: str, streaming: bool) -> bool:
    """Return whether any option that applies only to Hub datasets differs from its default."""
    return (config, split, streaming) != (None, "train", False)


def dataset_revision(name: str, config: str | None) -> str:
    """Return the commit hash of a Hub dataset, or a hash of its cached version if ``HF_HUB_OFFLINE`` is set."""
    import datasets

    if revision := _resolve_revision(name):
        return revision
    with _as_user_errors(name), _quiet_datasets():
        builder: Any = datasets.load_dataset_builder(name.partition("@")[0], config)
        return str(builder.hash)


def _resolve_revision(name: str) -> str | None:
    """Return the commit hash of a dataset, or None if ``HF_HUB_OFFLINE`` is set and the name includes no revision.

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
            f"({_one_line(error)})"
        ) from error
    except Exception as error:  # exceptions of the HTTP library
        raise UserError(
            f"no such file or folder: {name}; the Hub, which may have this dataset, cannot be reached "
            f"({_one_line(error)}); "
            "set HF_HUB_OFFLINE=1 to use a cached dataset"
        ) from error


def _iterate_dataset(dataset: Any, columns: Columns | None, where: str) -> Iterator[Fields]:
    """Yield the rows of a ``datasets`` dataset, converting class labels to ``ClassIndex``.

    Raises:
        UserError: A requested column is missing.
    """
    from datasets import ClassLabel

    classes = {
        name: feature.names for name, feature in (dataset.features or {}).items() if isinstance(feature, ClassLabel)
    }
    for batch in dataset.iter(BATCH_ROWS):
        require_columns(columns, batch, where)
        for name in classes.keys() & batch.keys():
            batch[name] = convert_class_labels(batch[name], classes[name])
        names = list(batch if columns is None else columns.values())
        for values in zip(*(batch[name] for name in names), strict=True):
            yield dict(zip(names, values, strict=True))


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Context manager that disables the progress bars, log messages and Hub download counts of ``datasets``."""
    import datasets

    level, progress_bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    counts, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, False
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if progress_bars:
            datasets.enable_progress_bars()


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
        raise UserError(f"{offline}cannot load the Hub dataset {name}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return shorten(" ".join(str(error).split()), MAX_REASON_CHARACTERS)
