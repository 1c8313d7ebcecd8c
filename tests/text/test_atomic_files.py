"""Files are complete or missing, no link is followed, and nothing is deleted that this program did not make."""

import multiprocessing
import os
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_gpt_scratch.checkpoint.checkpoint_io import save_checkpoint
from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.checkpoint.safetensors_export import export_safetensors
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.evaluation.results_table import save_results
from lit_gpt_scratch.interop.hf_checkpoint import PortableModel, write_hf_checkpoint
from lit_gpt_scratch.interop.model_family import ModelShape
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.text.atomic_files import (
    atomic_file,
    create_folder_atomically,
    find_unfinished,
    is_unfinished,
    remove_unfinished,
    write_atomically,
)
from lit_gpt_scratch.text.token_shards import TokenShard
from lit_gpt_scratch.text.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links, permissions and signals of POSIX")

TOKENIZER = Tokenizer.train(["a few words"], 300, "byte")
SHAPE = ModelShape(GPTConfig(n_layer=1, n_head=1, n_embd=8), TOKENIZER.vocab_size, 8)


def export_hf(folder: Path) -> None:
    write_hf_checkpoint(PortableModel(SHAPE, GPT(*SHAPE).state_dict(), TOKENIZER), folder)


def fill(folder: Path) -> None:
    write_atomically(folder / "content", "x")


FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "write_atomically": ("x.txt", lambda path: write_atomically(path, "x")),
    "checkpoint": ("last.ckpt", lambda path: save_checkpoint({"a": torch.zeros(3)}, path)),
    "safetensors": (
        "m.safetensors",
        lambda path: export_safetensors({METADATA_KEY: {}, "state_dict": {"net.a": torch.zeros(3)}}, "net.", path),
    ),
    "run folder": ("summary.json", lambda path: RunFolder(path.parent).write_text(path.name, "{}")),
    "tokenizer": ("tokenizer.json", lambda path: TOKENIZER.save(path)),
    "checksum of a tokenizer": ("tokenizer.json.sha256", lambda path: TOKENIZER.save(path.with_suffix(""))),
    "shard": (
        "s.tokens.npy",
        lambda path: TokenShard.write(path.parent, "s", np.zeros(3, "<u2"), np.zeros((1, 2), "<u8")),
    ),
    "evaluation": (
        "evaluations/text-66acd07f.json",
        lambda path: save_results(RunFolder(path.parents[1]), "text", {"step": 1}, {"loss": 1.0}),
    ),
}
"""For each writer of a file, the path that it writes in a folder, and how it is called with this path."""
FOLDERS: dict[str, Callable[[Path], object]] = {
    "cache": lambda folder: create_folder_atomically(folder, fill, "--data.cache"),
    "store": lambda folder: create_folder_atomically(folder, fill, "--data.store", "its purpose"),
    "hugging face": export_hf,
}
"""Writers of a folder."""


def writers() -> list[object]:
    files = [pytest.param(name, write, id=key) for key, (name, write) in FILES.items()]
    return files + [pytest.param("x", write, id=key) for key, write in FOLDERS.items()]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def reports() -> object:
    """The writer of a sweep's report, where its libraries are installed."""
    pytest.importorskip("optuna")
    pytest.importorskip("matplotlib")
    from tests.sweeps.test_report import TRIALS, report

    return report(*TRIALS)


@pytest.mark.parametrize(("name", "write"), writers())
def test_files_of_others_survive_and_their_links_are_not_followed(
    tmp_path: Path, name: str, write: Callable[[Path], object]
) -> None:
    """What others may have put at every name that was once temporary, or looks like it."""
    path, outside = tmp_path / "own" / name, tmp_path / "outside"
    path.parent.mkdir(parents=True)
    outside.mkdir()
    for number, planted in enumerate(
        (
            f".{path.name}.part", f".{path.name}.unfinished", f".{path.name}.0123abcd.unfinished",
            f".{path.name}.{'0' * 32}.unfinished", f"{path.name}.tmp", f".{path.name}.{'0' * 32}.unfinished~",
        )
    ):  # fmt: skip
        (outside / f"{number}").write_text("outside")
        (path.parent / planted).symlink_to(outside / f"{number}")
        (path.parent / f"{planted}.mine").write_text("mine")
    (path.parent / f"{path.name}.partial").mkdir()
    (path.parent / f"{path.name}.partial" / "thesis.txt").write_text("years of work")
    before = snapshot(tmp_path)
    write(path)
    assert path.exists()
    assert {name: content for name, content in snapshot(tmp_path).items() if name in before} == before
    assert find_unfinished(path.parent) == []


@pytest.mark.parametrize(("name", "write"), FILES.values(), ids=FILES)
def test_a_link_is_replaced_and_its_target_kept(tmp_path: Path, name: str, write: Callable[[Path], object]) -> None:
    path, target = tmp_path / name, tmp_path / "elsewhere"
    path.parent.mkdir(exist_ok=True)
    target.write_text("kept")
    path.symlink_to(target)
    write(path)
    assert not path.is_symlink()
    assert target.read_text() == "kept"


def test_a_report_replaces_links(tmp_path: Path) -> None:
    report, target = reports(), tmp_path / "elsewhere"
    target.write_text("kept")
    (tmp_path / "new").mkdir()
    for name in ("report.html", ".report.html.unfinished", "results.csv"):
        (tmp_path / "new" / name).symlink_to(target)
    report.write(tmp_path / "new")  # type: ignore[attr-defined]
    assert target.read_text() == "kept"
    assert (tmp_path / "new" / ".report.html.unfinished").is_symlink()
    assert not (tmp_path / "new" / "report.html").is_symlink()


