"""Limit the memory required to read Parquet and Arrow files, before values are decompressed or converted.

A small file can expand to a large amount of text, because buffers are compressed and values may be stored once and
repeated by reference (dictionaries, shared prefixes, views, lists of constants). Sizes are therefore checked before
values are expanded.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.document import MAX_DOCUMENT_BYTES

BATCH_ROWS: Final = 256
"""Maximum number of rows to convert at a time."""
REFERENCE_ROWS: Final = 8192
"""Number of rows to read at a time if strings are read as references to a dictionary."""
BATCH_BYTES: Final = 2**26
"""Maximum number of bytes to convert at a time, and to read at a time from a column that may repeat values."""
MAX_EXPANSION: Final = 64
"""Maximum ratio of decompressed to compressed size, for data that expands to more than ``ALWAYS_EXPANDED`` bytes."""
ALWAYS_EXPANDED: Final = 2**27
"""Decompressed size in bytes that is allowed regardless of the compressed size."""
MAX_REPEATED: Final = 2**30
"""Maximum size in bytes of a list column in a row group, assuming that every string is as long as the longest one."""
VALUE_BYTES: Final = 8
"""Size in bytes assumed for each value, excluding the characters of strings and the elements of lists."""
DICTIONARY_BATCH, RECORD_BATCH = 2, 3
"""Arrow message types that contain data."""


def require_moderate_expansion(where: str, stored: int, expanded: int) -> None:
    """Check that data does not expand too much when it is decompressed.

    Args:
        where: Location of the data, used in error messages.
        stored: Size of the compressed data in bytes.
        expanded: Size of the decompressed data in bytes.

    Raises:
        UserError: The decompressed data is too large.
    """
    if expanded > max(ALWAYS_EXPANDED, MAX_EXPANSION * stored):
        raise UserError(
            f"{where} expands from {stored:,} to {expanded:,} bytes; write the file without compression, or split the "
            "values"
        )


def plan_parquet_batches(file: Any, names: set[str], path: Path) -> tuple[int, list[str]]:
    """Plan how to read the columns of a Parquet file, so that repeated values do not exhaust the memory.

    Args:
        file: ``pyarrow.parquet.ParquetFile``.
        names: Names of the columns to read.
        path: Path to the file.

    Returns:
        The number of rows per batch, and the schema paths of the list columns to read as references to a dictionary.

    Raises:
        UserError: A row group requires too much memory, or its values are too large on average.
    """
    rows, references = BATCH_ROWS, set()
    for index in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(index)
        for position, column in enumerate(map(group.column, range(group.num_columns))):
            if (name := column.path_in_schema.partition(".")[0]) not in names:
                continue
            where = f"{path}: '{name}' in row group {index + 1}"
            if column.total_uncompressed_size > MAX_DOCUMENT_BYTES * max(group.num_rows, 1):
                raise UserError(
                    f"{path}: '{name}' has more than {MAX_DOCUMENT_BYTES >> 20} MB per row in row group {index + 1}; "
                    "split the texts"
                )
            in_list = file.schema.column(position).max_repetition_level > 0
            expanded = max(column.total_uncompressed_size, column.num_values if in_list else 0)
            require_moderate_expansion(where, column.total_compressed_size, expanded)
            if not column.physical_type.endswith("BYTE_ARRAY"):
                continue
            longest = _longest_repeated_value(column, path)
            if not in_list:
                rows = min(rows, max(1, BATCH_BYTES // max(longest, 1)))
            elif longest * column.num_values > MAX_REPEATED:
                if "DELTA_BYTE_ARRAY" in column.encodings or column.physical_type != "BYTE_ARRAY":
                    raise UserError(f"{where} may expand to more than 1 GB; write the file with plain encoding")
                references.add(column.path_in_schema)
    return REFERENCE_ROWS if references and rows == BATCH_ROWS else rows, sorted(references)


def _longest_repeated_value(column: Any, path: Path) -> int:
    """Return an upper bound on the size of any value that a column chunk stores once and repeats, or 0 if none is."""
    if "DELTA_BYTE_ARRAY" in column.encodings:  # the previous value may be a prefix of a value
        return int(column.total_uncompressed_size)
    if column.dictionary_page_offset is None:
        return 0
    with path.open("rb") as file:
        file.seek(column.dictionary_page_offset)
        header = file.read(16)
    # Thrift compact protocol: page type, uncompressed size and compressed size, each a field header byte and a varint.
    sizes, position = [], 0
    for _ in range(3):
        value = shift = 0
        if header[position] != 0x15:
            raise ValueError("the header of a dictionary page is invalid")
        while True:
            position += 1
            value |= (header[position] & 0x7F) << shift
            shift += 7
            if header[position] < 0x80:
                break
        position += 1
        sizes.append(value >> 1)
    require_moderate_expansion(f"{path}: a dictionary of '{column.path_in_schema}'", sizes[2], sizes[1])
    return sizes[1]


def limit_arrow_buffers(path: Path, source: Any) -> None:
    """Check the declared sizes of the compressed buffers in an Arrow stream, without decompressing them.

    Args:
        path: Path to the file, used in error messages.
        source: Memory map of the file, positioned at the start of the stream.

    Raises:
        UserError: A record batch would expand too much.
    """
    import pyarrow as pa

    for message in pa.ipc.MessageReader.open_stream(source):
        expanded = sum(_decompressed_sizes(message.metadata.to_pybytes(), message.body))
        require_moderate_expansion(f"{path}: a record batch", message.body.size if message.body else 0, expanded)


def _decompressed_sizes(metadata: bytes, body: Any) -> Iterator[int]:
    """Yield the declared decompressed size of each buffer in a compressed message, using its FlatBuffers metadata."""
    message = _Table(metadata, _read_uint(metadata, 0))
    kind = message.field(1)
    if not kind or metadata[kind] not in (DICTIONARY_BATCH, RECORD_BATCH):
        return
    batch = message.table(2)
    if metadata[kind] == DICTIONARY_BATCH:
        batch = batch.table(1)
    if not batch.field(3) and b"ARROW:experimental_compression" not in metadata:
        return
    buffers = batch.field(2)
    buffers += _read_uint(metadata, buffers)
    for index in range(_read_uint(metadata, buffers)):
        offset, length = struct.unpack_from("<qq", metadata, buffers + 4 + 16 * index)
        if length >= 8:
            yield max(length, *struct.unpack("<q", body.slice(offset, 8)))  # -1 if the buffer is not compressed


class _Table:
    """Table in FlatBuffers metadata; ``pyarrow`` must have verified the metadata."""

    def __init__(self, data: bytes, position: int) -> None:
        self.data, self.position = data, position
        self.vtable = position - struct.unpack_from("<i", data, position)[0]

    def field(self, index: int) -> int:
        """Return the position of a field, or 0 if it is absent."""
        slot = 4 + 2 * index
        if slot >= struct.unpack_from("<H", self.data, self.vtable)[0]:
            return 0
        offset: int = struct.unpack_from("<H", self.data, self.vtable + slot)[0]
        return self.position + offset if offset else 0

    def table(self, index: int) -> "_Table":
        position = self.field(index)
        return _Table(self.data, position + _read_uint(self.data, position))


def _read_uint(data: bytes, position: int) -> int:
    value: int = struct.unpack_from("<I", data, position)[0]
    return value


def split_batch(batch: Any, names: set[str], path: Path, rows_before: int) -> Iterator[Any]:
    """Yield slices of a record batch that have at most ``BATCH_ROWS`` rows and, if possible, ``BATCH_BYTES`` bytes.

    Args:
        batch: Record batch, in which several rows may refer to the same value.
        names: Names of the columns to convert.
        path: Path to the file.
        rows_before: Number of rows in the file that precede the batch.

    Raises:
        UserError: A row is too large, or a column has an unsupported type.
    """
    sizes = np.zeros(batch.num_rows)
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        if name in names:
            sizes += value_sizes(array)
    if (too_large := np.flatnonzero(sizes > MAX_DOCUMENT_BYTES)).size:
        raise UserError(
            f"{path}: row {rows_before + int(too_large[0]) + 1:,} is longer than {MAX_DOCUMENT_BYTES >> 20} MB; split "
            "the text"
        )
    ends, start = np.cumsum(sizes), 0
    while start < batch.num_rows:
        limit = (ends[start - 1] if start else 0) + BATCH_BYTES
        stop = min(max(int(ends.searchsorted(limit, "right")), start + 1), start + BATCH_ROWS)
        yield batch.slice(start, stop - start)
        start = stop


def value_sizes(array: Any) -> Any:
    """Return the approximate size in bytes of each value in an Arrow array after conversion to Python.

    Values in dictionaries, lists and views are counted each time the array refers to them.

    Returns:
        A float if all values have the same size; otherwise, an array of n floats.

    Raises:
        UserError: The array type is not supported, e.g. a union.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return value_sizes(array.storage)
    if pa.types.is_dictionary(kind):
        inner = value_sizes(array.dictionary)
        return inner if np.ndim(inner) == 0 else np.append(inner, 0.0)[np.asarray(array.indices.fill_null(0))]
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):  # views of 16 bytes begin with the length
        views = np.frombuffer(array.buffers()[1] or b"", np.int32)[::4]
        return VALUE_BYTES + views[array.offset : array.offset + len(array)].astype(float)
    if pa.types.is_fixed_size_binary(kind):
        return float(VALUE_BYTES + kind.byte_width)
    if kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        return VALUE_BYTES + np.asarray(pc.binary_length(array).fill_null(0), dtype=float)
    if pa.types.is_struct(kind):
        return sum(map(value_sizes, array.flatten()), float(VALUE_BYTES))
    if pa.types.is_fixed_size_list(kind):
        inner = value_sizes(array.values)
        if np.ndim(inner) == 0 or not kind.list_size:
            return VALUE_BYTES + kind.list_size * float(np.max(inner, initial=0.0))
        return VALUE_BYTES + inner.reshape(-1, kind.list_size).sum(1)[array.offset : array.offset + len(array)]
    is_view = pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)
    if is_view or pa.types.is_map(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        children = (array.keys, array.items) if pa.types.is_map(kind) else (array.values,)
        inner = sum(map(value_sizes, children))
        offsets = np.asarray(array.offsets)
        starts = offsets[: len(array)]
        ends = starts + np.asarray(array.sizes) if is_view else offsets[1:]
        if np.ndim(inner) == 0:
            return VALUE_BYTES + (ends - starts) * inner
        before = np.append(0.0, np.cumsum(inner))
        return VALUE_BYTES + before[ends] - before[starts]
    if pa.types.is_primitive(kind) or pa.types.is_null(kind) or pa.types.is_decimal(kind):
        return float(VALUE_BYTES)
    raise UserError(f"a column has the unsupported type {str(kind)[:60]}; convert the column or remove it")
