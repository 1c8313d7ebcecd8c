"""File readers: the same rows from every format."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.sources import DocumentSource

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
