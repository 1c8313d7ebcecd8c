"""A checkpoint is whole or not there, and never loads when it was altered."""

import errno
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt_scratch.checkpoint import checkpoint_io
from lit_gpt_scratch.checkpoint.checkpoint_io import (
    AtomicCheckpointIO,
    BackgroundCheckpointIO,
    save_checkpoint,
    verify_checksum,
)
from lit_gpt_scratch.checkpoint.loading import load_checkpoint
from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY
from lit_gpt_scratch.checkpoint.run_folder import find_checkpoint
from lit_gpt_scratch.errors import UserError


def checkpoint(value: float = 0.0) -> dict[str, Any]:
    return {METADATA_KEY: {}, "state_dict": {"weight": torch.full((40, 3), value)}, "global_step": 7}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "last.ckpt"
    save_checkpoint(checkpoint(), path)
    return path


def test_what_was_saved_is_loaded_by_us_by_a_trainer_and_by_torch(path: Path) -> None:
    for loaded in (load_checkpoint(path), AtomicCheckpointIO().load_checkpoint(path), torch.load(path)):
        assert loaded["global_step"] == 7
        assert torch.equal(loaded["state_dict"]["weight"], torch.zeros(40, 3))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_without_a_seal_is_loaded_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(checkpoint(), tmp_path / "plain.ckpt")
    assert load_checkpoint(tmp_path / "plain.ckpt")["global_step"] == 7
    assert "plain.ckpt has no seal" in caplog.text


def altered(whole: bytes, rng: random.Random) -> bytes:
    """Another file: a bit, a byte, a part cut away, doubled, swapped or emptied."""
    here, there = sorted(rng.sample(range(len(whole) + 1), 2))
    ways = [
        lambda: whole[:here] + bytes([whole[here] ^ (1 << rng.randrange(8))]) + whole[here + 1 :],
        lambda: whole[:here],
        lambda: whole[here:],
        lambda: whole[:here] + whole[there:],
        lambda: whole[:there] + whole[here:],
        lambda: whole[there:] + whole[:here],
        lambda: whole[:here] + bytes(there - here) + whole[there:],
        lambda: whole + whole[here:there],
        lambda: rng.randbytes(here) + whole[here:],
    ]
    return rng.choice(ways)()


def test_what_was_altered_is_refused_by_name(path: Path) -> None:
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(1500):
        content = altered(whole, rng)
        if content == whole:
            continue
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            load_checkpoint(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_every_bit_of_the_seal_counts(path: Path) -> None:
    whole = path.read_bytes()
    for place in range(len(whole) - checkpoint_io.COMMENT_BYTES - 24, len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
            with pytest.raises(UserError):
                load_checkpoint(path)


def test_a_seal_of_another_file_does_not_do(path: Path, tmp_path: Path) -> None:
    save_checkpoint(checkpoint(1.0), tmp_path / "other.ckpt")
    path.write_bytes(
        path.read_bytes()[: -checkpoint_io.COMMENT_BYTES]
        + (tmp_path / "other.ckpt").read_bytes()[-checkpoint_io.COMMENT_BYTES :]
    )
    with pytest.raises(UserError, match="not what was saved"):
        verify_checksum(path)


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "pathlib.Path.replace"])
def test_a_full_disk_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(where, full)
    with pytest.raises(UserError, match=r"cannot save .*last.ckpt: No space left on device; what was saved before"):
        save_checkpoint(checkpoint(1.0), path)
    monkeypatch.undo()
    assert load_checkpoint(path)["state_dict"]["weight"].sum() == 0
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_disk_that_fills_up_while_torch_writes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: checkpoint_io._HashingWriter, data: bytes) -> int:
        if self.file.tell() > 500:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    monkeypatch.setattr(checkpoint_io._HashingWriter, "write", write)
    with pytest.raises(UserError, match="cannot save"):
        save_checkpoint(checkpoint(1.0), path)
    assert load_checkpoint(path)["state_dict"]["weight"].sum() == 0


def test_the_newest_that_is_whole_is_found_and_the_others_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "pretrain" / "version_0" / "checkpoints"
    for age, name in enumerate(("last.ckpt", "step=20.ckpt", "step=10.ckpt")):
        save_checkpoint(checkpoint(age), folder / name)
        os.utime(folder / name, (1000 - age, 1000 - age))
    for expected in ("last.ckpt", "step=20.ckpt", "step=10.ckpt"):
        for given in ("last", str(folder.parent)):
            caplog.clear()
            assert find_checkpoint(given, tmp_path, "pretrain").name == expected
            assert len(caplog.records) == ["last.ckpt", "step=20.ckpt", "step=10.ckpt"].index(expected)
        (folder / expected).write_bytes((folder / expected).read_bytes()[:-1])
    with pytest.raises(UserError, match="none that is whole"):
        find_checkpoint("last", tmp_path, "pretrain")


HUNDRED_KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from lit_gpt_scratch.checkpoint.checkpoint_io import PARTIAL_SUFFIX, verify_checksum, save_checkpoint

