"""Checkpoints are written atomically, and a damaged one never loads."""

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
from lit_gpt_scratch.checkpoint.checkpoint_io import save_checkpoint, verify_checksum
from lit_gpt_scratch.checkpoint.checkpoint_plugins import AtomicCheckpointIO, BackgroundCheckpointIO
from lit_gpt_scratch.checkpoint.loading import load_checkpoint
from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY
from lit_gpt_scratch.checkpoint.run_folder import find_checkpoint
from lit_gpt_scratch.errors import UserError
from tests.end_to_end import forked


def checkpoint(value: float = 0.0) -> dict[str, Any]:
    return {METADATA_KEY: {}, "state_dict": {"weight": torch.full((40, 3), value)}, "global_step": 7}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "last.ckpt"
    save_checkpoint(checkpoint(), path)
    return path


def test_checkpoint_loads_with_our_loader_the_plugin_and_torch(path: Path) -> None:
    for loaded in (load_checkpoint(path), AtomicCheckpointIO().load_checkpoint(path), torch.load(path)):
        assert loaded["global_step"] == 7
        assert torch.equal(loaded["state_dict"]["weight"], torch.zeros(40, 3))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_checkpoint_without_checksum_loads_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(checkpoint(), tmp_path / "plain.ckpt")
    assert load_checkpoint(tmp_path / "plain.ckpt")["global_step"] == 7
    assert "plain.ckpt has no checksum" in caplog.text


def corrupted(whole: bytes, rng: random.Random) -> bytes:
    """A randomly corrupted copy: a flipped bit, or a part that is removed, doubled, swapped, zeroed or random."""
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


def test_corrupted_checkpoint_is_rejected_by_name(path: Path) -> None:
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(1500):
        content = corrupted(whole, rng)
        if content == whole:
            continue
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            load_checkpoint(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_any_flipped_bit_of_the_checksum_is_detected(path: Path) -> None:
    whole = path.read_bytes()
    for offset in range(len(whole) - checkpoint_io.COMMENT_BYTES - 24, len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:offset] + bytes([whole[offset] ^ (1 << bit)]) + whole[offset + 1 :])
            with pytest.raises(UserError):
                load_checkpoint(path)


