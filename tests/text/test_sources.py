"""Which documents a source has, and what a user is told when it has none."""

import sysconfig
from pathlib import Path

import pytest

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.sources import documents


def test_the_standard_library_without_tests_and_tables() -> None:
    found = list(documents("stdlib"))
    root = Path(sysconfig.get_path("stdlib"))
    assert len(found) > 300
    assert all((root / document.id).suffix == ".py" for document in found)
    for part in ("test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages"):
        assert not any(part in Path(document.id).parts for document in found)
    assert not any("_sysconfigdata" in document.id for document in found)
    argparse = next(document for document in found if document.id == "argparse.py")
    assert argparse.text.encode() == (root / "argparse.py").read_bytes()


def test_a_python_without_sources_says_how_to_name_another_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    with pytest.raises(UserError, match=r"keeps no sources.*--data.source"):
        list(documents("stdlib"))


def test_a_file_keeps_every_byte(tmp_path: Path) -> None:
    data = "\ufeffone\r\ntwo\r…é\n".encode()
    (tmp_path / "text").write_bytes(data)
    [document] = documents(str(tmp_path / "text"))
    assert document.text.encode() == data


def test_a_folder_is_its_text_files_in_stable_order(tmp_path: Path) -> None:
    for name, data in {
        "b.txt": b"b", "a/c.md": b"c", "a.txt": b"a", ".hidden": b"h", ".git/x": b"x", "latin1": b"\xe9t\xe9",
        "binary": b"\0\1", "empty": b"",
    }.items():  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    assert [document.id for document in documents(str(tmp_path))] == ["a.txt", "b.txt", "a/c.md"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "no UTF-8 text file"),
        (lambda path: path.write_bytes(b""), "holds no text"),
        (lambda path: path.write_bytes(b" \n\t"), "holds no text"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00a"), "is not UTF-8 text"),
    ],
)
def test_a_source_without_text_is_named(tmp_path: Path, make: object, said: str) -> None:
    path = tmp_path / "source"
    make(path)  # type: ignore[operator]
    with pytest.raises(UserError, match=said) as error:
        list(documents(str(path)))
    assert str(path) in str(error.value)
