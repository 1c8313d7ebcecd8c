"""``prepare``: from any text to tokens and a cleaning report; mistakes are one-line errors."""

import gzip
import json
from pathlib import Path

import pytest
import yaml

from lit_gpt_scratch.text.atomic_files import find_unfinished
from tests.conftest import sentences
from tests.end_to_end.conftest import Command
from tests.text.test_corpus import check_report_adds_up

CLEANING = """
data:
  init_args:
    text_column: message
    validation_share: 0.2
    cleaning:
    - Whitespace
    - class_path: Length
      init_args: {at_least: 10}
    - class_path: GopherRepetition
      init_args: {ngrams: false}
    - ExactDuplicates
    - NearDuplicates
    - Leakage
"""


@pytest.fixture
def messages(tmp_path: Path) -> Path:
    """A table with rows that each step rejects."""
    rows = [sentences(n, 12).replace("\n", " ") for n in range(40)]
    rows += [*rows[:5], "short", "", "again and again " * 40]
    path = tmp_path / "messages.tsv"
    path.write_text("label\tmessage\n" + "".join(f"x\t{row}\n" for row in rows), encoding="utf-8")
    return path


def test_one_config_prepares_and_trains(command: Command, small: list[str], messages: Path, cache: Path) -> None:
    Path("clean.yaml").write_text(CLEANING, encoding="utf-8")
    kept = [flag for flag in small if not flag.startswith(("--data.source", "--data.validation_share"))]
    flags = [*kept, "--config=clean.yaml", f"--data.source={messages}", "--data.vocab_size=null"]
    made = command("prepare", *flags, "--data.store=store")
    assert made.code == 0, made.err
    for row in ("| reading ", "| Whitespace ", "| NearDuplicates ", "| Leakage ", "5 exact duplicate"):
        assert row in made.out
    audit = json.loads(Path("store/audit.json").read_text(encoding="utf-8"))
    check_report_adds_up(audit)
    assert audit["documents_in"] == 48
    assert [step["name"] for step in audit["steps"]] == [
        "reading", "Whitespace", "Length", "GopherRepetition", "ExactDuplicates", "NearDuplicates", "Leakage"
    ]  # fmt: skip
    assert "# Audit" in Path("store/audit.md").read_text(encoding="utf-8")
    done = command("fit", *flags, "--data.store=store", "--model.gpt.n_layer=1")
    assert done.code == 0, done.err
    assert "encoding" not in done.err
    cleaning = yaml.safe_load(Path("runs/pretrain/version_0/config.yaml").read_text())["data"]["init_args"]["cleaning"]
    assert [step["class_path"].split(".")[-1] for step in cleaning][:2] == ["Whitespace", "Length"]
    scored = command("evaluate", f"--data.source={messages}", "--data.text_column=message", "--json")
    assert scored.code == 0, scored.err
    assert json.loads(scored.out)["bytes"] > 1000
    again = command("fit", "--ckpt_path=last", "--trainer.max_steps=14", "--data.store=null", f"--data.cache={cache}")
    assert again.code == 0, again.err  # the location of the tokens may differ, the text may not


def test_sources_are_mixed(command: Command, corpus: Path, messages: Path, cache: Path) -> None:
    rows = messages.with_suffix(".jsonl")
    texts = [line.split("\t")[1] for line in messages.read_text(encoding="utf-8").splitlines()[1:]]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    mixed = json.dumps({str(corpus): 2.0, str(rows): 1.0})
    made = command("prepare", f"--data.source={mixed}", f"--data.cache={cache}", "--data.validation_share=0.2")
    assert made.code == 0, made.err
    assert "| mixing " in made.out
    assert "over the weight of its source" in made.out


@pytest.mark.parametrize(
    ("name", "data", "flags", "message"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9999)[:-9], [], "a.jsonl.gz is truncated or corrupted after"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', [], "a.jsonl: line 2 is not valid JSON"),
        ("a.csv", b"a,b\n1,2\n", [], "a.csv has no column 'text'; set --data.text_column to an existing column (a, b)"),
        ("a.csv", b"text,b\n1,2\n\xe9,1", [], "a.csv: line 3 is not UTF-8"),
        ("a.txt", b"fine\n\xe9\n", [], "a.txt is not UTF-8 text (byte 0xe9 on line 2)"),
        ("a.txt", b"one\0two", [], "a.txt contains a NUL byte"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "a\\u0000"}\n', [], "a.jsonl:2 contains a NUL byte"),
        ("a.jsonl", b'{"text": "' + b"x" * 34_000_000 + b'"}\n', [], "a.jsonl: line 1 is longer than 32 MB"),
        ("a.txt", b"fine\n" + b"x" * 34_000_000, [], "a.txt: line 2 is longer than 32 MB"),
        ("a.txt", b"some text", ["--data.cleaning+=Length", "--data.cleaning.at_least=99"], "Length rejected 1"),
        ("a.txt", b"some text", ["--data.vocab_size=5000"], "data.vocab_size is 5,000, but"),
        ("a.txt", b"some text", ["--data.tokenizer=tokenizer.txt"], "tokenizer.txt is not a usable tokenizer file"),
        ("a.txt", b"some text", ["--data.cache=/dev/null/x"], "cannot write to /dev/null/x"),
        ("a.txt", b"some text", ["--data.cleaning+=Leakage"], "Leakage requires validation documents"),
        ("a.txt", b"some text", ["--data.cleaning+=NearDuplicates", "--data.cleaning.bands=7"], "multiple of bands"),
        ("a.txt", b"some text", ["--data.cleaning+=Wash"], "--data.cleaning: class Wash not found"),
        ("a.txt", b"some text", ["--data.source={stdlib: 0}"], "the weight of stdlib is 0"),
        ("a.txt", b"some text", ["--data.source={}"], "data.source is empty; set it to at least one source"),
        ("a.txt", b"some text", ["--data.max_bytes=0"], "data.max_bytes is 0"),
        ("a.txt", b"some text", ["--data.source=owner/name"], "no such file or folder: owner/name"),
        ("a.txt", b"some text", ["--data.source=*.text"], "no such file or folder: *.text"),
    ],
)  # fmt: skip
def test_mistake_is_one_line_and_leaves_no_files(
    command: Command, tmp_path: Path, name: str, data: bytes, flags: list[str], message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    (tmp_path / "tokenizer.txt").write_text("no tokenizer", encoding="utf-8")
    failed = command("prepare", f"--data.source={tmp_path / name}", f"--data.cache={tmp_path / 'cache'}", *flags)
    assert failed.code == 2, failed.out
    lines = [line for line in failed.err.splitlines() if not line.startswith(("training a", "encoding"))]
    assert len(lines) == 1, failed.err
    assert message in lines[0]
    assert failed.out == ""
    leftovers = [path for path in tmp_path.glob("cache/*") if path.suffix != ".lock" and path.name != "corpora"]
    assert leftovers == []
    assert not find_unfinished(tmp_path / "cache" / "corpora")
