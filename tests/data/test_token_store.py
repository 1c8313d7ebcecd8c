"""A store is made once, holds exactly the documents, and is never half made."""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from lit_gpt_scratch.data import token_store
from lit_gpt_scratch.data.token_store import Recipe
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import bulk
from lit_gpt_scratch.text.bulk import encode
from lit_gpt_scratch.text.sources import documents
from lit_gpt_scratch.text.split import split
from lit_gpt_scratch.text.tokenizer import Tokenizer


def recipe(source: Path | str, **changes: object) -> Recipe:
    given = {"source": str(source), "vocab_size": 300, "tokenizer": "bpe", "special": (), "validation_share": 0.1}
    return Recipe(**(given | changes))


def texts_of(store: object, side: str) -> list[str]:
    stream, tokenizer = getattr(store, side), store.tokenizer  # type: ignore[attr-defined]
    ids = stream.open()
    starts = [*np.flatnonzero(ids == tokenizer.end_of_text), len(ids)]
    assert starts[0] == 0
    return [tokenizer.decode(ids[a + 1 : b].tolist()) for a, b in itertools.pairwise(starts)]


def test_every_document_is_on_one_side_and_whole(corpus: Path, tmp_path: Path) -> None:
    store = recipe(corpus).prepare(tmp_path)
    sides = texts_of(store, "train") + texts_of(store, "validation")
    assert sorted(sides) == sorted(document.text for document in documents(str(corpus)))
    for side in ("train", "validation"):
        stream = getattr(store, side)
        assert stream.n_documents == len(texts_of(store, side)) > 0
        assert stream.n_bytes == sum(len(text.encode()) for text in texts_of(store, side))
        assert stream.n_tokens == len(stream.open())
        assert stream.open().dtype == np.uint16


def test_the_tokenizer_never_sees_validation_text(corpus: Path, tmp_path: Path) -> None:
    """A word planted into a validation document, often enough to become a token if it were seen."""
    folder = tmp_path / "planted"
    folder.mkdir()
    for document in documents(str(corpus)):
        (folder / document.id).write_text(document.text, encoding="utf-8")
    planted = " xylophonist" * 400
    # The side of a document is decided by the hash of its content: try numbers until it is held out.
    for attempt in range(300):
        (folder / "planted.txt").write_text(f"{attempt} {planted}", encoding="utf-8")
        store = recipe(folder, vocab_size=400).prepare(tmp_path / "stores" / str(attempt))
        if any("xylophonist" in text for text in texts_of(store, "validation")):
            break
    assert not any("xylophonist" in text for text in texts_of(store, "train"))
    word = store.tokenizer.encode(" xylophonist")
    assert len(word) > 4  # in pieces: no merge was learned from it
    seen = Tokenizer.train([planted, *texts_of(store, "train")], 400)
    assert len(seen.encode(" xylophonist")) == 1  # it would have been learned


def test_the_second_time_reuses_the_first(corpus: Path, tmp_path: Path) -> None:
    store = recipe(corpus).prepare(tmp_path)
    made = Path(store.train.path).stat().st_mtime_ns
    again = recipe(corpus).prepare(tmp_path)
    assert again.fingerprint == store.fingerprint
    assert Path(again.train.path).stat().st_mtime_ns == made


