"""A token store is made once, contains exactly the documents, and is never incomplete."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tiktoken
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend

from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.data import prepare_tokens as prepare_module
from lit_gpt_scratch.data.prepare_tokens import TokenPreparation
from lit_gpt_scratch.data.token_store import TokenStore
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import fast_encoder
from lit_gpt_scratch.text import tokenize_corpus as encoding_module
from lit_gpt_scratch.text.cleaning import Length
from lit_gpt_scratch.text.corpus import CorpusSpec
from lit_gpt_scratch.text.duplicates import ExactDuplicates
from lit_gpt_scratch.text.fast_encoder import encode_batch
from lit_gpt_scratch.text.sources import DocumentSource, read_documents
from lit_gpt_scratch.text.tokenizer import Tokenizer
from tests.end_to_end import forked


def token_preparation(source: Path | str, **changes: object) -> TokenPreparation:
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


def test_every_document_is_complete_and_in_one_split(corpus: Path, tmp_path: Path) -> None:
    store = token_preparation(corpus).prepare(tmp_path)
    sides = texts_of(store, "train") + texts_of(store, "validation")
    assert sorted(sides) == sorted(document.text for document in read_documents(str(corpus)))
    for side in ("train", "validation"):
        stream = getattr(store, side)
        assert stream.n_documents == len(texts_of(store, side)) > 0
        assert stream.n_bytes == sum(len(text.encode()) for text in texts_of(store, side))
        assert stream.n_tokens == len(stream.read(0, 10**9))
        assert stream.read(0, 9).dtype == np.uint16


def test_tokenizer_is_not_trained_on_validation_text(corpus: Path, tmp_path: Path) -> None:
    """A word in a validation document, frequent enough to become a token if it were used for training."""
    folder = tmp_path / "planted"
    folder.mkdir()
    for document in read_documents(str(corpus)):
        (folder / document.id).write_text(document.text, encoding="utf-8")
    planted = " xylophonist" * 400
    # The split depends on the hash of the content: try numbers until the document is held out.
    for attempt in range(300):
        (folder / "planted.txt").write_text(f"{attempt} {planted}", encoding="utf-8")
        store = token_preparation(folder, vocab_size=None).prepare(tmp_path / "stores" / str(attempt))
        if any("xylophonist" in text for text in texts_of(store, "validation")):
            break
    assert not any("xylophonist" in text for text in texts_of(store, "train"))
    word = store.tokenizer.encode(" xylophonist")
    assert len(word) > 4  # in pieces: no merge was learned from it
    seen = Tokenizer.train([planted, *texts_of(store, "train")], 400)
    assert len(seen.encode(" xylophonist")) == 1  # it would have been learned


def test_store_is_reused(corpus: Path, tmp_path: Path) -> None:
    store = token_preparation(corpus).prepare(tmp_path)
    made = tokens_of(store).stat().st_mtime_ns
    again = token_preparation(corpus).prepare(tmp_path)
    assert again.fingerprint == store.fingerprint
    assert tokens_of(again).stat().st_mtime_ns == made


def test_fingerprint_changes_with_the_ids(corpus: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(Tokenizer.train(["other text"], 280).to_json(), encoding="utf-8")
    other = tmp_path / "other"
    other.mkdir()
    for document in read_documents(str(corpus)):
        (other / document.id).write_text(document.text, encoding="utf-8")
    same = token_preparation(other).prepare(tmp_path / "c")
    (other / "00.txt").write_text("one more line\n" * 40, encoding="utf-8")
    stores = [
        token_preparation(corpus).prepare(tmp_path / "c"),
        token_preparation(corpus, vocab_size=310).prepare(tmp_path / "c"),
        token_preparation(corpus, validation_share=0.3).prepare(tmp_path / "c"),
        token_preparation(corpus, tokenizer=str(tokenizer)).prepare(tmp_path / "c"),
        token_preparation(other).prepare(tmp_path / "c"),
    ]
    assert same.fingerprint == stores[0].fingerprint  # the same text elsewhere is the same text
    assert len({store.fingerprint for store in stores}) == 5
    assert stores[3].tokenizer.to_json() == tokenizer.read_text(encoding="utf-8")


def test_large_vocabularies_use_uint32(corpus: Path, tmp_path: Path) -> None:
    made = json.loads(Tokenizer.train([document.text for document in read_documents(str(corpus))], 400).to_json())
    made["model"]["vocab"] |= {f"unused{i}": i for i in range(len(made["model"]["vocab"]), 70_000)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
    store = token_preparation(corpus, tokenizer=str(tmp_path / "tokenizer.json")).prepare(tmp_path)
    assert store.train.read(0, 9).dtype == np.uint32
    assert sum(map(len, texts_of(store, "train"))) > 0


def test_unwritable_cache_is_named_in_the_error(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot write to .*--data.cache"):
        token_preparation(corpus).prepare(tmp_path / "file" / "cache")


def test_fast_encoder_gives_the_same_ids(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large corpora are encoded by another implementation."""
    store = token_preparation(corpus).prepare(tmp_path / "a")
    monkeypatch.setattr(encoding_module, "FAST_ENCODER_MIN_BYTES", 1)
    ways = []

    def noted(
        backend: Backend, proven: tiktoken.Encoding | None, texts: Iterable[str], threads: int | None = None
    ) -> Iterator[NDArray[np.uint32]]:
        ways.append(proven)
        return encode_batch(backend, proven, texts, threads)

    monkeypatch.setattr(fast_encoder, "encode_batch", noted)
    again = token_preparation(corpus).prepare(tmp_path / "b")
    assert sum(way is not None for way in ways) == 2  # both splits; the audit may count its few texts either way
    for side in ("train", "validation"):
        assert [shard.sha256 for shard in getattr(store, side).shards] == [
            shard.sha256 for shard in getattr(again, side).shards
        ]


