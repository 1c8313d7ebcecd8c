"""Document sources: which documents they yield, and the errors for missing or unreadable ones."""

import bz2
import contextlib
import csv
import errno
import glob
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import document, sources
from lit_gpt_scratch.text.document import Document, RejectedDocument
from lit_gpt_scratch.text.sources import DocumentSource, read_documents

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def texts(name: Path | str, **settings: str) -> list[str]:
    found = list(DocumentSource(str(name), **settings).read())
    assert all(isinstance(document, Document) for document in found)
    return [document.text for document in found]


def test_stdlib_excludes_tests_and_generated_tables() -> None:
    found = list(read_documents("stdlib"))
    root = Path(sysconfig.get_path("stdlib"))
    assert len(found) > 300
    assert all((root / document.id).suffix == ".py" for document in found)
    for part in ("test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages"):
        assert not any(part in Path(document.id).parts for document in found)
    assert not any("_sysconfigdata" in document.id for document in found)
    argparse = next(document for document in found if document.id == "argparse.py")
    assert argparse.text.encode() == (root / "argparse.py").read_bytes()


def test_missing_stdlib_sources_error_names_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    with pytest.raises(UserError, match=r"source code of the Python standard library is not installed.*--data.source"):
        list(read_documents("stdlib"))


def test_text_file_keeps_every_byte(tmp_path: Path) -> None:
    data = "\ufeffone\r\ntwo\r…é\n".encode()
    (tmp_path / "text").write_bytes(data)
    [text] = texts(tmp_path / "text")
    assert text.encode() == data


def test_folder_yields_its_text_files_in_order(tmp_path: Path) -> None:
    for name, data in {
        "b.txt": b"b", "a/c.md": b"c", "a.txt": b"a", ".hidden": b"h", ".git/x": b"x", "latin1": b"\xe9t\xe9",
        "binary": b"\0\1", "table.csv": b"x,y\n", "rows.jsonl": b'{"text": "r"}\n{"text": "s"}\n',
    }.items():  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    ids = ["a.txt", "b.txt", "rows.jsonl:1", "rows.jsonl:2", "table.csv", "a/c.md"]
    assert [document.id for document in read_documents(str(tmp_path))] == ids
    skipped = [found for found in DocumentSource(str(tmp_path)).read() if isinstance(found, RejectedDocument)]
    assert [(found.id, found.reason, found.n_bytes) for found in skipped] == [
        ("binary", "not text: NUL bytes", 2),
        ("latin1", "not text: not UTF-8, or a line too long", 3),
    ]