def test_checksum_of_another_file_is_rejected(path: Path, tmp_path: Path) -> None:
    save_checkpoint(checkpoint(1.0), tmp_path / "other.ckpt")
    path.write_bytes(
        path.read_bytes()[: -checkpoint_io.COMMENT_BYTES]
        + (tmp_path / "other.ckpt").read_bytes()[-checkpoint_io.COMMENT_BYTES :]
    )
    with pytest.raises(UserError, match="its checksum does not match"):
        verify_checksum(path)


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "pathlib.Path.replace"])
def test_full_disk_keeps_the_previous_checkpoint(path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(where, full)
    with pytest.raises(UserError, match=r"cannot save .*last.ckpt: No space left on device; the previous checkpoint"):
        save_checkpoint(checkpoint(1.0), path)
    monkeypatch.undo()
    assert load_checkpoint(path)["state_dict"]["weight"].sum() == 0
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_disk_that_fills_up_during_torch_save(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: checkpoint_io._HashingWriter, data: bytes) -> int:
        if self.file.tell() > 500:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    monkeypatch.setattr(checkpoint_io._HashingWriter, "write", write)
    with pytest.raises(UserError, match="cannot save"):
        save_checkpoint(checkpoint(1.0), path)
    assert load_checkpoint(path)["state_dict"]["weight"].sum() == 0


def test_newest_intact_checkpoint_is_found_and_damaged_ones_are_reported(
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
    with pytest.raises(UserError, match="all are corrupted"):
        find_checkpoint("last", tmp_path, "pretrain")


HUNDRED_KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from lit_gpt_scratch.checkpoint.checkpoint_io import verify_checksum, save_checkpoint
from lit_gpt_scratch.text.atomic_files import find_unfinished, remove_unfinished

path, rng, inside, step = Path(sys.argv[1]), random.Random(0), 0, 0
save_checkpoint({"step": 0, "weights": torch.full((100_000,), 0)}, path)
while inside < 100:
    child = os.fork()
    if child == 0:  # save forever
        while True:
            step += 1
            save_checkpoint({"step": step, "weights": torch.full((100_000,), step)}, path)
    before = path.stat().st_mtime_ns
    while path.stat().st_mtime_ns == before:  # wait for the first save
        time.sleep(0.0002)
    time.sleep(rng.uniform(0.0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    inside += bool(find_unfinished(path.parent))
    remove_unfinished(path.parent)
    verify_checksum(path)
    loaded = torch.load(path)
    assert loaded["step"] > step, (loaded["step"], step)
    assert torch.equal(loaded["weights"], torch.full((100_000,), loaded["step"]))
    step = loaded["step"]
print(inside)
"""


@pytest.mark.skipif(os.name != "posix", reason="fork and kill -9")
@pytest.mark.slow
def test_a_hundred_kills_during_saves_keep_the_last_saved_checkpoint(tmp_path: Path) -> None:
    """Only kills that left a partial file are counted."""
    done = forked.python(HUNDRED_KILLS, tmp_path / "last.ckpt")
    assert done.code == 0, done.err
    assert int(done.out) == 100


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
@pytest.mark.parametrize(
    ("how", "reason"),
    [("full", "File too large"), pytest.param("read-only", "Permission denied", marks=pytest.mark.slow)],
)
def test_save_errors_of_the_operating_system(tmp_path: Path, how: str, reason: str) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    save_checkpoint(checkpoint(), path)
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    path.parent.chmod(0o555 if how == "read-only" else 0o755)
    done = forked.python(SAVE_ONCE, path, how)
    path.parent.chmod(0o755)
    assert done.out.startswith(f"cannot save {path}: {reason}"), done.err
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
    """Whether an unprivileged process can mount a file system on this machine."""
    try:
        tried = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return subprocess.run(tried, capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not may_mount(), reason="mounts a small file system")
@pytest.mark.slow
def test_full_file_system(tmp_path: Path) -> None:
    """A file system of 2 MB has space for one checkpoint of 1.2 MB, but not for a second one."""
    mounted = ["unshare", "-rm", sys.executable, "-c", SAVE_TWICE, str(tmp_path)]
    done = subprocess.run(mounted, capture_output=True, text=True, timeout=200)
    error, left = done.stdout.splitlines()
    assert error.startswith(f"cannot save {tmp_path / 'last.ckpt'}: No space left on device"), done.stderr
    assert left == "1 last.ckpt"


def test_no_temporary_file_outside_the_checkpoint_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``TMPDIR`` may be on another file system, from which a rename would be a copy."""
    monkeypatch.setenv("TMPDIR", str(path.parent / "no such folder"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    save_checkpoint(checkpoint(3.0), path)
    assert load_checkpoint(path)["state_dict"]["weight"].mean() == 3


@pytest.mark.parametrize("background", [False, True])
def test_old_checkpoint_is_removed_only_after_a_successful_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    """Also in the background, where a save returns before anything is written."""
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


def test_background_save_writes_the_state_at_the_time_of_the_call(tmp_path: Path) -> None:
    writer, weight = BackgroundCheckpointIO(), torch.zeros(1000, 1000)
    writer.save_checkpoint({**checkpoint(), "state_dict": {"weight": weight}}, tmp_path / "a.ckpt")
    weight += 1  # training continues
    writer.remove_checkpoint(tmp_path / "a.ckpt")
    writer.save_checkpoint({**checkpoint(), "state_dict": {"weight": weight - 1}}, tmp_path / "b.ckpt")
    writer.teardown()
    assert [path.name for path in tmp_path.iterdir()] == ["b.ckpt"]
    assert not load_checkpoint(tmp_path / "b.ckpt")["state_dict"]["weight"].any()
