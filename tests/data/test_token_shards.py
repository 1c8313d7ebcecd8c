"""Shards do not depend on processes or kills, and an altered shard is never read."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lit_gpt_scratch.data.token_store import STORE_FORMAT, TokenStore
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import parquet_io, tokenize_corpus
from lit_gpt_scratch.text.atomic_files import find_unfinished
from tests.data.test_token_store import texts_of, token_preparation

SMALL = 2_000
"""Bytes of text per shard; small, so that a small corpus has many."""
SEVERAL = """
import sys
from pathlib import Path
from lit_gpt_scratch.text import tokenize_corpus
from lit_gpt_scratch.text import parquet_io
from tests.data.test_token_store import token_preparation

tokenize_corpus.SHARD_BYTES, parquet_io.ROW_GROUP_CHARACTERS = 2_000, 1_000
token_preparation(sys.argv[1], vocab_size=None, processes=2).prepare(Path(sys.argv[2]), Path(sys.argv[2], "store"))
"""


@pytest.fixture
def many_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize_corpus, "SHARD_BYTES", SMALL)
    monkeypatch.setattr(parquet_io, "ROW_GROUP_CHARACTERS", SMALL // 2)


def contents(folder: Path) -> dict[str, bytes]:
    """All files except checked.json, which has timestamps; Parquet files have none."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "checked.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.usefixtures("many_shards")
def test_tokens_do_not_depend_on_processes_or_shards(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several, alone = (token_preparation(corpus, processes=n).prepare(tmp_path, tmp_path / f"{n}") for n in (2, 1))
    assert len(several.train.shards) > 10
    assert contents(several.folder) == contents(alone.folder)
    monkeypatch.setattr(tokenize_corpus, "SHARD_BYTES", 2**26)
    whole = token_preparation(corpus).prepare(tmp_path, tmp_path / "whole")
    assert len(whole.train.shards) == 1
    for side in ("train", "validation"):
        assert texts_of(whole, side) == texts_of(several, side)
        streams = [getattr(store, side) for store in (whole, several)]
        assert streams[0].n_bytes == streams[1].n_bytes
        assert np.array_equal(*(stream.read(0, stream.n_tokens) for stream in streams))


@pytest.mark.usefixtures("many_shards")
def test_document_table_matches_the_tokens(corpus: Path, tmp_path: Path) -> None:
    store = token_preparation(corpus).prepare(tmp_path)
    for shard in store.shards:
        starts, sizes = shard.documents[:, 0].astype(int), shard.documents[:, 1].astype(int)
        assert starts.tolist() == np.flatnonzero(shard.tokens == store.tokenizer.end_of_text).tolist()
        texts = [store.tokenizer.decode(ids[1:].tolist()) for ids in np.split(shard.tokens, starts[1:])]
        assert sizes.tolist() == [len(text.encode()) for text in texts]
        assert shard.largest == shard.tokens.max()
    assert sum(shard.n_documents for shard in store.shards) == 30


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.usefixtures("many_shards")
def test_preparation_resumes_after_a_kill(corpus: Path, tmp_path: Path) -> None:
    """kill -9 at 12 random moments: each time the store is complete or absent, and finished shards are kept."""
    rng, forked = random.Random(0), multiprocessing.get_context("fork")
    began = time.perf_counter()
    expected = contents(token_preparation(corpus, vocab_size=None).prepare(tmp_path, tmp_path / "undisturbed").folder)
    duration = time.perf_counter() - began
    kept = 0
    for n in range(12):
        folder = tmp_path / f"{n}"
        process = forked.Process(target=token_preparation(corpus, vocab_size=None).prepare, args=(tmp_path, folder))
        process.start()
        time.sleep(rng.random() * 1.3 * duration)
        process.kill()
        process.join()
        assert not folder.exists() or contents(folder) == expected
        finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob(f".{n}.*.unfinished/train-*.json")}
        store = token_preparation(corpus, vocab_size=None).prepare(tmp_path, folder)
        assert contents(folder) == expected
        for note, written in finished.items():
            kept += 1
            assert Path(folder, note.with_suffix(".tokens.npy").name).stat().st_mtime_ns <= written
        assert not find_unfinished(tmp_path)
        assert texts_of(store, "train")
    assert kept > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(os.name == "nt", reason="kills with SIGKILL")