def test_whatever_changes_the_ids_changes_the_fingerprint(corpus: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(Tokenizer.train(["other text"], 280).to_json(), encoding="utf-8")
    other = tmp_path / "other"
    other.mkdir()
    for document in documents(str(corpus)):
        (other / document.id).write_text(document.text, encoding="utf-8")
    same = recipe(other).prepare(tmp_path / "c")
    (other / "00.txt").write_text("one more line\n" * 40, encoding="utf-8")
    stores = [
        recipe(corpus).prepare(tmp_path / "c"),
        recipe(corpus, vocab_size=310).prepare(tmp_path / "c"),
        recipe(corpus, validation_share=0.3).prepare(tmp_path / "c"),
        recipe(corpus, tokenizer=str(tokenizer)).prepare(tmp_path / "c"),
        recipe(other).prepare(tmp_path / "c"),
    ]
    assert same.fingerprint == stores[0].fingerprint  # the same text elsewhere is the same text
    assert len({store.fingerprint for store in stores}) == 5
    assert stores[3].tokenizer.to_json() == tokenizer.read_text(encoding="utf-8")


def test_large_vocabularies_take_four_bytes(corpus: Path, tmp_path: Path) -> None:
    made = json.loads(Tokenizer.train([document.text for document in documents(str(corpus))], 400).to_json())
    made["model"]["vocab"] |= {f"unused{i}": i for i in range(len(made["model"]["vocab"]), 70_000)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
    store = recipe(corpus, tokenizer=str(tmp_path / "tokenizer.json")).prepare(tmp_path)
    assert store.train.open().dtype == np.uint32
    assert sum(map(len, texts_of(store, "train"))) > 0


@pytest.mark.parametrize("damage", ["truncate", "extend", "remove", "store.json"])
def test_a_damaged_store_is_refused_by_name(corpus: Path, tmp_path: Path, damage: str) -> None:
    store = recipe(corpus).prepare(tmp_path)
    path = Path(store.train.path)
    if damage == "truncate":
        os.truncate(path, path.stat().st_size - 2)
    elif damage == "extend":
        path.write_bytes(path.read_bytes() + b"\0\0")
    elif damage == "remove":
        path.unlink()
    else:
        path = path.with_name("store.json")
        path.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="delete") as error:
        recipe(corpus).prepare(tmp_path).train.open()
    assert path.parent.name in str(error.value)


def test_a_cache_that_cannot_be_written_is_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot keep tokens in .*--data.cache"):
        recipe(corpus).prepare(tmp_path / "file" / "cache")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_killed_preparation_leaves_nothing_half_valid(corpus: Path, tmp_path: Path) -> None:
    """kill -9 at 12 random moments of the writing; after each, a store is there whole or not at all."""
    rng, cache, forked = random.Random(0), tmp_path / "cache", multiprocessing.get_context("fork")
    began = time.perf_counter()
    undisturbed = recipe(corpus, vocab_size=500).prepare(tmp_path / "undisturbed")
    duration = time.perf_counter() - began
    for _ in range(12):
        process = forked.Process(target=recipe(corpus, vocab_size=500).prepare, args=(cache,))
        process.start()
        time.sleep(rng.random() * 1.5 * duration)
        process.kill()
        process.join()
        for path in cache.glob("*"):
            assert path.suffix in (".lock", ".partial") or (path / "store.json").exists()
        store = recipe(corpus, vocab_size=500).prepare(cache)
        for side in ("train", "validation"):
            mine, expected = Path(getattr(store, side).path), Path(getattr(undisturbed, side).path)
            assert mine.read_bytes() == expected.read_bytes()
        assert not list(cache.glob("*.partial"))
        shutil.rmtree(cache)


def test_a_large_corpus_has_the_same_ids(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above a size it is encoded in another way."""
    store = recipe(corpus).prepare(tmp_path / "a")
    monkeypatch.setattr(token_store, "FAST_FROM", 1)
    monkeypatch.setattr(bulk, "encode", lambda backend, proven, texts: encode(backend, checked(proven), texts))
    again = recipe(corpus).prepare(tmp_path / "b")
    for side in ("train", "validation"):
        assert Path(getattr(store, side).path).read_bytes() == Path(getattr(again, side).path).read_bytes()


def checked(proven: tiktoken.Encoding | None) -> tiktoken.Encoding:
    assert proven is not None
    return proven


def test_a_tokenizer_learns_from_a_part_of_a_large_corpus(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A share of the documents that does not depend on their order, and is said."""
    of_recipe = recipe(corpus)
    documents_of = split(documents(str(corpus)), 0.1)
    everything, some = (list(of_recipe.texts(documents_of, "train", share)) for share in (1.0, 0.5))
    assert set(some) < set(everything)
    assert 0.2 < len(some) / len(everything) < 0.8
    monkeypatch.setattr(token_store, "LEARN_FROM", documents_of.n_bytes // 2)
    caplog.set_level("INFO")
    of_recipe.prepare(tmp_path)
    assert "training a bpe tokenizer on 50.0% of the training documents" in caplog.text
