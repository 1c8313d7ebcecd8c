"""Prepared token stores: mixed, shown, verified, packed in other ways, and rejected in one line."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import pytest

from lit_gpt_scratch.cli.error_formatting import user_errors
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.data.token_store import TokenStore
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.token_shards import TokenShard
from tests.conftest import sentences
from tests.end_to_end.conftest import Command
from tests.end_to_end.test_user_errors import one_line


@pytest.fixture
def stores(command: Command, small: list[str], tmp_path: Path) -> list[Path]:
    """Two stores with the same tokenizer."""
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": sentences(n, 5)}) + "\n" for n in range(50, 90)))
    made = [tmp_path / "one", tmp_path / "two"]
    flags = ["--data.validation_share=0.2", "--data.store"]
    one = command("prepare", *(flag for flag in small if "data" in flag), *flags, made[0])
    two = command("prepare", "--data.source=other.jsonl", f"--data.tokenizer={made[0]}/tokenizer.json", *flags, made[1])
    assert (one.code, two.code) == (0, 0), one.err + two.err
    return made


def without_source_flags(flags: list[str]) -> list[str]:
    removed = ("--data.source", "--data.cache", "--data.vocab_size", "--data.validation_share")
    return [flag for flag in flags if not flag.startswith(removed)]


@pytest.mark.slow
def test_mixture_block_size_and_packing_change_without_retokenizing(
    command: Command, small: list[str], stores: list[Path], cache: Path
) -> None:
    made = {path: path.stat().st_mtime_ns for store in stores for path in store.rglob("*.npy")}
    flags = [*without_source_flags(small), f"--data.cache={cache}", "--data.document_mask=true"]
    one, two = stores
    for mixture, more in (
        ({str(one): 3, str(two): 1}, ["--data.packing=best_fit"]),
        ({str(one): 1, str(two): 1}, ["--data.block_size=16", "--data.batch_size=3"]),
        ([str(one), str(two)], ["--data.packing=one_document", "--data.num_workers=2"]),
    ):
        done = command("fit", *flags, f"--data.mixture={json.dumps(mixture)}", *more)
        assert done.code == 0, done.err
        assert f"{one}, {two}: " in done.err
        assert "masked from each other" in done.err
    assert {path: path.stat().st_mtime_ns for path in made} == made
    resumed = command("fit", "--ckpt_path=last", "--trainer.max_steps=14")
    assert resumed.code == 0, resumed.err
    changed = command("fit", "--ckpt_path=last", "--trainer.max_steps=16", "--data.packing=best_fit")
    one_line(changed, "data.packing", "--force")


def test_prepare_shows_windows(command: Command, small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*(flag for flag in small if "data" in flag), "--data.packing=one_document", "--data.document_mask=true"]
    plain = command("prepare", *flags, "--show=3")
    assert plain.code == 0, plain.err
    assert plain.out.count("padding positions") == 3
    assert "| * one_document" in plain.out
    assert "█" in plain.out
    assert "\x1b" not in plain.out
    monkeypatch.setenv("FORCE_COLOR", "1")
    colored = command("prepare", *flags, "--show=3")
    assert "\x1b[33m" in colored.out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in command("prepare", *flags, "--show=1").out
    one_line(command("prepare", *flags, "--show=-1"), "--show")


def test_verify_names_the_altered_shard(command: Command, stores: list[Path]) -> None:
    """Also if the disk corrupted it, so that size and times are unchanged."""
    whole = command("prepare", f"--data.store={stores[0]}", "--verify")
    assert (whole.code, whole.err) == (0, "")
    assert "2 shards" in whole.out
    path = stores[0] / "train-00000.tokens.npy"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    checked = json.loads((stores[0] / "checked.json").read_text())
    stat = path.stat()
    checked[path.name] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    (stores[0] / "checked.json").write_text(json.dumps(checked))
    TokenStore.open(stores[0])
    for flags in ([f"--data.store={stores[0]}"], [f"--data.mixture={stores[0]}"]):
        one_line(command("prepare", *flags, "--verify"), "shard train-00000 of", "does not match its SHA-256")


@pytest.mark.slow
def test_bad_stores_are_rejected_in_one_line(
    command: Command, small: list[str], stores: list[Path], corpus: Path, tmp_path: Path
) -> None:
    flags = without_source_flags(small)
    one, two = stores

    def check_rejected(mixture: object, *messages: str, more: tuple[str, ...] = ()) -> None:
        given = mixture if isinstance(mixture, str) else json.dumps(mixture)
        one_line(command("fit", *flags, f"--data.mixture={given}", *more), *messages)

    made = command("prepare", f"--data.source={corpus}", "--data.store=three", "--data.tokenizer=byte")
    assert made.code == 0, made.err
    check_rejected([str(one), "three"], "three has a different tokenizer than", "--data.tokenizer")
    check_rejected({str(one): 0.0, str(two): 0}, "the weights sum to 0")
    check_rejected({str(one): -1.0}, "the weight of", "0 or more")
    check_rejected([], "data.mixture is empty")
    check_rejected("nowhere", "nowhere is not a token store", "created by prepare --data.store")
    check_rejected([str(one)], "fewer than one window of 100000", more=("--data.block_size=100000",))
    for more in (f"--data.source={corpus}", "--data.vocab_size=300", "--data.tokenizer=byte", "--data.store=four"):
        check_rejected([str(one)], "existing tokens, so data.", more=(more,))
    manifest = json.loads((one / "store.json").read_text())
    (one / "store.json").write_text(json.dumps(manifest | {"format": 99}))
    check_rejected([str(one)], "format 99, which is newer than", "update lit_gpt_scratch")
    os.truncate(two / "train-00000.tokens.npy", 1000)
    check_rejected([str(two)], "shard train-00000 of", "1,000 bytes instead of")
    assert not Path("runs").exists()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_out_of_range_token_ends_a_run_in_one_line(
    stores: list[Path], trainer: Callable[..., L.Trainer], task: Callable[..., L.LightningModule], num_workers: int
) -> None:
    """As in a store written by another script without checks; in a loader worker, too."""
    manifest = TokenStore.read_manifest(stores[0])
    shard = TokenStore.open(stores[0]).train.shards[0]
    tokens = np.array(shard.tokens)
    tokens[len(tokens) // 2 :] = 5000
    written = TokenShard.write(stores[0], "train-00000", tokens, np.array(shard.documents))
    TokenStore.write_manifest(stores[0], manifest | {"train": [written.metadata | {"largest": 7}]})
    data = PackedText(mixture=str(stores[0]), block_size=32, batch_size=4, num_workers=num_workers)
    with pytest.raises(UserError) as error, user_errors():
        trainer().fit(task(), data)
    assert str(error.value).startswith("shard train-00000 of")
    assert "contains token id 5000, but the tokenizer has only 300 tokens" in str(error.value)
    assert "Traceback" not in str(error.value)
    with pytest.raises(UserError, match=r"the token ids in .* do not match store\.json"):
        data.store.verify(all_files=True)