def test_glob_pattern_across_folders(tmp_path: Path) -> None:
    for name in ("x/1.txt", "x/y/2.txt", "x/y/3.md", "4.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert [found.id for found in read_documents(f"{tmp_path}/**/*.txt")] == ["4.txt", "x/1.txt", "x/y/2.txt"]
    assert [found.id for found in read_documents(f"{tmp_path}/x/y/*")] == ["2.txt", "3.md"]


def tree(root: Path, names: Sequence[str]) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(name, encoding="utf-8")


LINKED = ("a/1.txt", "a/b/2.txt", "outside/c/3.txt", "outside/.hidden/4.txt")


def test_links_are_followed_once(tmp_path: Path) -> None:
    """Links out of the folder, to a folder that is read anyway, to a hidden one, and in loops."""
    tree(tmp_path, LINKED)
    tree(tmp_path, ["in/0.txt"])
    for link, target in {
        "in/a_link": "a", "in/a_second_link": "a", "outside/c/loop": "outside", "a/b/up": "a", "in/back": "in",
        "in/zero.txt": "in/0.txt", "in/out": "outside", "in/other/hidden": "outside/.hidden",
    }.items():  # fmt: skip
        (tmp_path / link).parent.mkdir(exist_ok=True)
        (tmp_path / link).symlink_to(tmp_path / target)
    folder = [
        "0.txt", "zero.txt", "a_link/1.txt", "a_link/b/2.txt", "out/c/3.txt", "other/hidden/4.txt"
    ]  # fmt: skip
    assert [found.id for found in read_documents(str(tmp_path / "in"))] == folder
    assert [found.id for found in read_documents(f"{tmp_path}/in/**/*.txt")] == sorted(folder)
    assert [found.id for found in read_documents(f"{tmp_path}/in/*/[12].txt")] == [
        "a_link/1.txt", "a_second_link/1.txt"
    ]  # fmt: skip


@given(data=st.data())
@settings(max_examples=60)
def test_patterns_match_glob_where_there_are_no_links(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("tree")
    parts = st.sampled_from(["a", "b", ".h", "ab", "a.txt", ".x.txt"])
    for path in data.draw(st.lists(st.lists(parts, min_size=1, max_size=4), max_size=12)):
        with contextlib.suppress(OSError):
            tree(root, ["/".join(path)])
    pattern = "/".join(
        data.draw(st.lists(st.sampled_from(["**", "*", "a", "a*", "?", "[ab]", ".*", "*.txt"]), min_size=1, max_size=4))
    )
    matches = glob.glob(f"{root}/{pattern}", recursive=True)  # noqa: PTH207
    expected = {Path(match) for match in matches if not match.endswith("/")}  # glob finds "a/" for a/** if a is a file
    if not glob.has_magic(pattern):
        return
    found = set(sources._expand_pattern(root / pattern))
    assert {path for path in found if path.is_file()} == {path for path in expected if path.is_file()}


def test_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, ["a/1.txt", "b/2.txt"])

    def deny(call: Callable[[object], object]) -> Callable[[object], object]:
        def denied(path: object) -> object:
            if Path(str(path)).name == "b":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return call(path)

        return denied

    monkeypatch.setattr(os, "scandir", deny(os.scandir))
    monkeypatch.setattr(os, "listdir", deny(os.listdir))
    for name in ("", "/**/*.txt", "/*/*.txt"):
        for use in (
            read_documents,
            lambda name: list(DocumentSource(name).read()),
            lambda name: list(DocumentSource(name).rows()),
        ):
            with pytest.raises(UserError, match=f"cannot read {tmp_path}/b: Permission denied; make it readable"):
                use(f"{tmp_path}{name}")


def test_path_that_cannot_be_examined_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read aaa.*: File name too long"):
        read_documents("a" * 5000)
    with pytest.raises(UserError, match="no such file or folder: ~nobody_of_this_name/texts"):
        read_documents("~nobody_of_this_name/texts")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    with pytest.raises(UserError, match=r"self: (Too many levels of symbolic links|the link is broken)"):
        read_documents(str(tmp_path))


@pytest.mark.parametrize("pattern", ["", "/**", "/**/*.txt"])
def test_what_cannot_be_read_is_skipped_by_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    """A broken link, a file and a folder without permission: an error by name, or a line in the audit."""
    source = tmp_path / "source"
    tree(source, ["a.txt", "b/c.txt", "closed/d.txt", "locked.txt"])
    (source / "broken.txt").symlink_to(tmp_path / "missing")
    scandir, open_ = os.scandir, Path.open

    def deny(path: Path, name: str) -> None:
        if Path(path).name == name:  # permissions do not stop root
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", lambda path: (deny(path, "closed"), scandir(path))[1])
    monkeypatch.setattr(
        Path, "open", lambda path, *args, **kwargs: (deny(path, "locked.txt"), open_(path, *args, **kwargs))[1]
    )
    skipping = DocumentSource(f"{source}{pattern}", unreadable="skip")
    found = list(skipping.read())
    assert sorted(each.id for each in found if isinstance(each, Document)) == ["a.txt", "b/c.txt"]
    reasons = {Path(each.id).name: each.reason for each in found if isinstance(each, RejectedDocument)}
    expected = {"closed": "unreadable: Permission denied", "locked.txt": "unreadable: Permission denied"}
    if not pattern.endswith("*.txt"):
        expected["broken.txt"] = "unreadable: the link is broken"
    assert reasons.items() >= expected.items()
    first = skipping.fingerprint()
    (source / "broken.txt").unlink()
    assert (skipping.fingerprint() != first) == ("broken.txt" in reasons)
    with pytest.raises(
        UserError, match=r"cannot read .*/closed: Permission denied; make it readable, or set --data.un"
    ):
        DocumentSource(f"{source}{pattern}").fingerprint()


def test_source_that_cannot_be_read_is_an_error_in_any_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")

    def denied(path: Path, *args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    monkeypatch.setattr(os, "scandir", denied)
    for source in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(UserError, match="Permission denied"):
            list(DocumentSource(str(source), unreadable="skip").read())


def test_unreadable_files_are_in_the_audit(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tree(source, ["a.txt"])
    (source / "a.txt").write_text("some words\n" * 300, encoding="utf-8")
    (source / "b.txt").symlink_to(tmp_path / "missing")
    data = PackedText(str(source), unreadable="skip", cache=str(tmp_path / "cache"), vocab_size=260, block_size=16)
    [report] = data.cleaning_reports
    assert "1 unreadable: the link is broken" in report
    assert "b.txt" in report
    with pytest.raises(UserError, match=r"b\.txt: the link is broken; remove it, or set --data.unreadable to skip"):
        PackedText(str(source), cache=str(tmp_path / "cache")).prepare_data()


def test_broken_link_is_an_error(tmp_path: Path) -> None:
    tree(tmp_path, ["a.txt"])
    (tmp_path / "b.txt").symlink_to(tmp_path / "missing")
    for use in (DocumentSource.fingerprint, lambda source: list(source.read()), lambda source: list(source.rows())):
        for name in ("", "/*"):
            with pytest.raises(UserError, match=r"cannot read .*b\.txt: "):
                use(DocumentSource(f"{tmp_path}{name}"))


def test_pipe_is_refused_before_it_blocks(tmp_path: Path) -> None:
    """As the whole source: an error; in a folder: a line in the report."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    source = DocumentSource(str(tmp_path / "pipe.jsonl"))
    message = r"pipe\.jsonl is a pipe or device, which can be read only once; save its content to a file"
    for use in (source.fingerprint, lambda: list(source.read()), lambda: list(source.rows())):
        with pytest.raises(UserError, match=message):
            use()
    tree(tmp_path, ["a.txt"])
    for name in ("", "/*"):
        found = list(DocumentSource(f"{tmp_path}{name}").read())
        assert [(one.id, getattr(one, "reason", None)) for one in found] == [
            ("a.txt", None), ("pipe.jsonl", "not text: a pipe, socket or device")
        ]  # fmt: skip


@pytest.mark.parametrize("source", ["<(seq 9)", "/dev/stdin"])
def test_output_of_a_command_is_refused(source: str) -> None:
    program = "import sys; from lit_gpt_scratch.text.sources import read_documents; read_documents(sys.argv[1])"
    line = f"seq 9 | {sys.executable} -c '{program}' {source}"
    ended = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[2]
    )
    assert re.search(r"UserError: /dev/\S+ is a pipe or device, which can be read only once", ended.stderr)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "no UTF-8 text file"),
        (lambda path: path.write_bytes(b""), "contains no text"),
        (lambda path: path.write_bytes(b" \n\t"), "contains no text"),
        (lambda path: path.write_bytes(b"ab\nc\xff\xfe"), r"is not UTF-8 text \(byte 0xff on line 2\)"),
    ],
)
def test_source_without_text_is_reported(tmp_path: Path, make: object, message: str) -> None:
    path = tmp_path / "source"
    make(path)  # type: ignore[operator]
    with pytest.raises(UserError, match=message) as error:
        list(read_documents(str(path)))
    assert str(path) in str(error.value)


TEXTS = [
    "plain",
    "two\nlines",
    'a "quoted" one, with a comma',
    "tab\there",
    "NA",
    "007",
    "1e5",
    "2020-01-01",
    "é 東京 🎉",
    "",
]


def _csv(rows: list[str]) -> bytes:
    file = io.StringIO()
    csv.writer(file).writerows([["label", "text"], *([str(n), text] for n, text in enumerate(rows))])
    return file.getvalue().encode()


def _parquet(rows: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": list(range(len(rows))), "text": rows}), sink)
    return bytes(sink.getvalue())


def _arrow(rows: list[str]) -> bytes:
    table, sink = pa.table({"text": rows}), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return bytes(sink.getvalue())


FORMATS: dict[str, Callable[[list[str]], bytes]] = {
    "jsonl": lambda rows: b"".join(json.dumps({"n": [n], "text": t}).encode() + b"\n" for n, t in enumerate(rows)),
    "json": lambda rows: json.dumps([{"text": text} for text in rows]).encode(),
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".zst": lambda data: zstd.compress(data) + zstd.compress(b""),
    ".bz2": bz2.compress, ".xz": lzma.compress,
}  # fmt: skip


@pytest.mark.parametrize(
    ("format_", "compression"),
    [(f, c) for f in FORMATS for c in COMPRESSIONS if not c or f not in ("parquet", "arrow")],  # compressed inside
)
def test_rows_round_trip(tmp_path: Path, format_: str, compression: str) -> None:
    path = tmp_path / f"rows.{format_}{compression}"
    path.write_bytes(COMPRESSIONS[compression](FORMATS[format_](TEXTS)))
    assert texts(path) == TEXTS
    assert [found.id for found in DocumentSource(str(path)).read()] == [
        f"{path.name}:{n}" for n in range(1, len(TEXTS) + 1)
    ]


def test_existing_file_name_is_not_a_pattern(tmp_path: Path) -> None:
    for name in ("a[1].jsonl", "a1.jsonl", "x::y.jsonl", "a 1\n.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}), encoding="utf-8")
        assert texts(tmp_path / name) == [name]


def test_tsv_has_no_quoting(tmp_path: Path) -> None:
    (tmp_path / "sms.tsv").write_text('label\tmessage\nham\t"Hi, he said\nspam\t007 "x" won"\n', encoding="utf-8")
    assert texts(tmp_path / "sms.tsv", column="message") == ['"Hi, he said', '007 "x" won"']


@pytest.mark.parametrize("compression", [name for name in COMPRESSIONS if name])
def test_compressed_text_file_is_one_document(tmp_path: Path, compression: str) -> None:
    (tmp_path / f"a.txt{compression}").write_bytes(COMPRESSIONS[compression]("é\n".encode() * 1000))
    assert texts(tmp_path / f"a.txt{compression}") == ["é\n" * 1000]


def test_rows_with_changing_other_columns_are_read(tmp_path: Path) -> None:
    """A reader that infers types from the first megabytes fails here, although the texts are valid."""
    rows = [{"text": f"{n} " + "word " * 2000, "note": None} for n in range(1200)]
    rows += [{"text": "late", "note": "s", "new": 1}, {"new": {"a": 1}, "text": "later"}, {"text": None}, {"new": 2}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    assert texts(tmp_path / "a.jsonl") == [str(row.get("text") or "") for row in rows]


@given(
    rows=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12), min_size=1, max_size=20)
)
@settings(max_examples=40)
def test_any_text_round_trips_through_json_lines(tmp_path_factory: pytest.TempPathFactory, rows: list[str]) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    path.write_bytes(FORMATS["jsonl"](rows))
    assert texts(path) == rows


FAULTS = {
    "a.jsonl": (b'{"text": "a"}\n{"text": "b"\n', "a.jsonl: line 2 is not valid JSON"),
    "b.json": (b'\n{"txt": "a"}\n', r"b.json: line 2 has no column 'text'; set --data.text_column .*txt"),
    "c.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', r"c.jsonl: line 2 is not UTF-8 \(byte 0xff\)"),
    "d.jsonl": (b'{"text": "a"}\n{"text": 5}\n', "d.jsonl: line 2: 'text' must be a string, but its type is int"),
    "e.jsonl": (b'{"text": "a"}\n[1]\n', "e.jsonl: line 2 must be a JSON object"),
    "f.jsonl": (b'{"text": "a\\ud800"}\n', "f.jsonl: line 1: 'text' contains an unpaired surrogate"),
    "g.jsonl": (b'{"txt": "a"}\n', r"g.jsonl has no column 'text'; .*\(txt\)"),
    "h.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99_999)[:-50], r"h.jsonl.gz is truncated or corrupted after"),
    "i.jsonl.zst": (zstd.compress(b'{"text": "a"}\n' * 99_999)[:-5], r"i.jsonl.zst is truncated or corrupted after"),
    "j.txt.gz": (gzip.compress(b"text " * 9999)[:-5], r"cannot read .*j.txt.gz"),
    "k.csv": (b"text,n\na,1\nb,2,3\n", "k.csv: line 3 has 3 fields, but the header has 2"),
    "u.csv": (b"text,n\nhello,1,\nworld,2,\n", "u.csv: line 2 has 3 fields, but the header has 2"),
    "v.csv": (b"id,text\n1,hello\n2\n", "v.csv: line 3 has 1 fields, but the header has 2"),
    "w.tsv": (b"label\ttext\nham\thello\t\n", "w.tsv: line 2 has 3 fields, but the header has 2"),
    "x.jsonl.xz": (lzma.compress(b'{"text": "a"}\n' * 9999)[:-40], "x.jsonl.xz is truncated or corrupted"),
    "y.jsonl.xz": (b'{"text": "a"}', "y.jsonl.xz is truncated or corrupted after line 0"),
    "z.txt.zst": (b"no archive", "cannot read .*z.txt.zst"),
    "l.csv": (b'text,n\n"a\nb",1\n"c,2\n', "l.csv: line 4 cannot be read"),
    "m.csv": (b"text,n\na,1\n\xff,2\n", "m.csv: line 3 is not UTF-8"),
    "n.csv": (b"label,message\na,1\n", r"n.csv has no column 'text'; .*\(label, message\)"),
    "o.parquet": (_parquet(["a"])[:-9], "o.parquet cannot be read as parquet"),
    "p.arrow": (_arrow(["a"])[:99], "p.arrow cannot be read as arrow"),
    "q.json": (b'[{"text": "a"}, {"text": 1}]', "q.json: row 2: 'text' must be a string"),
    "r.json": (b'[{"text": "a"}', "r.json is not valid JSON"),
    "s.jsonl": (b'{"text": "a"}\n{"text": "' + b"x" * 3000 + b'"}\n', r"s.jsonl: (row|line) 2"),
    "t.txt": (b"short\n" * 300 + b"x" * 3000, r"t.txt: line 301 is longer than"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_error_names_file_and_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """For documents that are too long, the test lowers the limit."""
    data, message = FAULTS[name]
    if name[0] in "st":
        monkeypatch.setattr("lit_gpt_scratch.text.file_readers.MAX_DOCUMENT_BYTES", 1000)
        monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 1000)
        monkeypatch.setattr(sources, "MAX_WHOLE_FILE_BYTES", 1000)
        monkeypatch.setattr(sources, "CHUNK_BYTES", 100)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        texts(tmp_path / name)


def test_missing_column_of_a_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(_parquet(["a"]))
    with pytest.raises(UserError, match=r"no column 'body'; .*\(n, text\)"):
        texts(tmp_path / "a.parquet", column="body")
    with pytest.raises(UserError, match=r"row 1: 'n' must be a string, but its type is int"):
        texts(tmp_path / "a.parquet", column="n")


def test_long_text_file_becomes_several_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 100)
    content = "".join(f"línea {n}\r\n" for n in range(300))
    (tmp_path / "a.txt").write_bytes(content.encode())
    found = list(read_documents(str(tmp_path / "a.txt")))
    assert "".join(document.text for document in found) == content
    assert [document.id for document in found] == [f"a.txt:{n}" for n in range(1, len(found) + 1)]
    assert all(100 <= len(document.text.encode()) < 130 for document in found[:-1])
    assert all(document.text.endswith("\n") for document in found)


def test_long_file_in_a_folder_is_checked_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 2000)
    monkeypatch.setattr(sources, "MAX_WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 100)
    (tmp_path / "log").write_bytes(b"a line\n" * 900 + b"\xff\n")
    (tmp_path / "zeros").write_bytes(b"\0" * 5000)
    (tmp_path / "text").write_bytes(b"a text\n")
    found = list(DocumentSource(str(tmp_path)).read())
    assert {one.id: one.n_bytes for one in found if isinstance(one, RejectedDocument)} == {"log": 6302, "zeros": 5000}
    assert [one.id for one in found if isinstance(one, Document)] == ["text"]


def test_maximum_document_size() -> None:
    assert document.MAX_DOCUMENT_BYTES == sources.MAX_DOCUMENT_BYTES == 32 * 2**20


def test_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    fingerprints = [DocumentSource(str(tmp_path)).fingerprint(), DocumentSource(str(tmp_path)).fingerprint()]
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    fingerprints.append(DocumentSource(str(tmp_path)).fingerprint())
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    fingerprints.append(DocumentSource(str(tmp_path)).fingerprint())
    (tmp_path / "c.txt").unlink()
    fingerprints.append(DocumentSource(str(tmp_path)).fingerprint())
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 4