path, rng, inside, step = Path(sys.argv[1]), random.Random(0), 0, 0
save_checkpoint({"step": 0, "weights": torch.full((300_000,), 0)}, path)
while inside < 100:
    child = os.fork()
    if child == 0:  # saves for ever
        while True:
            step += 1
            save_checkpoint({"step": step, "weights": torch.full((300_000,), step)}, path)
    before = path.stat().st_mtime_ns
    while path.stat().st_mtime_ns == before:  # it has saved once
        time.sleep(0.0002)
    time.sleep(rng.uniform(0.0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    inside += path.with_name(f".{path.name}{PARTIAL_SUFFIX}").exists()
    verify_checksum(path)
    loaded = torch.load(path)
    assert loaded["step"] > step, (loaded["step"], step)
    assert torch.equal(loaded["weights"], torch.full((300_000,), loaded["step"]))
    step = loaded["step"]
print(inside)
"""


@pytest.mark.skipif(os.name != "posix", reason="fork and kill -9")
def test_a_hundred_kills_amid_saving_leave_the_last_that_was_saved(tmp_path: Path) -> None:
    """Kills count that hit while the file beside the checkpoint was half-written."""
    done = subprocess.run(
        [sys.executable, "-c", HUNDRED_KILLS, str(tmp_path / "last.ckpt")],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 100


SAVE_ONCE = """
import os, resource, signal, sys, torch
from pathlib import Path
from lit_gpt_scratch.checkpoint.checkpoint_io import save_checkpoint
from lit_gpt_scratch.errors import UserError
path, how = Path(sys.argv[1]), sys.argv[2]
if how == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
if how == "read-only" and os.geteuid() == 0:
    os.seteuid(65534)
try:
    save_checkpoint({"step": 2, "weights": torch.zeros(300_000)}, path)
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="limits and owners of files")
@pytest.mark.parametrize(("how", "said"), [("full", "File too large"), ("read-only", "Permission denied")])
def test_a_disk_that_really_refuses(tmp_path: Path, how: str, said: str) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    save_checkpoint(checkpoint(), path)
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    path.parent.chmod(0o555 if how == "read-only" else 0o755)
    done = subprocess.run([sys.executable, "-c", SAVE_ONCE, str(path), how], capture_output=True, text=True, timeout=60)
    path.parent.chmod(0o755)
    assert done.stdout.startswith(f"cannot save {path}: {said}"), done.stderr
    assert load_checkpoint(path)["global_step"] == 7
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


SAVE_TWICE = """
import subprocess, sys, torch
from pathlib import Path
from lit_gpt_scratch.checkpoint.checkpoint_io import verify_checksum, save_checkpoint
from lit_gpt_scratch.errors import UserError
folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=True)
save_checkpoint({"step": 1, "weights": torch.zeros(300_000)}, folder / "last.ckpt")
try:
    save_checkpoint({"step": 2, "weights": torch.zeros(300_000)}, folder / "last.ckpt")
except UserError as error:
    print(error)
verify_checksum(folder / "last.ckpt")
print(torch.load(folder / "last.ckpt")["step"], *(file.name for file in folder.iterdir()))
"""


def may_mount() -> bool:
    """Whether this machine lets a process mount a file system of its own."""
    try:
        tried = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return subprocess.run(tried, capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not may_mount(), reason="mounts a small file system")
def test_a_file_system_that_is_really_full(tmp_path: Path) -> None:
    """Of 2 MB: a checkpoint of 1.2 MB fits, and no second one beside it."""
    mounted = ["unshare", "-rm", sys.executable, "-c", SAVE_TWICE, str(tmp_path)]
    done = subprocess.run(mounted, capture_output=True, text=True, timeout=60)
    refused, left = done.stdout.splitlines()
    assert refused.startswith(f"cannot save {tmp_path / 'last.ckpt'}: No space left on device"), done.stderr
    assert left == "1 last.ckpt"


def test_nothing_is_written_to_the_folder_for_temporary_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may lie on another file system, from which a rename would copy."""
    monkeypatch.setenv("TMPDIR", str(path.parent / "no such folder"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    save_checkpoint(checkpoint(3.0), path)
    assert load_checkpoint(path)["state_dict"]["weight"].mean() == 3


@pytest.mark.parametrize("background", [False, True])
def test_the_one_before_is_removed_only_when_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    """In the background, too, where a save returns before anything is written."""
    writer = BackgroundCheckpointIO() if background else AtomicCheckpointIO()
    writer.save_checkpoint(checkpoint(), tmp_path / "old.ckpt")
    if background:
        writer.teardown()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def replace() -> None:
        writer.save_checkpoint(checkpoint(1.0), tmp_path / "new.ckpt")
        writer.remove_checkpoint(tmp_path / "old.ckpt")
        writer.teardown()

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot save .*new\.ckpt: No space left on device"):
        replace()
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "old.ckpt")["global_step"] == 7


def test_what_is_written_in_the_background_is_what_there_was(tmp_path: Path) -> None:
    writer, weight = BackgroundCheckpointIO(), torch.zeros(1000, 1000)
    writer.save_checkpoint({**checkpoint(), "state_dict": {"weight": weight}}, tmp_path / "a.ckpt")
    weight += 1  # the training goes on
    writer.remove_checkpoint(tmp_path / "a.ckpt")
    writer.save_checkpoint({**checkpoint(), "state_dict": {"weight": weight - 1}}, tmp_path / "b.ckpt")
    writer.teardown()
    assert [path.name for path in tmp_path.iterdir()] == ["b.ckpt"]
    assert not load_checkpoint(tmp_path / "b.ckpt")["state_dict"]["weight"].any()