def test_fifty_kills_of_several_processes(corpus: Path, tmp_path: Path) -> None:
    """The parent process is killed; its two workers end by themselves."""
    rng = random.Random(1)

    def start(folder: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", SEVERAL, str(corpus), str(folder)]
        return subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)

    def begin(folder: Path) -> tuple[subprocess.Popen[bytes], float]:
        """Wait until writing of the store has begun."""
        process = start(folder)
        while not find_unfinished(folder) and process.poll() is None:
            time.sleep(0.01)
        return process, time.perf_counter()

    process, begun = begin(tmp_path / "undisturbed")
    assert process.wait() == 0
    duration = time.perf_counter() - begun
    expected = contents(tmp_path / "undisturbed" / "store")
    unfinished = resumed = 0
    for n in range(50):
        folder = tmp_path / f"{n}"
        process, _ = begin(folder)
        time.sleep(1.05 * duration * rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        unfinished += len(find_unfinished(folder))
        resumed += any(any(partial.glob("*.tokens.npy")) for partial in find_unfinished(folder))
        assert start(folder).wait() == 0
        assert contents(folder / "store") == expected
    print(
        f"\n50 kills in {duration:.1f} s of writing: {unfinished} left a partial store, {resumed} of them with shards"
    )
    assert resumed > 5
    time.sleep(2)
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in listed


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def extend(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 100)))


def flip_a_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def flip_a_bit_and_hide_the_time(path: Path, rng: random.Random) -> None:
    before = path.stat()
    flip_a_bit(path, rng)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def zero_16_bytes(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content) - 16)
    content[start : start + 16] = bytes(16) if any(content[start : start + 16]) else b"\1" * 16
    path.write_bytes(content)


def replace_by_another(path: Path, _: random.Random) -> None:
    others = [other for other in path.parent.glob(f"*{''.join(path.suffixes)}") if other != path]
    shutil.copy2(next(other for other in others if other.read_bytes() != path.read_bytes()), path)


def remove(path: Path, _: random.Random) -> None:
    path.unlink()


@pytest.mark.usefixtures("many_shards")
@pytest.mark.slow
def test_altered_stores_are_rejected_naming_the_shard(corpus: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    made = token_preparation(corpus).prepare(tmp_path, tmp_path / "store").folder
    ways: list[Callable[[Path, random.Random], None]] = [
        truncate, extend, flip_a_bit, flip_a_bit_and_hide_the_time, zero_16_bytes, replace_by_another, remove
    ]  # fmt: skip
    altered = tmp_path / "altered"
    shutil.copytree(made, altered, ignore=shutil.ignore_patterns("text", "audit*"))
    TokenStore.open(altered)  # a copy is valid
    paths = sorted(altered.glob("*.npy"))
    for n in range(500):
        path = rng.choice(paths)
        content = path.read_bytes()
        ways[n % len(ways)](path, rng)
        with pytest.raises(UserError) as error:
            TokenStore.open(altered)
        assert f"shard {path.name.split('.')[0]} of {altered}" in str(error.value)
        assert "\n" not in str(error.value)
        path.write_bytes(content)
        TokenStore.open(altered)


@pytest.mark.parametrize("name", ["store.json", "tokenizer.json"])
def test_altered_manifest_or_tokenizer_is_rejected(corpus: Path, tmp_path: Path, name: str) -> None:
    folder = token_preparation(corpus).prepare(tmp_path, tmp_path / "store").folder
    path = folder / name
    content = path.read_bytes()
    rng = random.Random(0)
    for _ in range(50):
        flip_a_bit(path, rng)
        with pytest.raises(UserError, match="delete the folder and prepare the corpus again"):
            TokenStore.open(folder)
        path.write_bytes(content)
    path.unlink()
    with pytest.raises(UserError, match=f"{folder}"):
        TokenStore.open(folder)


def test_only_files_with_changed_size_or_dates_are_read(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = token_preparation(corpus).prepare(tmp_path, tmp_path / "store").folder
    from lit_gpt_scratch.data import token_store as module

    read: list[str] = []
    sha256_file = module.sha256_file
    monkeypatch.setattr(module, "sha256_file", lambda path: read.append(path.name) or sha256_file(path))
    TokenStore.open(folder)
    assert read == []
    (folder / "train-00000.tokens.npy").touch()
    TokenStore.open(folder)
    TokenStore.open(folder)
    assert read == ["train-00000.tokens.npy"]
    TokenStore.open(folder).verify(all_files=True)
    assert len(read) == 5


@pytest.mark.parametrize(
    ("other", "message"),
    [(STORE_FORMAT + 1, "which is newer than .*; update"), (STORE_FORMAT - 1, "which is older than .*; delete")],
)
def test_other_format_version_is_rejected(corpus: Path, tmp_path: Path, other: int, message: str) -> None:
    folder = token_preparation(corpus).prepare(tmp_path, tmp_path / "store").folder
    about = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps(about | {"format": other}))
    with pytest.raises(UserError, match=f"store format {other}, {message}"):
        TokenStore.open(folder)


def test_id_outside_the_vocabulary_is_rejected(corpus: Path, tmp_path: Path) -> None:
    """For example in a store written by a user's script."""
    folder = token_preparation(corpus).prepare(tmp_path, tmp_path / "store").folder
    about = TokenStore.read_manifest(folder)
    largest = about["validation"][0]["largest"]
    TokenStore.write_manifest(folder, about | {"vocab_size": largest})
    with pytest.raises(
        UserError, match=f"contains token id {about['train'][0]['largest']}, but the tokenizer has only {largest}"
    ):
        TokenStore.open(folder)
