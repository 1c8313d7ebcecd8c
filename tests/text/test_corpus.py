"""Cleaned corpora: planted duplicates and leaks are found, the report adds up, processes do not change the result."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import cleaning_pipeline, cleaning_report, duplicates
from lit_gpt_scratch.text.cleaning import (
    CleaningStep,
    ControlCharacters,
    Length,
    MaskContacts,
    UnicodeNormalization,
    Whitespace,
)
from lit_gpt_scratch.text.corpus import CleanedCorpus, CorpusSpec, upgrade_stored_cleaning
from lit_gpt_scratch.text.decontamination import Leakage
from lit_gpt_scratch.text.duplicates import ExactDuplicates, NearDuplicates
from lit_gpt_scratch.text.parquet_io import read_parquet_documents
from lit_gpt_scratch.text.quality import GopherQuality
from lit_gpt_scratch.text.sources import DocumentSource
from tests.conftest import sentences


def write(path: Path, texts: Sequence[str]) -> DocumentSource:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return DocumentSource(str(path))


def corpus_of(
    folder: Path,
    texts: Sequence[str],
    *steps: CleaningStep,
    share: float = 0.1,
    processes: int = 1,
    max_bytes: int | None = None,
) -> CleanedCorpus:
    """Clean some texts; ids are ``a.jsonl:1`` and so on."""
    source = write(folder / "a.jsonl", texts)
    return CorpusSpec(((source, 1.0),), steps, share, max_bytes, processes).prepare(folder / "corpora")


def ids(corpus: CleanedCorpus) -> dict[str, set[int]]:
    """The rows in each split."""
    return {
        side: {
            int(document.id.split(":")[1]) - 1 for document in read_parquet_documents(corpus.folder / f"{side}.parquet")
        }
        for side in ("train", "validation")
    }


def check_report_adds_up(audit: dict) -> None:
    """In = kept + rejected, step by step, in documents and in bytes, and one step's output is the next one's input."""
    steps = audit["steps"]
    assert audit["documents_in"] == steps[0]["documents_in"]
    assert audit["documents_kept"] == steps[-1]["documents_out"]
    assert audit["documents_in"] == audit["documents_kept"] + sum(sum(step["rejected"].values()) for step in steps)
    for step in steps:
        assert step["documents_in"] == step["documents_out"] + sum(step["rejected"].values())
        if step["name"] not in EDITING:
            assert step["bytes_in"] == step["bytes_out"] + step["bytes_rejected"]
        assert set(step["examples"]) == set(step["rejected"])
    for before, after in pairwise(steps):
        assert (before["documents_out"], before["bytes_out"]) == (after["documents_in"], after["bytes_in"])


def words(rng: random.Random, n: int) -> list[str]:
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(2, 9))) for _ in range(n)]


EDITING = ("UnicodeNormalization", "ControlCharacters", "Whitespace", "MaskContacts")
EVERYTHING = (
    UnicodeNormalization(), ControlCharacters(), Whitespace(), Length(at_least=30), MaskContacts(), ExactDuplicates(),
    NearDuplicates(), Leakage(),
)  # fmt: skip


@given(data=st.data())
@settings(max_examples=25)
def test_report_adds_up_for_any_steps(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    texts = data.draw(st.lists(st.sampled_from([sentences(n, n) for n in range(1, 12)] + [" ", "\n", "x"]), min_size=4))
    steps = data.draw(st.lists(st.sampled_from(EVERYTHING[:-1]), max_size=5))
    corpus = corpus_of(tmp_path_factory.mktemp("corpus"), [sentences(99), *texts], *steps)
    check_report_adds_up(corpus.audit)
    kept = [document for side in ids(corpus) for document in read_parquet_documents(corpus.folder / f"{side}.parquet")]
    assert corpus.n_bytes == sum(len(document.text.encode()) for document in kept)
    assert corpus.audit["bytes_kept"] == corpus.n_bytes
    assert corpus.audit["documents_kept"] == len({document.id for document in kept})  # a single text is split in two


def test_exactly_the_exact_duplicates_are_removed(tmp_path: Path) -> None:
    rng = random.Random(0)
    originals = [" ".join(words(rng, 60)) for _ in range(500)]
    texts = originals + [rng.choice(originals) for _ in range(300)] + [f"{text} " for text in originals[:50]]
    rng.shuffle(texts)
    first = {text: place for place, text in reversed(list(enumerate(texts)))}
    corpus = corpus_of(tmp_path, texts, ExactDuplicates())
    sides = ids(corpus)
    assert sides["train"] | sides["validation"] == set(first.values())
    assert corpus.audit["steps"][1]["rejected"] == {"exact duplicate": 300}
    check_report_adds_up(corpus.audit)


def test_near_duplicate_recall_and_precision(tmp_path: Path) -> None:
    """At least 95% of pairs with similarity 0.85 are found, and at most 1% of those below 0.7."""
    rng = random.Random(1)

    def edited(text: list[str], share: float) -> list[str]:
        """Replace words one by one while the similarity stays at least ``share``."""
        copy, places = list(text), rng.sample(range(len(text)), len(text))
        for place in places:
            before, copy[place] = copy[place], f"new{place}"
            if jaccard(text, copy) < share:
                copy[place] = before
                break
        return copy

    def jaccard(a: list[str], b: list[str]) -> float:
        sets = [set(zip(*(text[i:] for i in range(5)), strict=False)) for text in (a, b)]
        return len(sets[0] & sets[1]) / len(sets[0] | sets[1])

    def less(text: list[str]) -> list[str]:
        """One more word than leaves 0.7 in common."""
        copy = edited(text, 0.7)
        place = next(place for place, word in enumerate(copy) if not word.startswith("new"))
        while jaccard(text, copy) >= 0.7:
            copy[place] = f"new{place}"
            place += 7
        return copy

    originals = [words(rng, 300) for _ in range(800)]
    near = [edited(text, 0.85) for text in originals[:400]]
    apart = [less(text) for text in originals[400:]]
    assert all(0.85 <= jaccard(a, b) < 0.88 for a, b in zip(originals, near, strict=False))
    assert all(0.6 < jaccard(a, b) < 0.7 for a, b in zip(originals[400:], apart, strict=True))
    corpus = corpus_of(tmp_path, [" ".join(text) for text in [*originals, *near, *apart]], NearDuplicates())
    sides = ids(corpus)
    gone = set(range(1600)) - sides["train"] - sides["validation"]
    assert not gone & set(range(800))
    assert len(gone & set(range(800, 1200))) >= 0.95 * 400
    assert len(gone & set(range(1200, 1600))) <= 0.01 * 400
    check_report_adds_up(corpus.audit)


def test_every_leak_of_validation_text_is_found(tmp_path: Path) -> None:
    """Passages of validation documents, planted into training documents with other case and punctuation."""
    rng = random.Random(2)
    plain = [words(rng, 200) for _ in range(300)]
    held_out = ids(corpus_of(tmp_path, [" ".join(text) for text in plain], share=0.1))["validation"]
    free = [place for place in range(300) if place not in held_out]
    leaking, texts = free[:60], list(plain)
    for place in leaking:
        passage = rng.choice(sorted(held_out))
        start, length = rng.randrange(0, 180), rng.randrange(13, 20)
        at = rng.randrange(0, 200)
        planted = [word.upper() + "," for word in plain[passage][start : start + length]]
        texts[place] = [*plain[place][:at], *planted, *plain[place][at:]]
    almost = free[60:100]
    for place in almost:  # one word short of an n-gram
        start = rng.randrange(0, 180)
        texts[place] = plain[place] + plain[rng.choice(sorted(held_out))][start : start + 12]
    folder = tmp_path / "leaking"
    folder.mkdir()
    lines = [" ".join(text) for text in texts]
    without, with_step = corpus_of(folder, lines, share=0.1), corpus_of(folder, lines, Leakage(), share=0.1)
    assert ids(without)["validation"] == ids(with_step)["validation"]
    caught = ids(without)["train"] - ids(with_step)["train"]
    # A document with a planted passage may itself be in the validation split; then it is not a leak.
    sources = ids(with_step)["validation"]
    assert caught <= set(leaking)
    runs = {tuple(plain[place][i : i + 13]) for place in sources & set(held_out) for i in range(188)}
    leaks = {
        place
        for place in ids(without)["train"]
        if any(tuple(word.strip(",").lower() for word in texts[place][i : i + 13]) in runs for i in range(220))
    }
    assert len(leaks) > 40
    assert leaks <= caught
    check_report_adds_up(with_step.audit)
    assert with_step.audit["steps"][-1]["rejected"] == {"n-gram overlap with validation": len(caught)}


CLEAN = """
import sys
from pathlib import Path
from lit_gpt_scratch.text import cleaning_pipeline
from lit_gpt_scratch.text.cleaning import ControlCharacters, Length, MaskContacts, Whitespace
from lit_gpt_scratch.text.corpus import CorpusSpec
from lit_gpt_scratch.text.duplicates import ExactDuplicates, NearDuplicates
from lit_gpt_scratch.text.decontamination import Leakage
from lit_gpt_scratch.text.sources import DocumentSource

