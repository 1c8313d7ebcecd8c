"""A store is made once, holds exactly the documents, and is never half made."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tiktoken
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend

from lit_gpt_scratch.data import prepare_tokens as recipe_module
from lit_gpt_scratch.data.prepare_tokens import TokenPreparation
from lit_gpt_scratch.data.token_store import TokenStore
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import fast_encoder
from lit_gpt_scratch.text import tokenize_corpus as encoding_module
from lit_gpt_scratch.text.cleaning import Length
from lit_gpt_scratch.text.corpus import CorpusSpec
from lit_gpt_scratch.text.duplicates import ExactDuplicates
from lit_gpt_scratch.text.fast_encoder import encode
from lit_gpt_scratch.text.sources import DocumentSource, read_documents
from lit_gpt_scratch.text.tokenizer import Tokenizer


def recipe(source: Path | str, **changes: object) -> TokenPreparation:
    share, processes = changes.pop("validation_share", 0.1), changes.pop("processes", 1)
    selection = CorpusSpec(((DocumentSource(str(source)), 1.0),), (ExactDuplicates(),), share, processes=processes)
    return TokenPreparation(
        **({"selection": selection, "vocab_size": 300, "tokenizer": "bpe", "special": ()} | changes)
    )


def tokens_of(store: TokenStore) -> Path:
    return store.train.shards[0].path("tokens")


def texts_of(store: object, side: str) -> list[str]:
    stream, tokenizer = getattr(store, side), store.tokenizer  # type: ignore[attr-defined]
    ids = stream.read(0, stream.n_tokens)
    starts = [*np.flatnonzero(ids == tokenizer.end_of_text), len(ids)]
    assert starts[0] == 0
    return [tokenizer.decode(ids[a + 1 : b].tolist()) for a, b in itertools.pairwise(starts)]


def test_every_document_is_on_one_side_and_whole(corpus: Path, tmp_path: Path) -> None:
    store = recipe(corpus).prepare(tmp_path)
    sides = texts_of(store, "train") + texts_of(store, "validation")
    assert sorted(sides) == sorted(document.text for document in read_documents(str(corpus)))
    for side in ("train", "validation"):
        stream = getattr(store, side)
        assert stream.n_documents == len(texts_of(store, side)) > 0
        assert stream.n_bytes == sum(len(text.encode()) for text in texts_of(store, side))
        assert stream.n_tokens == len(stream.read(0, 10**9))
        assert stream.read(0, 9).dtype == np.uint16


def test_the_tokenizer_never_sees_validation_text(corpus: Path, tmp_path: Path) -> None:
    """A word planted into a validation document, often enough to become a token if it were seen."""
    folder = tmp_path / "planted"
    folder.mkdir()
    for document in read_documents(str(corpus)):
        (folder / document.id).write_text(document.text, encoding="utf-8")
    planted = " xylophonist" * 400
    # The side of a document is decided by the hash of its content: try numbers until it is held out.
    for attempt in range(300):
        (folder / "planted.txt").write_text(f"{attempt} {planted}", encoding="utf-8")
        store = recipe(folder, vocab_size=None).prepare(tmp_path / "stores" / str(attempt))
        if any("xylophonist" in text for text in texts_of(store, "validation")):
            break
    assert not any("xylophonist" in text for text in texts_of(store, "train"))
    word = store.tokenizer.encode(" xylophonist")
    assert len(word) > 4  # in pieces: no merge was learned from it
    seen = Tokenizer.train([planted, *texts_of(store, "train")], 400)
    assert len(seen.encode(" xylophonist")) == 1  # it would have been learned


def test_the_second_time_reuses_the_first(corpus: Path, tmp_path: Path) -> None:
    store = recipe(corpus).prepare(tmp_path)
    made = tokens_of(store).stat().st_mtime_ns
    again = recipe(corpus).prepare(tmp_path)
    assert again.fingerprint == store.fingerprint
    assert tokens_of(again).stat().st_mtime_ns == made


def test_whatever_changes_the_ids_changes_the_fingerprint(corpus: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(Tokenizer.train(["other text"], 280).to_json(), encoding="utf-8")
    other = tmp_path / "other"
    other.mkdir()
    for document in read_documents(str(corpus)):
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
    made = json.loads(Tokenizer.train([document.text for document in read_documents(str(corpus))], 400).to_json())
    made["model"]["vocab"] |= {f"unused{i}": i for i in range(len(made["model"]["vocab"]), 70_000)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
    store = recipe(corpus, tokenizer=str(tmp_path / "tokenizer.json")).prepare(tmp_path)
    assert store.train.read(0, 9).dtype == np.uint32
    assert sum(map(len, texts_of(store, "train"))) > 0


def test_a_cache_that_cannot_be_written_is_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot write to .*--data.cache"):
        recipe(corpus).prepare(tmp_path / "file" / "cache")


def test_a_large_corpus_has_the_same_ids(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above a size it is encoded in another way."""
    store = recipe(corpus).prepare(tmp_path / "a")
    monkeypatch.setattr(encoding_module, "FAST_ENCODER_MIN_BYTES", 1)
    ways = []

    def noted(
        backend: Backend, proven: tiktoken.Encoding | None, texts: Iterable[str], threads: int | None = None
    ) -> Iterator[NDArray[np.uint32]]:
        ways.append(proven)
        return encode(backend, proven, texts, threads)

    monkeypatch.setattr(fast_encoder, "encode", noted)
    again = recipe(corpus).prepare(tmp_path / "b")
    assert sum(way is not None for way in ways) == 2  # both sides; the audit counts its few texts as it likes
    for side in ("train", "validation"):
        assert [shard.sha256 for shard in getattr(store, side).shards] == [
            shard.sha256 for shard in getattr(again, side).shards
        ]


