"""Stores that were made ahead: mixed, shown, verified, laid out in other ways, and refused in one line."""

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
    """Two with one tokenizer."""
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": sentences(n, 5)}) + "\n" for n in range(50, 90)))
    made = [tmp_path / "one", tmp_path / "two"]
    flags = ["--data.validation_share=0.2", "--data.store"]
    one = command("prepare", *(flag for flag in small if "data" in flag), *flags, made[0])
    two = command("prepare", "--data.source=other.jsonl", f"--data.tokenizer={made[0]}/tokenizer.json", *flags, made[1])
    assert (one.code, two.code) == (0, 0), one.err + two.err
    return made


def sources_out(flags: list[str]) -> list[str]:
    out = ("--data.source", "--data.cache", "--data.vocab_size", "--data.validation_share")
    return [flag for flag in flags if not flag.startswith(out)]


def test_weights_windows_and_packing_change_without_making_tokens_again(
    command: Command, small: list[str], stores: list[Path], cache: Path
) -> None:
    made = {path: path.stat().st_mtime_ns for store in stores for path in store.rglob("*.npy")}
    flags = [*sources_out(small), f"--data.cache={cache}", "--data.document_mask=true"]
    one, two = stores
    for mixture, more in (
        ({str(one): 3, str(two): 1}, ["--data.packing=best_fit"]),
        ({str(one): 1, str(two): 1}, ["--data.block_size=16", "--data.batch_size=3"]),
        ([str(one), str(two)], ["--data.packing=one_document", "--data.num_workers=2"]),
    ):
        done = command("fit", *flags, f"--data.mixture={json.dumps(mixture)}", *more)
        assert done.code == 0, done.err
        assert f"{one}, {two}: " in done.err
        assert "see nothing of each other" in done.err
    assert {path: path.stat().st_mtime_ns for path in made} == made
    on = command("fit", "--ckpt_path=last", "--trainer.max_steps=14")
    assert on.code == 0, on.err
    changed = command("fit", "--ckpt_path=last", "--trainer.max_steps=16", "--data.packing=best_fit")
    one_line(changed, "data.packing", "--force")


def test_prepare_shows_windows(command: Command, small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*(flag for flag in small if "data" in flag), "--data.packing=one_document", "--data.document_mask=true"]
    plain = command("prepare", *flags, "--show=3")
    assert plain.code == 0, plain.err
    assert plain.out.count("positions of padding") == 3
    assert "| * one_document" in plain.out
    assert "█" in plain.out
    assert "\x1b" not in plain.out
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = command("prepare", *flags, "--show=3")
    assert "\x1b[33m" in coloured.out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in command("prepare", *flags, "--show=1").out
    one_line(command("prepare", *flags, "--show=-1"), "--show")


def test_verify_names_what_was_altered(command: Command, stores: list[Path]) -> None:
    """Even where a disk, and not a writer, changed it: the system says that nothing did."""
    whole = command("prepare", f"--data.store={stores[0]}", "--verify")
    assert (whole.code, whole.err) == (0, "")
    assert "2 shards" in whole.out
    path = stores[0] / "train-00000.tokens.npy"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    looks = json.loads((stores[0] / "checked.json").read_text())
    found = path.stat()
    looks[path.name] = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    (stores[0] / "checked.json").write_text(json.dumps(looks))
    TokenStore.open(stores[0])
    for flags in ([f"--data.store={stores[0]}"], [f"--data.mixture={stores[0]}"]):
        one_line(command("prepare", *flags, "--verify"), "shard train-00000 of", "SHA-256 differs")


def test_bad_stores_are_refused_in_one_line(
    command: Command, small: list[str], stores: list[Path], corpus: Path, tmp_path: Path
) -> None:
    flags = sources_out(small)
    one, two = stores

    def refused(mixture: object, *said: str, more: tuple[str, ...] = ()) -> None:
        given = mixture if isinstance(mixture, str) else json.dumps(mixture)
        one_line(command("fit", *flags, f"--data.mixture={given}", *more), *said)

    made = command("prepare", f"--data.source={corpus}", "--data.store=three", "--data.tokenizer=byte")
    assert made.code == 0, made.err
    refused([str(one), "three"], "three was made with another tokenizer than", "--data.tokenizer")
    refused({str(one): 0.0, str(two): 0}, "the weights sum to 0")
    refused({str(one): -1.0}, "the weight of", "0 or more")
    refused([], "no store in it")
    refused("nowhere", "there is no token store nowhere", "prepare --data.store has made")
    refused([str(one)], "fewer than one window of 100000", more=("--data.block_size=100000",))
    for more in (f"--data.source={corpus}", "--data.vocab_size=300", "--data.tokenizer=byte", "--data.store=four"):
        refused([str(one)], "made already; leave out data.", more=(more,))
    about = json.loads((one / "store.json").read_text())
    (one / "store.json").write_text(json.dumps(about | {"format": 99}))
    refused([str(one)], "format 99, newer than", "update lit_gpt_scratch")
    os.truncate(two / "train-00000.tokens.npy", 1000)
    refused([str(two)], "shard train-00000 of", "1,000 bytes instead of")
    assert not Path("runs").exists()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_token_that_there_is_not_ends_a_run_in_one_line(
    stores: list[Path], trainer: Callable[..., L.Trainer], task: Callable[..., L.LightningModule], num_workers: int
) -> None:
    """A store by somebody's script that did not look; in a loader's process, too."""
    about = TokenStore.read_manifest(stores[0])
    shard = TokenStore.open(stores[0]).train.shards[0]
    tokens = np.array(shard.tokens)
    tokens[len(tokens) // 2 :] = 5000
    written = TokenShard.write(stores[0], "train-00000", tokens, np.array(shard.documents))
    TokenStore.write_manifest(stores[0], about | {"train": [written.metadata | {"largest": 7}]})
    data = PackedText(mixture=str(stores[0]), block_size=32, batch_size=4, num_workers=num_workers)
    with pytest.raises(UserError) as error, user_errors():
        trainer().fit(task(), data)
    assert str(error.value).startswith("shard train-00000 of")
    assert "has token 5000, but its tokenizer only 300 tokens" in str(error.value)
    assert "Traceback" not in str(error.value)
    with pytest.raises(UserError, match="has token 5000"):
        data.store.verify(all_files=True)