if __name__ == "__main__":
    pipeline = cleaning_pipeline
    pipeline.SINGLE_PROCESS_BYTES, pipeline.BATCH_BYTES, pipeline.BATCH_DOCUMENTS = 1, 3000, 20
    steps = ControlCharacters(), ExactDuplicates(), Whitespace(), Length(30), MaskContacts(), NearDuplicates()
    for n in (1, 2, 3):
        folder = Path(sys.argv[2], str(n))
        folder.mkdir()
        CorpusSpec(((DocumentSource(sys.argv[1]), 1.0),), (*steps, Leakage()), 0.1, None, n).write(folder)
"""


@pytest.mark.slow
def test_result_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    """In a separate program: spawned worker processes import the main module again."""
    rng = random.Random(3)
    texts = [
        " ".join(words(rng, rng.randrange(1, 120))) + rng.choice(["", "\r\n", "\0", " a@b.org"]) for _ in range(900)
    ]
    texts += rng.sample(texts, 100)
    write(tmp_path / "a.jsonl", texts)
    (tmp_path / "clean.py").write_text(CLEAN, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "clean.py"), str(tmp_path / "a.jsonl"), str(tmp_path)]
    root = str(Path(__file__).parents[2])
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": root})
    made = {n: {path.name: path.read_bytes() for path in sorted((tmp_path / str(n)).iterdir())} for n in (1, 2, 3)}
    assert made[1] == made[2] == made[3]
    assert set(made[1]) == {
        "audit.json", "audit.md", "corpus.json", "sample.json", "train.parquet", "validation.parquet"
    }  # fmt: skip
    audit = json.loads(made[1]["audit.json"])
    check_report_adds_up(audit)
    assert audit["steps"][2]["rejected"]["exact duplicate"] > 0


def test_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    rng = random.Random(4)
    texts = {name: [" ".join([name, *words(rng, 100)]) for _ in range(400)] for name in ("a", "b", "c")}
    sources = [write(tmp_path / f"{name}.jsonl", lines) for name, lines in texts.items()]
    weighted = tuple(zip(sources, (2.0, 1.0, 0.5), strict=True))
    corpus = CorpusSpec(weighted, (), 0.1).prepare(tmp_path / "corpora")
    kept = [
        document
        for side in ("train", "validation")
        for document in read_parquet_documents(corpus.folder / f"{side}.parquet")
    ]
    n_bytes = {name: sum(len(d.text) for d in kept if d.text.startswith(f"{name} ")) for name in texts}
    assert sum(document.text.startswith("a ") for document in kept) == 400  # all of the scarcest source
    assert n_bytes["b"] / n_bytes["a"] == pytest.approx(1 / 2, rel=0.15)
    assert n_bytes["c"] / n_bytes["a"] == pytest.approx(1 / 4, rel=0.25)
    assert all(document.id.startswith(f"{tmp_path}/{document.text[0]}.jsonl:") for document in kept)
    check_report_adds_up(corpus.audit)
    assert [step["name"] for step in corpus.audit["steps"]] == ["reading", "mixing"]
    reversed_ = CorpusSpec(weighted[::-1], (), 0.1).prepare(tmp_path / "corpora")
    again = [
        document
        for side in ("train", "validation")
        for document in read_parquet_documents(reversed_.folder / f"{side}.parquet")
    ]
    assert {document.id for document in again} == {document.id for document in kept}


def test_source_that_cannot_be_mixed_is_named(tmp_path: Path) -> None:
    small, large = write(tmp_path / "small.jsonl", ["a b"]), write(tmp_path / "large.jsonl", ["c d " * 99])
    with pytest.raises(UserError, match=r"the weight of .*large\.jsonl is too low to include any"):
        CorpusSpec(((small, 1.0), (large, 1.0)), (), 0.1).prepare(tmp_path / "corpora")
    empty = write(tmp_path / "empty.jsonl", ["  "])
    with pytest.raises(UserError, match=r"no documents of .*empty\.jsonl are left after cleaning"):
        CorpusSpec(((small, 1.0), (empty, 1.0)), (), 0.1).prepare(tmp_path / "corpora")


def test_document_left_empty_is_rejected(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [sentences(0), "\u200b", "\u200b \n", sentences(1)], ControlCharacters())
    assert corpus.audit["steps"][1]["rejected"] == {"empty after cleaning": 2}
    check_report_adds_up(corpus.audit)


def test_same_size_and_time_elsewhere_is_another_source(tmp_path: Path) -> None:
    """Archives and container images produce files of the same name, size and time."""
    found = []
    for name, word in (("a", "fruit"), ("b", "stone")):
        (tmp_path / name).mkdir()
        source = write(tmp_path / name / "text.jsonl", [f"{word} {n}" for n in range(9)])
        os.utime(source.name, ns=(1, 1))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path / name)
            corpus = CorpusSpec(((DocumentSource("text.jsonl"), 1.0),), (), 0.1).prepare(tmp_path / "corpora")
        found.append(next(corpus.texts("train")).split()[0])
    assert found == ["fruit", "stone"]


def test_null_setting_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Length\.at_least is null"):
        corpus_of(tmp_path, ["a"], Length(at_least=None))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="CleaningStep is not a PerDocumentStep"):
        corpus_of(tmp_path, ["a"], CleaningStep())


def test_hub_options_are_rejected_if_all_sources_are_files() -> None:
    """Mixed with a Hub dataset, a file ignores them."""
    for options in ({"config": "x"}, {"split": "test"}, {"streaming": True}):
        with pytest.raises(UserError, match="apply only to Hub datasets; remove them for stdlib"):
            CorpusSpec(((DocumentSource("stdlib", **options), 1.0),), (), 0.1)
        CorpusSpec(
            ((DocumentSource("stdlib", **options), 1.0), (DocumentSource("owner/name", **options), 1.0)), (), 0.1
        )


def test_max_bytes_limits_reading(tmp_path: Path) -> None:
    texts = [f"{n:03} " + "x" * 96 for n in range(100)]
    corpus = corpus_of(tmp_path, texts, max_bytes=1950)
    assert corpus.audit["documents_in"] == 20
    assert corpus.n_bytes == 2000


def test_error_names_the_steps_that_rejected_everything(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        corpus_of(tmp_path, [sentences(n) for n in range(7)] + ["short"], Length(at_least=10), GopherQuality(500))
    assert str(error.value).startswith("none of the 8 documents of ")
    assert "Length rejected 1 (fewer than 10 characters), GopherQuality rejected 7 (number of words)" in str(
        error.value
    )
    assert not [path for path in (tmp_path / "corpora").iterdir() if path.suffix != ".lock"]


def test_text_of_one_letter_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains too little text for a validation split"):
        corpus_of(tmp_path, ["a"])


def test_nul_byte_is_rejected_unless_a_step_removes_it(tmp_path: Path) -> None:
    texts = [sentences(0), "a\0b " * 9]
    with pytest.raises(UserError, match=r"a\.jsonl:2 contains a NUL byte.*ControlCharacters"):
        corpus_of(tmp_path, texts)
    assert corpus_of(tmp_path, texts, ControlCharacters()).audit["documents_kept"] == 2


def test_decontamination_steps_come_last(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Length must come before Leakage"):
        corpus_of(tmp_path, ["a"], Leakage(), Length())
    with pytest.raises(UserError, match="Leakage requires validation documents, but the corpus consists of"):
        corpus_of(tmp_path, [sentences(0)], Leakage())


def test_each_setting_changes_the_cache_key(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [sentences(n) for n in range(20)])
    folders = {
        CorpusSpec(((source, 1.0),), steps, share, limit).prepare(tmp_path / "corpora").folder
        for steps, share, limit in [
            ((), 0.1, None), ((Whitespace(),), 0.1, None), ((Whitespace(0),), 0.1, None), ((), 0.2, None), ((), 0.1, 99)
        ]
    }  # fmt: skip
    assert len(folders) == 5
    same = CorpusSpec(((source, 1.0),), (), 0.1, processes=3).prepare(tmp_path / "corpora")
    assert same.folder in folders


def test_settings_stored_by_version_0_1_still_match() -> None:
    source = DocumentSource("stdlib")
    steps = (Length(), GopherQuality(), ExactDuplicates(), Leakage())
    stored = [
        "Length(at_least=1, at_most=None) e4fa37893ecb56c8", f"{GopherQuality()!r} 790f8039a5ec7fa8",
        "ExactDuplicates() f192f1cb0df98d89", "Leakage(words=13, least=8) ef71f33303efd7d9",
    ]  # fmt: skip
    settings = CorpusSpec(((source, 1.0),), steps, 0.1).settings
    assert upgrade_stored_cleaning(stored) == settings["cleaning"]
    assert settings["source"] == [
        ["Source(name='stdlib', column='text', config=None, split='train', streaming=False)", 1.0]
    ]
    assert upgrade_stored_cleaning(["Length(at_least=1, at_most=None) of_another_version"]) != settings["cleaning"][:1]
    assert upgrade_stored_cleaning(["ExactDuplicates() 824cac3d6f438e0b"]) == [settings["cleaning"][2]]


def test_fingerprint_changes_with_every_document(tmp_path: Path) -> None:
    texts = [sentences(n) for n in range(5)]
    seen = set()
    for i, change in enumerate([None, *range(5)]):
        folder = tmp_path / str(i)
        folder.mkdir()
        changed = [f"{text} " if place == change else text for place, text in enumerate(texts)]
        seen.add(corpus_of(folder, changed).fingerprint)
    assert len(seen) == 6
    again = tmp_path / "again"
    again.mkdir()
    assert corpus_of(again, texts).fingerprint in seen


def test_tokens_are_counted_or_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [sentences(n % 40) + "  " * 9 + "\n\n\n\n" for n in range(60)]
    steps = (Whitespace(), ExactDuplicates())

    def words_of(texts: Sequence[str]) -> list[int]:
        return [text.count(" ") for text in texts]

    corpus = corpus_of(tmp_path, texts, *steps)
    exact = cleaning_report.add_token_counts(corpus.audit, corpus.sample, words_of, 0)
    assert exact["tokens"] == "counted"
    cleaned = [text.replace("  " * 9 + "\n\n\n\n", "\n\n") for text in texts]
    expected = [
        *(sum(words_of(texts)), sum(words_of(texts))),
        *(sum(words_of(texts)), sum(words_of(cleaned))),
        *(sum(words_of(cleaned)), sum(words_of(list(set(cleaned))))),
    ]
    assert [step[f"tokens_{side}"] for step in exact["steps"] for side in ("in", "out")] == expected
    monkeypatch.setattr(cleaning_report, "SAMPLE_BYTES", 30_000)
    folder = tmp_path / "sampled"
    folder.mkdir()
    sampled = corpus_of(folder, texts, *steps)
    assert 0 < len(sampled.sample) < 30
    estimated = cleaning_report.add_token_counts(sampled.audit, sampled.sample, words_of, expected[-1])
    assert estimated["tokens"] == f"estimated from {len(sampled.sample)} documents; exact after the last step"
    assert estimated["steps"][-1]["tokens_out"] == expected[-1]
    found = [step[f"tokens_{side}"] for step in estimated["steps"] for side in ("in", "out")]
    assert np.allclose(found, expected, rtol=0.05)


def test_report_page_has_examples_and_an_aligned_table(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [sentences(n) for n in range(9)] + ["the short one"], Length(at_least=20))
    page = (corpus.folder / "audit.md").read_text(encoding="utf-8")
    assert "9 of 10 documents kept" in page
    assert "## Length: fewer than 20 characters (1)" in page
    assert "- `a.jsonl:10`: `the short one`" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1  # aligned
    assert rows[-1].split("|")[1:4] == [" Length  ", "           10 ", "   9 "]


def test_families_of_near_duplicates_leave_the_share_as_it_is(tmp_path: Path) -> None:
    """300 documents in a chain of edits and 200 from a template were once 71% of the held-out bytes."""
    rng = random.Random(0)
    chain = [words(rng, 120)]
    for _ in range(299):
        copy = list(chain[-1])
        for place in rng.sample(range(120), 3):
            copy[place] = "".join(rng.choices("abcdefgh", k=6))
        chain.append(copy)
    template = words(rng, 110)
    documents = [*chain, *([*template, *words(rng, 10)] for _ in range(200)), *(words(rng, 120) for _ in range(200))]
    texts = [" ".join(document) for document in documents]
    rng.shuffle(texts)
    corpus = corpus_of(tmp_path, texts, ExactDuplicates(), share=0.05)
    split = corpus.audit["split"]
    assert 0.05 / 1.3 <= split["validation"]["bytes"] / corpus.n_bytes <= 0.05 * 1.3
    assert 0.05 / 1.3 <= split["validation"]["documents"] / len(texts) <= 0.05 * 1.3
    [remark] = corpus.audit["remarks"]
    assert remark.startswith("300 documents are near-duplicates of each other and ")
    assert f"- {remark}\n" in (corpus.folder / "audit.md").read_text(encoding="utf-8")
    assert cleaning_report.read_remarks(corpus.folder) == [remark]


def test_truncated_comparisons_of_near_duplicates_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit, near-duplicates may be kept, but not silently."""
    rng = random.Random(0)
    shared = words(rng, 200)
    texts = [" ".join([*shared, *words(rng, 60)]) for _ in range(300)]
    found = {}
    for limit in (1000, 5):
        monkeypatch.setattr(duplicates, "MAX_CANDIDATES", limit)
        folder = tmp_path / str(limit)
        folder.mkdir()
        corpus = corpus_of(folder, texts, NearDuplicates(similarity=0.8))
        found[limit] = [remark for remark in corpus.audit["remarks"] if remark.startswith("NearDuplicates ")]
    assert found[1000] == []
    [remark] = found[5]
    n_truncated = int(remark.split()[2])
    assert 0 < n_truncated <= corpus.audit["documents_kept"]
    assert "with only 5 of the documents that share a band" in remark


