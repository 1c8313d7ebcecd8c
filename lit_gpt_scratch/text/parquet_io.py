"""Documents in a Parquet file, written and read a few megabytes at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from lit_gpt_scratch.text.document import Document

ROW_GROUP_CHARACTERS: Final = 2**22
"""Characters of text in a row group, which is what a reader holds in memory."""


class ParquetDocumentWriter:
    """A Parquet file in the making, with columns ``id`` and ``text``. A context: it is a file when that ends."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._schema = pa.schema([("id", pa.string()), ("text", pa.string())])
        self._writer: Any = pq.ParquetWriter(path, self._schema, compression="zstd", use_dictionary=False)
        self._pending: list[Document] = []
        self._size = 0
        self.n_documents = 0
        self.n_bytes = 0

    def __enter__(self) -> "ParquetDocumentWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._write()
        self._writer.close()

    def add(self, document: Document, n_bytes: int) -> None:
        """The next document, and its bytes in UTF-8."""
        self._pending.append(document)
        self._size += len(document.text)
        self.n_documents += 1
        self.n_bytes += n_bytes
        if self._size >= ROW_GROUP_CHARACTERS:
            self._write()

    def _write(self) -> None:
        import pyarrow as pa

        if self._pending:
            columns = [[document.id for document in self._pending], [document.text for document in self._pending]]
            self._writer.write_table(pa.table(columns, schema=self._schema))
            self._pending, self._size = [], 0


def row_group_sizes(path: Path) -> list[int]:
    """Bytes of each row group of a file that a ``ParquetDocumentWriter`` made, about those of its text."""
    import pyarrow.parquet as pq

    about = pq.read_metadata(path)
    return [about.row_group(group).total_byte_size for group in range(about.num_row_groups)]


def read_parquet_documents(path: Path, some: range | None = None) -> Iterator[Document]:
    """The documents of a file that a ``ParquetDocumentWriter`` made, or of some of its row groups."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for group in some if some is not None else range(file.num_row_groups):
            table = file.read_row_group(group)
            for id_, text in zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True):
                yield Document(id_, text)
