"""File readers: the same rows from every format, bounded memory, and one line for what cannot be read."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import arrow_limits, file_readers
from lit_gpt_scratch.text.sources import DocumentSource
from tests.mutations import DEPTH, fuzz, mutate_bytes, mutate_json, nested, nested_json

ROWS: list[dict[str, Any]] = [{"text": f"text {n}", "label": "ab"[n % 2], "more": str(n)} for n in range(600)]
COLUMNS = {"text_column": "text", "label_column": "label"}


def _separated(separator: str) -> bytes:
    return "".join(separator.join(line) + "\n" for line in [list(ROWS[0]), *(row.values() for row in ROWS)]).encode()


def _parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), buffer)
    return buffer.getvalue()


def _arrow() -> bytes:
    buffer = io.BytesIO()
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


FORMATS: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "a.jsonl.gz": lambda: gzip.compress(FORMATS["a.jsonl"]()),
    "a.json": lambda: json.dumps(ROWS).encode(),
    "a.csv": lambda: _separated(","),
    "a.tsv": lambda: _separated("\t"),
    "a.parquet": _parquet,
    "a.arrow": _arrow,
}


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_every_format(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMATS[name]())
    found = list(DocumentSource(str(tmp_path / name)).rows())
    assert [row.fields for row in found] == ROWS
    assert [row.id for row in found] == [f"{name}:{n}" for n in range(1, 601)]
    places = {"a.csv": "line 4", "a.tsv": "line 4", "a.jsonl": "line 3", "a.jsonl.gz": "line 3"}
    assert found[2].where == f"{tmp_path / name}: {places.get(name, 'row 3')}"
    some = list(DocumentSource(str(tmp_path / name)).rows(COLUMNS))
    assert [row.fields for row in some] == [{"text": row["text"], "label": row["label"]} for row in ROWS]
    with pytest.raises(UserError, match=r"no column 'y'; set --data.label_column .*\(text, label, more\)"):
        list(DocumentSource(str(tmp_path / name)).rows({"text_column": "text", "label_column": "y"}))


def test_rows_of_a_folder_come_from_its_tables(tmp_path: Path) -> None:
    for name in ("a.tsv", "b.jsonl"):
        (tmp_path / name).write_bytes(FORMATS[f"a.{name[2:]}"]())
    (tmp_path / "README.md").write_text("What this is.", encoding="utf-8")
    assert [row.id for row in DocumentSource(str(tmp_path)).rows()][::599] == ["a.tsv:1", "a.tsv:600", "b.jsonl:599"]
    with pytest.raises(UserError, match=r"README.md is not a table; use a Hub dataset or a file of type \.jsonl"):
        list(DocumentSource(str(tmp_path / "README.md")).rows())


def test_date_like_text_stays_text_and_nested_fields_are_read(tmp_path: Path) -> None:
    rows = [{"text": "2020-01-01T00:00:00", "messages": [{"role": "user", "content": f"{n}"}]} for n in range(3)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [row.fields for row in DocumentSource(str(path)).rows()] == rows
    path.write_text(json.dumps({"messages": [{"content": "a\ud800"}]}), encoding="utf-8")
    with pytest.raises(UserError, match=r"a.jsonl: line 1: 'messages' contains an unpaired surrogate"):
        list(DocumentSource(str(path)).rows())


def read(path: Path, columns: dict[str, str] | None = None) -> list[dict[str, Any]]:
    return [row.fields for row in DocumentSource(str(path)).rows(columns)]


@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from("abc"), st.text(st.characters(codec="utf-8"), max_size=9)), max_size=9
    ),
    indent=st.sampled_from([None, 0, 2]),
    as_list=st.booleans(),
    before=st.sampled_from(["", "\ufeff", "\n\n", " \r\n\t"]),
    between=st.sampled_from(["\n", "\r\n\n", " "]),
    chunk=st.integers(1, 40),
    suffix=st.sampled_from([".json", ".json.gz"]),
)
@settings(max_examples=100)
def test_json_in_any_layout(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, str]],
    indent: int | None,
    as_list: bool,
    before: str,
    between: str,
    chunk: int,
    suffix: str,
) -> None:
    """A list of rows or one row after another, over one or many lines, in parts of any size."""
    path = tmp_path_factory.mktemp("rows") / f"a{suffix}"
    text = json.dumps(rows, indent=indent) if as_list else between.join(json.dumps(row, indent=indent) for row in rows)
    data = (before + text + between).encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_readers, "JSON_CHUNK", chunk)
        assert read(path) == rows


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
def test_list_behind_an_empty_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(f"\n \n{json.dumps(ROWS[:3], indent=1)}\n", encoding="utf-8")
    assert read(tmp_path / name) == ROWS[:3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text":\n "a"}\n{"text"\n"b"}', r"a\.json is not valid JSON \(line 4\): Expecting ':' delimiter"),
        ('[{"text": "a"},\n{"text": "b"}', r"a\.json is not valid JSON \(line 2\): the list has no closing bracket"),
        ('[{"text": "a"}\n{"text": "b"}]', r"a\.json is not valid JSON \(line 2\): a comma is missing"),
        ('[{"text": "a"},\n]', r"a\.json is not valid JSON \(line 2\): Expecting value"),
        ('[{"text": "a"}]\n\n[]', r"a\.json is not valid JSON \(line 3\): text follows the list"),
        ('{"text": "a"}\n\n5', r"a\.json: line 3 must be a JSON object, but its type is int"),
        (f'[{{"text": "a"}}, {{"text": {"9" * 9999}}}]', r"a\.json is not valid JSON \(line \d\): Exceeds the limit"),
    ],
)
def test_json_errors_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "first", "text": "second"}\n'),
        ("a.json", '[{"text": "a"},\n{"text": "first", "text": "second"}]'),
        ("a.jsonl", '{"text": "a"}\n{"text": "a", "more": [{"x": 1, "x": 1}]}\n'),
    ],
)
def test_repeated_keys_are_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"not valid JSON.*: an object has a duplicate key"):
        read(tmp_path / name, {"text_column": "text"})


MEGABYTE = 2**20
BOMBS: dict[str, tuple[bytes, bytes, str]] = {
    "a.jsonl": (b'{"text": "', b"x", r"a\.jsonl.*: line 1 is longer than"),
    "a.json": (b'[{"text": "', b"x", r"a\.json.* is not valid JSON.*: a row is longer than"),
    "b.json": (b'{"text": [', b"[],", r"b\.json.* is not valid JSON.*: a row is longer than"),
    "a.csv": (b'text\n"', b"x", r"a\.csv.*: line 2 is longer than"),
    "b.csv": (b'text\n"', b"x\n", r"b\.csv.*: the row that begins on line 2 is longer than"),
    "c.csv": (b'text\n"', b'","\n', r"c\.csv.*: the row that begins on line 2 is longer than"),
    "a.tsv": (b"text\n", b"x", r"a\.tsv.*: line 2 is longer than"),
}


@pytest.mark.parametrize(
    ("name", "suffix", "compress"),
    [
        *((name, "gz", gzip.compress) for name in BOMBS),
        ("a.jsonl", "bz2", bz2.compress),
        ("a.jsonl", "xz", partial(lzma.compress, preset=0)),  # with a small dictionary
    ],
)
def test_size_of_a_row_is_limited_while_it_is_decompressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    begin, repeated, message = BOMBS[name]
    monkeypatch.setattr(file_readers, "MAX_DOCUMENT_BYTES", MEGABYTE // 16)
    path = tmp_path / f"{name}.{suffix}"
    path.write_bytes(compress(begin + repeated * (8 * MEGABYTE // len(repeated))))
    tracemalloc.start()
    with pytest.raises(UserError, match=message):
        read(path, {"text_column": "text"})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * MEGABYTE


def test_long_text_in_a_parquet_file_is_not_decompressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_limits, "MAX_DOCUMENT_BYTES", MEGABYTE)
    table = pa.table({"text": ["x" * 8 * MEGABYTE, "y"], "label": ["z" * 8 * MEGABYTE, "b"]})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(
        UserError, match=r"a\.parquet: 'text' has more than 1 MB per row in row group 1; split the texts"
    ):
        read(tmp_path / "a.parquet", {"text_column": "text"})
    pq.write_table(table.set_column(0, "text", [["a", "b"]]), tmp_path / "a.parquet", use_dictionary=False)
    assert read(tmp_path / "a.parquet", {"text_column": "text"}) == [{"text": "a"}, {"text": "b"}]


def _repeated_value(form: str) -> Any:
    """128 rows that refer to one string of 2 MB."""
    value, rows = "x" * 2 * MEGABYTE, np.zeros(128, np.int32)
    dictionary = pa.DictionaryArray.from_arrays(rows, [value])
    if form == "list":
        return pa.ListArray.from_arrays(np.arange(129, dtype=np.int32), dictionary)
    if form == "list view":
        return pa.ListViewArray.from_arrays(rows, rows + 1, pa.array([value]))
    if form == "view":
        view = np.frombuffer(pa.array([value], pa.string_view()).buffers()[1], np.uint8)
        buffers = [None, pa.py_buffer(np.tile(view[:16], 128)), pa.py_buffer(value.encode())]
        return pa.Array.from_buffers(pa.string_view(), 128, buffers)
    return dictionary if form == "dictionary" else dictionary.dictionary_decode()


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.parquet", "dictionary"),
        ("a.parquet", "prefix"),
        ("a.arrow", "dictionary"),
        ("a.arrow", "list"),
        ("a.arrow", "view"),
        ("a.arrow", "list view"),
    ],
)
def test_repeated_long_values_do_not_fill_the_memory(tmp_path: Path, name: str, form: str) -> None:
    """A file of some bytes with one value of 2 MB in 128 rows, which are 256 MB together."""
    table, path = pa.table({"text": _repeated_value(form)}), tmp_path / name
    if name == "a.parquet":
        encoding = {"text": "DELTA_BYTE_ARRAY"} if form == "prefix" else None
        pq.write_table(table, path, compression="zstd", use_dictionary=encoding is None, column_encoding=encoding)
    else:
        with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table)
    assert path.stat().st_size < MEGABYTE // 8
    lengths, rows = [], iter(DocumentSource(str(path)).rows())
    tracemalloc.start()
    for row in rows:
        [text] = row.fields["text"] if "list" in form else [row.fields["text"]]
        lengths.append(len(text))
        row.fields.clear()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert lengths == [2 * MEGABYTE] * 128
    assert peak < 2 * arrow_limits.BATCH_BYTES


def test_repeated_long_values_in_lists_of_a_parquet_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row whose list contains 40 times the same megabyte."""
    monkeypatch.setattr(arrow_limits, "MAX_REPEATED", 2**25)
    values = pa.DictionaryArray.from_arrays([0] * 40, ["x" * MEGABYTE])
    table = pa.table({"text": pa.ListArray.from_arrays([0, 40], values)})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: row 1 is longer than 32 MB; split the text"):
        read(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [["a", "b"], None, ["c"]] * 700}), tmp_path / "a.parquet")
    assert [len(row["text"] or ()) for row in read(tmp_path / "a.parquet")] == [2, 0, 1] * 700