@pytest.mark.parametrize(("name", "write"), writers())
def test_permissions_follow_the_umask(tmp_path: Path, name: str, write: Callable[[Path], object]) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    before = os.umask(0o027)
    try:
        write(path)
    finally:
        os.umask(before)
    for each in [path, *path.rglob("*")]:
        assert stat.S_IMODE(each.stat().st_mode) == (0o750 if each.is_dir() else 0o640), each


@pytest.mark.parametrize(("name", "write"), FILES.values(), ids=FILES)
def test_permissions_of_a_replaced_file_are_kept(tmp_path: Path, name: str, write: Callable[[Path], object]) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("private")
    path.chmod(0o600)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def write_slowly(path: Path) -> None:
    with atomic_file(path) as file:
        file.write(b"half")
        file.flush()
        time.sleep(60)


def fill_slowly(folder: Path) -> None:
    write_atomically(folder / f"part {len(list(folder.iterdir()))}", "x")
    write_slowly(folder / "rest")


def start(function: Callable[..., object], folder: Path, *args: object) -> multiprocessing.Process:
    """Start a process, and wait until it is writing in a folder."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    deadline = time.monotonic() + 30
    while not any(path.read_bytes() == b"half" for path in folder.rglob("*.unfinished") if path.is_file()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def kill(process: multiprocessing.Process) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_a_killed_writer_leaves_a_file_that_only_the_next_writer_removes(tmp_path: Path) -> None:
    path, other = tmp_path / "x", tmp_path / "x.y"
    process = start(write_slowly, tmp_path, path)
    (temporary,) = tmp_path.iterdir()
    assert is_unfinished(temporary)
    write_atomically(path, "whole")  # while the other process is still writing
    remove_unfinished(tmp_path)
    assert temporary.exists()
    kill(process)
    write_atomically(other, "whole")
    assert temporary.exists()
    write_atomically(path, "whole")
    assert sorted(tmp_path.iterdir()) == [path, other]


def test_a_killed_run_leaves_files_that_resuming_removes(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.checkpoints.mkdir()
    for number, path in enumerate((run.last, run.path / "summary.json")):
        kill(start(write_slowly, path.parent, path))
        path.with_name(f".mine{number}.part").touch()
    run.remove_unfinished()
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".mine0.part", ".mine1.part", "checkpoints"]


@pytest.mark.parametrize("purpose", ["the same", "another", None])
def test_a_killed_store_is_completed_only_for_its_purpose(tmp_path: Path, purpose: str | None) -> None:
    """Also beside a folder of the user's that has the name and the contents of an older version's unfinished store."""
    folder = tmp_path / "store"
    users = tmp_path / "store.partial"
    users.mkdir()
    (users / "begun").write_text("the same")
    kill(start(create_folder_atomically, tmp_path, folder, fill_slowly, "--data.store", "the same"))
    (partial,) = find_unfinished(tmp_path)
    assert (partial / "part 1").exists()
    found: list[list[str]] = []

    def complete(target: Path) -> None:
        found.append(sorted(path.name for path in target.iterdir() if not is_unfinished(path)))
        write_atomically(target / "rest", "x")

    create_folder_atomically(folder, complete, "--data.store", purpose)
    assert found == [["begun", "part 1"] if purpose == "the same" else ["begun"] if purpose else []]
    kept = ["part 1", "rest"] if purpose == "the same" else ["rest"]
    assert sorted(path.name for path in folder.iterdir()) == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "store.lock", "store.partial"]
    assert [path.name for path in users.iterdir()] == ["begun"]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_failed_folder_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "x").mkdir()

    def full(self: Path, *_: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(UserError, match="No space left on device"):
        FOLDERS[name](tmp_path / "x")
    assert {path.name for path in tmp_path.iterdir()} <= {"x", "x.lock"}


def test_a_lock_leaves_the_file_of_its_name_alone(tmp_path: Path) -> None:
    (tmp_path / "poetry.lock").write_text("versions")
    create_folder_atomically(tmp_path / "poetry", fill, "--data.cache")
    assert (tmp_path / "poetry.lock").read_text() == "versions"
    (tmp_path / "outside").write_text("kept")
    (tmp_path / "other.lock").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="cannot write"):
        create_folder_atomically(tmp_path / "other", fill, "--data.cache")
    assert (tmp_path / "outside").read_text() == "kept"


@pytest.mark.parametrize("name", ["x" * 200, "ü" * 110, "." * 60, "a\nb", os.fsdecode(b"caf\xe9")])
def test_any_name_can_be_written(tmp_path: Path, name: str) -> None:
    write_atomically(tmp_path / name, "whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("saved", ["checkpoints/last.ckpt", "checkpoints/best.ckpt/shard", "epoch=1.ckpt"])
def test_a_run_folder_with_a_checkpoint_is_never_deleted(tmp_path: Path, saved: str) -> None:
    run = RunFolder.create(tmp_path, "x")
    (run.path / saved).parent.mkdir(parents=True, exist_ok=True)
    (run.path / saved).touch()
    run.delete()
    assert (run.path / saved).exists()


def test_a_run_folder_without_a_checkpoint_is_deleted(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "runs", "x")
    run.checkpoints.mkdir()
    kill(start(write_slowly, run.checkpoints, run.last))
    run.write_text("config.yaml", "")
    run.delete()
    assert list(tmp_path.iterdir()) == []