def test_a_tokenizer_learns_from_a_part_of_a_large_corpus(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A share of the documents that does not depend on their order, and is said."""
    of_recipe = recipe(corpus)
    kept = of_recipe.selection.prepare(tmp_path / "corpora")
    everything, some = (list(kept.texts("train", share)) for share in (1.0, 0.5))
    assert set(some) < set(everything)
    assert 0.2 < len(some) / len(everything) < 0.8
    monkeypatch.setattr(recipe_module, "TOKENIZER_TRAINING_BYTES", kept.n_bytes // 2)
    caplog.set_level("INFO")
    of_recipe.prepare(tmp_path)
    assert "training a bpe tokenizer on 50.0% of the training documents" in caplog.text


def test_a_store_of_its_own_folder(corpus: Path, tmp_path: Path) -> None:
    """With the text beside it, found by the same flags, and refused to others."""
    folder = tmp_path / "new" / "store"
    store = recipe(corpus).prepare(tmp_path / "cache", folder)
    assert tokens_of(store).parent == folder
    assert not (tmp_path / "cache").exists()
    kept = pyarrow.parquet.read_table(folder / "text" / "train.parquet")
    assert kept["text"].to_pylist() == texts_of(store, "train")
    made = tokens_of(store).stat().st_mtime_ns
    again = recipe(corpus).prepare(tmp_path / "cache", folder)
    assert (again.fingerprint, tokens_of(again).stat().st_mtime_ns) == (store.fingerprint, made)
    with pytest.raises(UserError, match="tokens of another vocab size; name another folder"):
        recipe(corpus, vocab_size=310).prepare(tmp_path / "cache", folder)
    assert recipe(corpus).prepare(tmp_path / "cache").fingerprint == store.fingerprint


def test_a_store_goes_where_its_text_is_not(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = tmp_path / "text"
    shutil.copytree(corpus, text)
    store = recipe(text).prepare(tmp_path, tmp_path / "store")
    assert "is not here as it was" not in caplog.text
    (text / "00.txt").write_text("another text", encoding="utf-8")
    assert recipe(text).prepare(tmp_path, tmp_path / "store").fingerprint == store.fingerprint
    assert "is not here as it was" in caplog.text
    caplog.clear()
    shutil.rmtree(text)
    assert recipe(text).prepare(tmp_path, tmp_path / "store").fingerprint == store.fingerprint
    assert "is not here as it was" in caplog.text


def test_a_store_is_not_put_where_something_else_is(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="has something else in it"):
        recipe(corpus).prepare(tmp_path, tmp_path / "notes")
    with pytest.raises(UserError, match="is inside"):
        recipe(tmp_path / "notes").prepare(tmp_path, tmp_path / "notes" / "tokens")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["a.txt"]


def test_another_tokenizer_in_the_same_file_is_another(corpus: Path, tmp_path: Path) -> None:
    path, folder = tmp_path / "tokenizer.json", tmp_path / "store"
    path.write_text(Tokenizer.train(["some text"], 260).to_json(), encoding="utf-8")
    recipe(corpus, tokenizer=str(path), vocab_size=None).prepare(tmp_path, folder)
    path.write_text(Tokenizer.train(["another one"], 262).to_json(), encoding="utf-8")
    with pytest.raises(UserError, match="tokens of another tokenizer"):
        recipe(corpus, tokenizer=str(path), vocab_size=None).prepare(tmp_path, folder)


def test_each_cleaning_has_its_own_audit(corpus: Path, tmp_path: Path) -> None:
    """Though they leave the same texts, and so the same tokens."""
    names = []
    for steps in ((), (ExactDuplicates(),), (Length(at_least=3),)):
        of = recipe(corpus, selection=CorpusSpec(((DocumentSource(str(corpus)), 1.0),), steps, 0.1))
        store = of.prepare(tmp_path)
        audit = json.loads(tokens_of(store).with_name("audit.json").read_text(encoding="utf-8"))
        names.append((store.fingerprint, *(step["name"] for step in audit["steps"][1:])))
    fingerprint = names[0][0]
    assert names == [(fingerprint,), (fingerprint, "ExactDuplicates"), (fingerprint, "Length")]


def test_long_texts_are_learned_in_whole_lines() -> None:
    texts = ["short", "line\n" * 2_000_000, "x" * 9_000_000]
    sliced = list(recipe_module._split_long_texts(texts))
    assert "".join(sliced) == "".join(texts)
    assert max(map(len, sliced)) <= recipe_module.BATCH_CHARACTERS
    assert all(piece.endswith("line\n") for piece in sliced[1:3])


@pytest.mark.parametrize(("processes", "said"), [("None", "done"), ("2", "if __name__ == '__main__'")])
def test_a_script_need_not_know_of_processes(tmp_path: Path, processes: str, said: str) -> None:
    """New processes import a script anew; one that is not made for that must not wait for itself."""
    (tmp_path / "text.txt").write_text("".join(f"line {n}\n" for n in range(9000)), encoding="utf-8")
    (tmp_path / "script.py").write_text(
        "from lit_gpt_scratch.text import cleaning_pipeline\n"
        "cleaning_pipeline.SINGLE_PROCESS_BYTES = 1\n"
        "from lit_gpt_scratch.data import PackedText\n"
        f"PackedText('text.txt', cache='cache', tokenizer='byte', processes={processes}).prepare_data()\n"
        "print('done')",
        encoding="utf-8",
    )
    root = str(Path(__file__).parents[2])
    ended = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, text=True,
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert said in ended.stdout + ended.stderr


def test_an_audit_counts_the_stores_tokens(corpus: Path, tmp_path: Path) -> None:
    store = recipe(corpus).prepare(tmp_path)
    audit = json.loads(tokens_of(store).with_name("audit.json").read_text(encoding="utf-8"))
    assert audit["tokens"] == "counted"
    in_store = {side: getattr(store, side).n_tokens - getattr(store, side).n_documents for side in audit["split"]}
    assert {side: about["tokens"] for side, about in audit["split"].items()} == in_store
    assert audit["steps"][-1]["tokens_out"] == sum(in_store.values())


def test_a_vocabulary_that_the_text_cannot_give_is_refused(corpus: Path, tmp_path: Path) -> None:
    store = recipe(corpus, vocab_size=None).prepare(tmp_path)
    assert store.tokenizer.vocab_size < 1024
    for _ in range(2):  # made anew, and found
        with pytest.raises(UserError, match=rf"is 1,024, but .* only {store.tokenizer.vocab_size} tokens"):
            recipe(corpus, vocab_size=1024).prepare(tmp_path)
    recipe(corpus, vocab_size=store.tokenizer.vocab_size).prepare(tmp_path)
    assert recipe(corpus, vocab_size=1024, tokenizer="char").prepare(tmp_path).tokenizer.vocab_size < 100


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits a forked process")
def test_a_full_disk_is_said_and_nothing_is_left(corpus: Path, tmp_path: Path) -> None:
    """No file may grow beyond a few bytes, as on a disk that is full."""
    script = (
        "import resource, sys; from tests.data.test_token_store import recipe; from pathlib import Path\n"
        "for limit in (100, 3000, 20_000):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "    try: recipe(sys.argv[1]).prepare(Path(sys.argv[2], str(limit)))\n"
        "    except Exception as error: print(type(error).__name__, error)"
    )
    command = [sys.executable, "-c", script, str(corpus), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    said = ended.stdout.splitlines()
    assert len(said) == 3
    for limit, line in zip((100, 3000, 20_000), said, strict=True):
        assert re.match(r"UserError cannot write to .*(File too large|disk).*--data.cache", line), line
        left = [path for path in (tmp_path / str(limit)).rglob("*") if path.is_file() and path.suffix != ".lock"]
        whole = [path for path in left if path.parent.parent.name == "corpora"]  # the text may be whole, the tokens not
        assert left == whole
        assert not whole or (whole[0].parent / "corpus.json").exists()


def test_a_folder_that_is_made_anew_has_the_new_tokenizers_ids(corpus: Path, tmp_path: Path) -> None:
    """In one process, as in a notebook."""
    folder = tmp_path / "store"
    for tokenizer in ("bpe", "byte"):
        store = recipe(corpus, tokenizer=tokenizer, vocab_size=None).prepare(tmp_path, folder)
        assert sorted(texts_of(store, "train") + texts_of(store, "validation")) == sorted(
            document.text for document in read_documents(str(corpus))
        )
        shutil.rmtree(folder)
