"""Stream documents to and from Parquet files, keeping only a few megabytes in memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from lit_gpt_scratch.text.document import Document

ROW_GROUP_CHARACTERS: Final = 2**22
"""Minimum number of characters per row group except the last; a reader keeps one row group in memory at a time."""


class ParquetDocumentWriter:
    """Context manager that writes documents to a Parquet file with columns ``id`` and ``text``."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._schema = pa.schema([("id", pa.string()), ("text", pa.string())])
        self._writer: Any = pq.ParquetWriter(path, self._schema, compression="zstd", use_dictionary=False)
        self._pending: list[Document] = []
        self._n_characters = 0
        self.n_documents = 0
        self.n_bytes = 0

    def __enter__(self) -> "ParquetDocumentWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._write_row_group()
        self._writer.close()

    def add(self, document: Document, n_bytes: int) -> None:
        """Append a document; ``n_bytes`` is the size of its text in UTF-8."""
        self._pending.append(document)
        self._n_characters += len(document.text)
        self.n_documents += 1
        self.n_bytes += n_bytes
        if self._n_characters >= ROW_GROUP_CHARACTERS:
            self._write_row_group()

    def _write_row_group(self) -> None:
        import pyarrow as pa

        if self._pending:
            columns = [[document.id for document in self._pending], [document.text for document in self._pending]]
            self._writer.write_table(pa.table(columns, schema=self._schema))
            self._pending, self._n_characters = [], 0


def row_group_sizes(path: Path) -> list[int]:
    """Return the uncompressed size of each row group in bytes, which approximates its text size."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(path)
    return [metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)]


def read_parquet_documents(path: Path, row_groups: range | None = None) -> Iterator[Document]:
    """Yield the documents in a file written by ``ParquetDocumentWriter``.

    Args:
        path: Path to the Parquet file.
        row_groups: Indices of the row groups to read; if None, all row groups are read.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for index in row_groups if row_groups is not None else range(file.num_row_groups):
            table = file.read_row_group(index)
            for id_, text in zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True):
                yield Document(id_, text)