def test_tokenizer_is_trained_on_a_share_of_a_large_corpus(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The share does not depend on the order of documents, and is logged."""
    preparation = token_preparation(corpus)
    kept = preparation.selection.prepare(tmp_path / "corpora")
    everything, some = (list(kept.texts("train", share)) for share in (1.0, 0.5))
    assert set(some) < set(everything)
    assert 0.2 < len(some) / len(everything) < 0.8
    monkeypatch.setattr(prepare_module, "TOKENIZER_TRAINING_BYTES", kept.n_bytes // 2)
    caplog.set_level("INFO")
    preparation.prepare(tmp_path)
    assert "training a bpe tokenizer on 50.0% of the training documents" in caplog.text


def test_store_in_its_own_folder(corpus: Path, tmp_path: Path) -> None:
    """It includes the text, is found by the same settings, and is rejected with others."""
    folder = tmp_path / "new" / "store"
    store = token_preparation(corpus).prepare(tmp_path / "cache", folder)
    assert tokens_of(store).parent == folder
    assert not (tmp_path / "cache").exists()
    kept = pyarrow.parquet.read_table(folder / "text" / "train.parquet")
    assert kept["text"].to_pylist() == texts_of(store, "train")
    made = tokens_of(store).stat().st_mtime_ns
    again = token_preparation(corpus).prepare(tmp_path / "cache", folder)
    assert (again.fingerprint, tokens_of(again).stat().st_mtime_ns) == (store.fingerprint, made)
    with pytest.raises(UserError, match=r"with different settings \(vocab size\); set --data.store to another folder"):
        token_preparation(corpus, vocab_size=310).prepare(tmp_path / "cache", folder)
    assert token_preparation(corpus).prepare(tmp_path / "cache").fingerprint == store.fingerprint


def test_store_works_without_its_source(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = tmp_path / "text"
    shutil.copytree(corpus, text)
    store = token_preparation(text).prepare(tmp_path, tmp_path / "store")
    assert "has changed or is missing" not in caplog.text
    (text / "00.txt").write_text("another text", encoding="utf-8")
    assert token_preparation(text).prepare(tmp_path, tmp_path / "store").fingerprint == store.fingerprint
    assert "has changed or is missing" in caplog.text
    caplog.clear()
    shutil.rmtree(text)
    assert token_preparation(text).prepare(tmp_path, tmp_path / "store").fingerprint == store.fingerprint
    assert "has changed or is missing" in caplog.text


def test_store_folder_with_other_content_is_rejected(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="is neither an empty folder nor a token store"):
        token_preparation(corpus).prepare(tmp_path, tmp_path / "notes")
    with pytest.raises(UserError, match="is inside"):
        token_preparation(tmp_path / "notes").prepare(tmp_path, tmp_path / "notes" / "tokens")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["a.txt"]


def test_changed_tokenizer_file_is_detected(corpus: Path, tmp_path: Path) -> None:
    path, folder = tmp_path / "tokenizer.json", tmp_path / "store"
    path.write_text(Tokenizer.train(["some text"], 260).to_json(), encoding="utf-8")
    token_preparation(corpus, tokenizer=str(path), vocab_size=None).prepare(tmp_path, folder)
    path.write_text(Tokenizer.train(["another one"], 262).to_json(), encoding="utf-8")
    with pytest.raises(UserError, match=r"tokens prepared with different settings \(tokenizer\)"):
        token_preparation(corpus, tokenizer=str(path), vocab_size=None).prepare(tmp_path, folder)


def test_each_cleaning_has_its_own_audit(corpus: Path, tmp_path: Path) -> None:
    """Even if the resulting texts, and so the tokens, are equal."""
    names = []
    for steps in ((), (ExactDuplicates(),), (Length(at_least=3),)):
        of = token_preparation(corpus, selection=CorpusSpec(((DocumentSource(str(corpus)), 1.0),), steps, 0.1))
        store = of.prepare(tmp_path)
        audit = json.loads(tokens_of(store).with_name("audit.json").read_text(encoding="utf-8"))
        names.append((store.fingerprint, *(step["name"] for step in audit["steps"][1:])))
    fingerprint = names[0][0]
    assert names == [(fingerprint,), (fingerprint, "ExactDuplicates"), (fingerprint, "Length")]


def test_long_texts_are_split_at_line_ends() -> None:
    texts = ["short", "line\n" * 2_000_000, "x" * 9_000_000]
    sliced = list(prepare_module._split_long_texts(texts))
    assert "".join(sliced) == "".join(texts)
    assert max(map(len, sliced)) <= prepare_module.BATCH_CHARACTERS
    assert all(piece.endswith("line\n") for piece in sliced[1:3])


@pytest.mark.parametrize(
    ("spec", "script", "uses_all_cores"),
    [(None, "my_script.py", False), (None, "bin/lit-gpt", True), (ModuleSpec("x", None), "x/fit.py", True)],
)
def test_commands_use_all_cores(
    monkeypatch: pytest.MonkeyPatch, spec: ModuleSpec | None, script: str, uses_all_cores: bool
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert PackedText().preparation.selection.processes == (6 if uses_all_cores else 1)


@pytest.mark.parametrize(
    ("processes", "message"),
    [("None", "done"), ("2", "if __name__ == '__main__'")],
)
@pytest.mark.slow
def test_script_without_main_guard(tmp_path: Path, processes: str, message: str) -> None:
    """New processes import the script again; a script without a main guard must not hang."""
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
    assert message in ended.stdout + ended.stderr


def test_audit_counts_the_tokens_of_the_store(corpus: Path, tmp_path: Path) -> None:
    store = token_preparation(corpus).prepare(tmp_path)
    audit = json.loads(tokens_of(store).with_name("audit.json").read_text(encoding="utf-8"))
    assert audit["tokens"] == "counted"
    in_store = {side: getattr(store, side).n_tokens - getattr(store, side).n_documents for side in audit["split"]}
    assert {side: about["tokens"] for side, about in audit["split"].items()} == in_store
    assert audit["steps"][-1]["tokens_out"] == sum(in_store.values())


def test_vocab_size_larger_than_the_text_yields_is_rejected(corpus: Path, tmp_path: Path) -> None:
    store = token_preparation(corpus, vocab_size=None).prepare(tmp_path)
    assert store.tokenizer.vocab_size < 1024
    for _ in range(2):  # newly made, and loaded
        with pytest.raises(UserError, match=rf"is 1,024, but .* only {store.tokenizer.vocab_size} tokens"):
            token_preparation(corpus, vocab_size=1024).prepare(tmp_path)
    token_preparation(corpus, vocab_size=store.tokenizer.vocab_size).prepare(tmp_path)
    assert token_preparation(corpus, vocab_size=1024, tokenizer="char").prepare(tmp_path).tokenizer.vocab_size < 100


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits a forked process")
def test_full_disk_is_reported_and_leaves_no_files(corpus: Path, tmp_path: Path) -> None:
    """A file size limit simulates a full disk."""
    script = (
        "import resource, sys; from tests.data.test_token_store import token_preparation; from pathlib import Path\n"
        "found = []\n"
        "for limit in (100, 3000, 20_000, resource.RLIM_INFINITY):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "    if limit == resource.RLIM_INFINITY: break  # so that the messages can be written\n"
        "    try: token_preparation(sys.argv[1]).prepare(Path(sys.argv[2], str(limit)))\n"
        "    except Exception as error: found.append(f'{type(error).__name__} {error}')\n"
        "print(*found, sep='\\n')"
    )
    ended = forked.python(script, corpus, tmp_path)
    assert ended.code == 0, ended.err
    message = ended.out.splitlines()
    assert len(message) == 3
    for limit, line in zip((100, 3000, 20_000), message, strict=True):
        assert re.match(r"UserError cannot write to .*(File too large|disk).*--data.cache", line), line
        left = [path for path in (tmp_path / str(limit)).rglob("*") if path.is_file() and path.suffix != ".lock"]
        whole = [
            path for path in left if path.parent.parent.name == "corpora"
        ]  # the text may be complete, the tokens not
        assert left == whole
        assert not whole or (whole[0].parent / "corpus.json").exists()


def test_rebuilt_folder_has_the_ids_of_the_new_tokenizer(corpus: Path, tmp_path: Path) -> None:
    """Within one process, as in a notebook."""
    folder = tmp_path / "store"
    for tokenizer in ("bpe", "byte"):
        store = token_preparation(corpus, tokenizer=tokenizer, vocab_size=None).prepare(tmp_path, folder)
        assert sorted(texts_of(store, "train") + texts_of(store, "validation")) == sorted(
            document.text for document in read_documents(str(corpus))
        )
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "content", ["[" * 20_000 + "]" * 20_000, '{"steps": ' + "[" * 20_000 + "]" * 20_000 + "}", "[]"]
)
def test_unusable_audit_of_a_store_is_ignored(corpus: Path, tmp_path: Path, content: str) -> None:
    store = tmp_path / "store"
    PackedText(str(corpus), store=str(store), cache=str(tmp_path / "cache"), vocab_size=300).prepare_data()
    (store / "audit.json").write_text(content, encoding="utf-8")
    data = PackedText(mixture=str(store), block_size=32)
    assert data.cleaning_reports == []
    assert not [warning for warning in data.validation_warnings() if "audit" in warning]
