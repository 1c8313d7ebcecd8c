"""A checkpoint is whole or not there, and never loads when it was altered."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt_scratch.checkpoint import sealed
from lit_gpt_scratch.checkpoint.contents import KEY
from lit_gpt_scratch.checkpoint.loading import load_checkpoint
from lit_gpt_scratch.checkpoint.run_folder import find_checkpoint
from lit_gpt_scratch.checkpoint.sealed import refuse_altered, save
from lit_gpt_scratch.checkpoint.trainer_io import SealedCheckpointIO
from lit_gpt_scratch.errors import UserError


def checkpoint(value: float = 0.0) -> dict[str, Any]:
    return {KEY: {}, "state_dict": {"weight": torch.full((40, 3), value)}, "global_step": 7}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "last.ckpt"
    save(checkpoint(), path)
    return path


def test_what_was_saved_is_loaded_by_us_by_a_trainer_and_by_torch(path: Path) -> None:
    for loaded in (load_checkpoint(path), SealedCheckpointIO().load_checkpoint(path), torch.load(path)):
        assert loaded["global_step"] == 7
        assert torch.equal(loaded["state_dict"]["weight"], torch.zeros(40, 3))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_without_a_seal_is_loaded(tmp_path: Path) -> None:
    torch.save(checkpoint(), tmp_path / "plain.ckpt")
    assert load_checkpoint(tmp_path / "plain.ckpt")["global_step"] == 7


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
    for place in range(len(whole) - sealed.SEAL_BYTES - 24, len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
            with pytest.raises(UserError):
                load_checkpoint(path)


def test_a_seal_of_another_file_does_not_do(path: Path, tmp_path: Path) -> None:
    save(checkpoint(1.0), tmp_path / "other.ckpt")
    path.write_bytes(
        path.read_bytes()[: -sealed.SEAL_BYTES] + (tmp_path / "other.ckpt").read_bytes()[-sealed.SEAL_BYTES :]
    )
    with pytest.raises(UserError, match="not what was saved"):
        refuse_altered(path)


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "pathlib.Path.replace"])
def test_a_full_disk_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(where, full)
    with pytest.raises(UserError, match=r"cannot save .*last.ckpt: No space left on device; what was saved before"):
        save(checkpoint(1.0), path)
    monkeypatch.undo()
    assert load_checkpoint(path)["state_dict"]["weight"].sum() == 0
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_disk_that_fills_up_while_torch_writes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: sealed._Hashing, data: bytes) -> int:
        if self.file.tell() > 500:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    monkeypatch.setattr(sealed._Hashing, "write", write)
    with pytest.raises(UserError, match="cannot save"):
        save(checkpoint(1.0), path)
    assert load_checkpoint(path)["state_dict"]["weight"].sum() == 0


def test_the_newest_that_is_whole_is_found_and_the_others_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "pretrain" / "version_0" / "checkpoints"
    for age, name in enumerate(("last.ckpt", "step=20.ckpt", "step=10.ckpt")):
        save(checkpoint(age), folder / name)
        os.utime(folder / name, (1000 - age, 1000 - age))
    for expected in ("last.ckpt", "step=20.ckpt", "step=10.ckpt"):
        for given in ("last", str(folder.parent)):
            caplog.clear()
            assert find_checkpoint(given, tmp_path, "pretrain").name == expected
            assert len(caplog.records) == ["last.ckpt", "step=20.ckpt", "step=10.ckpt"].index(expected)
        (folder / expected).write_bytes((folder / expected).read_bytes()[:-1])
    with pytest.raises(UserError, match="none that is whole"):
        find_checkpoint("last", tmp_path, "pretrain")


SAVE_FOR_EVER = """
import sys, torch
from pathlib import Path
from lit_gpt_scratch.checkpoint.sealed import save
step = 0
while True:
    step += 1
    save({"step": step, "weights": torch.full((300_000,), step)}, Path(sys.argv[1]))
    print(step, flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_a_kill_while_saving_leaves_the_last_that_was_saved(tmp_path: Path) -> None:
    path, rng = tmp_path / "last.ckpt", random.Random(1)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(path)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
        )
        assert process.stdout
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        said = process.stdout.read().split()
        process.wait()
        refuse_altered(path)
        loaded = torch.load(path)
        assert loaded["step"] >= int(said[-1] if said else 1)
        assert torch.equal(loaded["weights"], torch.full((300_000,), loaded["step"]))