@pytest.mark.parametrize("content", [None, "[]", "{", '{"remarks": 5}', '{"remarks": [5, "one"]}', "[" * 20_000])
def test_remarks_of_an_unusable_report_are_ignored(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "audit.json").write_text(content, encoding="utf-8")
    assert cleaning_report.read_remarks(tmp_path) == (["one"] if content and "one" in content else [])


def test_read_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of items that were read but not processed yet has a limit."""
    read = done = 0
    most = 0

    def items() -> object:
        nonlocal read, most
        for _ in range(400):
            read += 1
            most = max(most, read - done)
            yield cleaning_pipeline.PipelineItem(document=None, source_index=0, sizes=[cleaning_pipeline.BATCH_BYTES])  # type: ignore[arg-type]

    class Now:
        def submit(self, work: object, batch: object) -> object:
            class Done:
                def result(self) -> object:
                    nonlocal done
                    done += len(batch)  # type: ignore[arg-type]
                    return batch

            return Done()

    pool = cleaning_pipeline.LazyProcessPool(2)
    monkeypatch.setattr(pool, "_start", Now)
    monkeypatch.setattr(cleaning_pipeline, "SINGLE_PROCESS_BYTES", 0)
    assert sum(len(batch) for batch in pool.map(lambda batch: batch, cleaning_pipeline._make_batches(items()))) == 400  # type: ignore[arg-type]
    assert most <= 2 * cleaning_pipeline.QUEUED_BATCHES + 3
