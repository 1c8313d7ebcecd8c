"""Token stores with a false manifest or false arrays: one error, even if all checksums are right."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_gpt_scratch.data.token_store import TokenStore, hash_json
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.token_shards import MANIFEST_FILE, TokenShard, sha256_file
from tests.data.test_token_store import token_preparation
from tests.mutations import DEPTH, fuzz, mutate_bytes, mutate_json, nested_json, refuse_in_one_line


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    return token_preparation(corpus).prepare(folder, folder / "store").folder


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "store", ignore=shutil.ignore_patterns("text", "audit*")))


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    return manifest


def write_manifest(folder: Path, manifest: Any) -> None:
    """Write a manifest with its right checksum."""
    if isinstance(manifest, dict):
        manifest = {name: value for name, value in manifest.items() if name != "sha256"}
        manifest["sha256"] = hash_json(manifest)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")


def use(folder: Path) -> None:
    """Open a store, and read all of it."""
    store = TokenStore.open(folder)
    store.verify(all_files=True)
    assert store.tokenizer.vocab_size == store.vocab_size
    for stream in (store.train, store.validation):
        assert len(stream.read(0, stream.n_tokens + 9)) == stream.n_tokens
        assert sum(int(lengths.sum()) for _, lengths in stream.document_spans()) == stream.n_tokens
        stream.document_starts(0, stream.n_tokens)


def error_message(folder: Path) -> str:
    return refuse_in_one_line(lambda: use(folder), 500)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_tokens", 10**9), ("n_tokens", 2**62), ("n_tokens", -1), ("n_tokens", "9"), ("n_tokens", 1),
        ("n_bytes", 3), ("n_bytes", None), ("n_documents", 10**12), ("n_documents", 0), ("largest", 3),
        ("largest", 10**6), ("sizes", None), ("sizes", {}), ("sizes", {"tokens": 3}), ("sha256", []),
        ("sha256", {"tokens": 3, "documents": 4}), ("name", "../outside"), ("name", "/etc/passwd"), ("name", ""),
        ("folder", "/etc"), ("later", 1),
    ],
)  # fmt: skip
def test_false_shards_in_the_manifest(store: Path, field: str, value: Any) -> None:
    manifest = read_manifest(store)
    manifest["train"][0][field] = value
    write_manifest(store, manifest)
    (store / "checked.json").unlink()
    error_message(store)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 10**12), ("vocab_size", 3), ("vocab_size", "300"), ("vocab_size", None), ("train", None),
        ("train", {}), ("train", [None]), ("train", 3), ("fingerprints", []), ("fingerprints", {}),
        ("fingerprints", {"tokenizer": 3}), ("fingerprint", None), ("format", None), ("format", "3"),
        ("format", 10**30), ("hub_datasets", "owner/name"), ("hub_datasets", [3]),
    ],
)  # fmt: skip
def test_false_manifest(store: Path, field: str, value: Any) -> None:
    write_manifest(store, read_manifest(store) | {field: value})
    error_message(store)


@pytest.mark.parametrize("recipe", [None, [], {"cleaning": 3}, {"cleaning": [3]}])
def test_false_recipe(store: Path, corpus: Path, tmp_path: Path, recipe: Any) -> None:
    write_manifest(store, read_manifest(store) | {"recipe": recipe})
    with pytest.raises(UserError, match=re.escape(str(store))):
        token_preparation(corpus).prepare(tmp_path, store)


@pytest.mark.parametrize("text", [nested_json(), '{"format":' * DEPTH, "null", "[]", "", "\0"])
def test_manifest_that_is_not_an_object(store: Path, text: str) -> None:
    (store / MANIFEST_FILE).write_text(text, encoding="utf-8")
    assert "delete the folder and prepare the corpus again" in error_message(store)


@pytest.mark.parametrize("text", [nested_json(), "[]", '{"train-00000.tokens.npy": 3}', "\0"])
def test_damaged_record_of_verified_files_is_ignored(store: Path, text: str) -> None:
    (store / "checked.json").write_text(text, encoding="utf-8")
    use(store)


def replace_array(folder: Path, part: str, write: Callable[[Path, Any], None]) -> None:
    """Replace an array of the first training shard, with its right size and checksum in the manifest."""
    manifest = read_manifest(folder)
    path = folder / f"{manifest['train'][0]['name']}.{part}.npy"
    array = np.load(path)
    path.unlink()
    write(path, array)
    manifest["train"][0]["sizes"][part] = path.stat().st_size
    manifest["train"][0]["sha256"][part] = sha256_file(path)
    write_manifest(folder, manifest)


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize("part", ["tokens", "documents"])
@pytest.mark.parametrize(
    "write",
    [
        lambda path, array: np.save(path, array.astype(np.float32)),
        lambda path, array: np.save(path, array.astype(np.int64)),
        lambda path, array: np.save(path, array.astype(array.dtype.newbyteorder(">"))),
        lambda path, array: np.save(path, array[:-1]),
        lambda path, array: np.save(path, array[None]),
        lambda path, array: np.save(path, np.asfortranarray(np.stack([array, array]))),
        lambda path, array: np.save(path, np.array([{"a": 1}]), allow_pickle=True),
        lambda path, array: path.write_bytes(b"x"),
        lambda path, array: path.write_bytes(header("{'descr': '<u2', 'fortran_order': False, 'shape': (10**99,)}\n")),
        lambda path, array: path.write_bytes(header("{'descr': '<u2', 'fortran_order': False, 'shape': (-5,)}\n")),
        lambda path, array: path.write_bytes(
            header("{'descr': '<u2', 'fortran_order': False, 'shape': (9999999999999999999999,)}\n")
        ),
        lambda path, array: path.write_bytes(header("(" * 9000)),
        lambda path, array: path.write_bytes(header("-" * 9000 + "1")),
        lambda path, array: path.write_bytes(b"PK\x03\x04" + b"\0" * 100),
    ],
)
def test_false_arrays(store: Path, part: str, write: Callable[[Path, Any], None]) -> None:
    replace_array(store, part, write)
    assert f"train-00000.{part}.npy" in error_message(store)


@pytest.mark.parametrize(
    "change",
    [
        lambda documents: documents[::-1],
        lambda documents: documents + np.array([1, 0], np.uint64),
        lambda documents: documents * np.array([2**40, 1], np.uint64),
        lambda documents: documents * np.array([1, 2], np.uint64),
        lambda documents: documents * np.array([1, 2**60], np.uint64),
        lambda documents: documents * np.array([0, 1], np.uint64),
    ],
)
def test_false_document_positions(store: Path, change: Callable[[Any], Any]) -> None:
    replace_array(store, "documents", lambda path, array: np.save(path, np.ascontiguousarray(change(array))))
    assert "documents.npy" in error_message(store)


def test_false_token_ids(store: Path) -> None:
    replace_array(store, "tokens", lambda path, array: np.save(path, np.full_like(array, 60_000)))
    assert "tokens.npy do not match" in error_message(store)


def test_stream_does_not_read_beyond_a_short_shard(tmp_path: Path) -> None:
    """A shard that claimed more tokens than it had was read for ever."""
    shard = TokenShard.write(tmp_path, "train-00000", np.arange(9, dtype="<u2"), np.array([[0, 9]], "<u8"))
    claimed = TokenShard.from_metadata(tmp_path, shard.metadata | {"n_tokens": 10**9}, "shard")
    with pytest.raises(UserError, match=r"tokens\.npy contains a uint16 array of shape \(9,\), but store\.json"):
        claimed.tokens  # noqa: B018


def fuzz_store(made: Path, folder: Path, form: str, seeds: range) -> None:
    """Mutate the manifest with its right checksum, or an array with the right checksums of both."""
    whole = read_manifest(made)
    arrays = {path.name: path.read_bytes() for path in made.glob("*.npy")}

    def attempt(seed: int, rng: random.Random) -> None:
        for name, content in arrays.items():
            (folder / name).write_bytes(content)
        if form == "store.json":
            write_manifest(folder, mutate_json(whole, rng))
        else:
            part = rng.choice(("tokens", "documents"))
            content = mutate_bytes(arrays[f"train-00000.{part}.npy"], rng) or b"x"
            write_manifest(folder, whole)
            replace_array(folder, part, lambda path, _: path.write_bytes(content))
        use(folder)

    fuzz(form, folder, seeds, attempt)


@pytest.mark.parametrize("form", ["store.json", "npy"])
def test_damaged_stores(made: Path, store: Path, form: str) -> None:
    fuzz_store(made, store, form, range(50))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("form", ["store.json", "npy"])
def test_many_damaged_stores(made: Path, store: Path, form: str) -> None:
    fuzz_store(made, store, form, range(50, 550))