@pytest.mark.parametrize("container", ["stream", "file"])
@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_compressed_arrow_buffers_are_measured_before_they_are_decompressed(
    tmp_path: Path, container: str, codec: str
) -> None:
    new = pa.ipc.new_stream if container == "stream" else pa.ipc.new_file
    for text, dictionary in (("x" * 200 * MEGABYTE, False), ("x" * 200 * MEGABYTE, True), ("x" * MEGABYTE, False)):
        array = pa.array([text])
        table = pa.table({"text": array.dictionary_encode() if dictionary else array})
        with new(tmp_path / "a.arrow", table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
            writer.write_table(table)
        del table, array
        before = pa.default_memory_pool().max_memory()
        if len(text) == MEGABYTE:
            assert read(tmp_path / "a.arrow") == [{"text": text}]
        else:
            with pytest.raises(UserError, match=r"a\.arrow: a record batch expands from [\d,]+ to 209,7[\d,]+ bytes"):
                read(tmp_path / "a.arrow")
        assert pa.default_memory_pool().max_memory() == before


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("depth", "columns"), [(DEPTH, {"text_column": "text"}), (DEPTH, None), (150, None), (600, None)]
)
def test_deep_json_is_one_line(tmp_path: Path, name: str, depth: int, columns: dict[str, str] | None) -> None:
    (tmp_path / name).write_text(f'{{"text": "a", "more": {nested_json(depth)}}}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"nested too deeply|line 1: 'more' has more than 100 levels"):
        read(tmp_path / name, columns)
    if depth == 150:
        assert read(tmp_path / name, {"text_column": "text"}) == [{"text": "a"}]
    (tmp_path / name).write_text(json.dumps({"more": nested(100)}), encoding="utf-8")
    assert read(tmp_path / name) == [{"more": nested(100)}]


def _wide(name: str, n: int) -> bytes:
    columns = [f"column {index}" for index in range(n)]
    if name.endswith(".parquet"):
        return _table_bytes(pa.table({column: ["x"] for column in columns}))
    if name.endswith((".json", ".jsonl")):
        return json.dumps(dict.fromkeys(columns, "x")).encode()
    separator = "," if name.endswith(".csv") else "\t"
    return f"{separator.join(columns)}\n{separator.join('x' * n)}\n".encode()


def _table_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "n"),
    [("a.json", 50_000), ("a.jsonl", 50_000), ("a.csv", 50_000), ("a.tsv", 50_000), ("a.parquet", 3000)],
)
def test_wide_tables_are_read_quickly_and_errors_are_short(tmp_path: Path, name: str, n: int) -> None:
    (tmp_path / name).write_bytes(_wide(name, n))
    began = time.process_time()
    with pytest.raises(
        UserError, match=rf"no column 'text'; .*\(column 0, .*, column 19, and {n - 20:,} more\)"
    ) as error:
        read(tmp_path / name, {"text_column": "text"})
    assert len(str(error.value)) < 1000
    [row] = read(tmp_path / name)
    assert len(row) == n
    assert time.process_time() - began < 5
    (tmp_path / "a.csv").write_text("y" * 100_000 + "\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        read(tmp_path / "a.csv", {"text_column": "text"})
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("quoted", [csv.QUOTE_ALL, csv.QUOTE_MINIMAL])
def test_byte_order_mark_before_a_csv_header(tmp_path: Path, quoted: int) -> None:
    file = io.StringIO()
    csv.writer(file, quoting=quoted).writerows([["text", "label"], ["a", "b"]])  # type: ignore[arg-type]
    (tmp_path / "a.csv").write_bytes(file.getvalue().encode("utf-8-sig"))
    assert read(tmp_path / "a.csv", {"text_column": "text"}) == [{"text": "a"}]
    assert read(tmp_path / "a.csv") == [{"text": "a", "label": "b"}]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet", "a.arrow"])
def test_columns_of_the_same_name_are_refused(tmp_path: Path, name: str) -> None:
    names = ["text", "label", "text", "more"]
    if name.endswith((".parquet", ".arrow")):
        table = pa.Table.from_arrays([pa.array([value]) for value in "abcd"], names=names)
        buffer = io.BytesIO()
        with pa.ipc.new_stream(buffer, table.schema) as writer:
            writer.write_table(table)
        (tmp_path / name).write_bytes(_table_bytes(table) if name == "a.parquet" else buffer.getvalue())
    else:
        separator = "," if name == "a.csv" else "\t"
        (tmp_path / name).write_text(f"{separator.join(names)}\n{separator.join('abcd')}\n", encoding="utf-8")
    for columns in ({"text_column": "text"}, None):
        with pytest.raises(UserError, match=rf"{name} has 2 columns named 'text'; rename them"):
            read(tmp_path / name, columns)
    assert read(tmp_path / name, {"text_column": "more"}) == [{"more": "d"}]


def test_columns_without_names_at_the_end_of_a_csv_file(tmp_path: Path) -> None:
    """As spreadsheets write them."""
    (tmp_path / "a.csv").write_text("text,,\na,,\n", encoding="utf-8")
    assert read(tmp_path / "a.csv", {"text_column": "text"}) == [{"text": "a"}]
    assert read(tmp_path / "a.csv") == [{"text": "a", "": ""}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,n\ra,1\rb,2\r", r"line 1 cannot be read: it contains a carriage return \(\\r\) outside quotes; convert"),
        ("text,n\na\rb,1\n", r"line 2 cannot be read: it contains a carriage return \(\\r\) outside quotes"),
        ('text,n\n"a,1\n', "line 2 cannot be read: a quoted field has no closing quote"),
        ('text,n\n"a"b,1\n', "line 2 cannot be read: text follows the closing quote of a field"),
    ],
)
def test_csv_errors_in_plain_words(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(text.encode())
    with pytest.raises(UserError, match=f"a.csv: {message}"):
        read(tmp_path / "a.csv", {"text_column": "text"})
    quoted = 'text,n\r\n"a\rb\r\nc",1\r\n'
    (tmp_path / "a.csv").write_bytes(quoted.encode())
    assert read(tmp_path / "a.csv") == [{"text": "a\rb\r\nc", "n": "1"}]


@pytest.mark.parametrize("character", ["\x0b", "\x0c", "\x1b", "\x1c", "\x85", "\u2028"])
def test_control_characters_in_column_names_are_escaped(tmp_path: Path, character: str) -> None:
    for text, columns in (
        (f"te{character}xt,b\n1,2\n", {"text_column": "text"}),
        (f"a{character},a{character}\n1,2\n", None),
    ):
        (tmp_path / "a.csv").write_text(text, encoding="utf-8")
        with pytest.raises(UserError) as error:
            read(tmp_path / "a.csv", columns)
        assert len(str(error.value).splitlines()) == 1
        assert repr(character)[1:-1] in str(error.value)


def test_class_labels_of_hostile_metadata(tmp_path: Path) -> None:
    """Names that are no list of strings are ignored, and a label without a name has none."""
    for names, expected in ((["a"], None), ("ab", 7), ([1], 7), ({}, 7)):
        metadata = {"info": {"features": {"n": {"_type": "ClassLabel", "names": names}}}}
        table = pa.table({"n": [7]}).replace_schema_metadata({"huggingface": json.dumps(metadata)})
        pq.write_table(table, tmp_path / "a.parquet")
        [row] = read(tmp_path / "a.parquet")
        assert row["n"] == 7
        assert getattr(row["n"], "name", 7) == expected


FUZZED = ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow")


def _mutated(name: str, rng: random.Random, as_rows: bool) -> bytes:
    rows = [dict(row, nested=[{"role": "user", "content": [1, None, {"a": "b"}]}]) for row in ROWS[:6]]
    if name in ("a.jsonl", "a.json") and as_rows:
        mutated = mutate_json(rows, rng)
        lines = mutated if name == "a.jsonl" and isinstance(mutated, list) else [mutated]
        return "\n".join(json.dumps(line) for line in lines).encode()
    return mutate_bytes(FORMATS[name](), rng)


def _fuzz(path: Path, seeds: range) -> None:
    """Any file gives rows or a ``UserError`` of one short line, within seconds."""
    errors: list[str] = []

    def attempt(seed: int, rng: random.Random) -> None:
        path.write_bytes(_mutated(path.name, rng, as_rows=seed % 2 == 1))
        source, refused = DocumentSource(str(path)), ""
        for found in (source.read(), source.rows(), source.rows(COLUMNS)):
            try:
                deque(found, maxlen=0)
            except UserError as error:
                errors.append(refused := str(error))
        if refused:
            raise UserError(refused)

    fuzz(path.name, path.parent, seeds, attempt)
    assert len(errors) > len(seeds) / 5
    assert all(len(error.splitlines()) == 1 and len(error.encode()) < 2000 + len(str(path)) for error in errors)


@pytest.mark.parametrize("name", FUZZED)
def test_damaged_tables_are_read_or_refused_in_one_line(tmp_path: Path, name: str) -> None:
    _fuzz(tmp_path / name, range(50))


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZED)
def test_many_damaged_tables_are_read_or_refused_in_one_line(tmp_path: Path, name: str) -> None:
    _fuzz(tmp_path / name, range(50, 550))
