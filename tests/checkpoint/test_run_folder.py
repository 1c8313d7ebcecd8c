"""Run folders are unique, checkpoints are found, and other files are rejected by name."""

import json
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter

from lit_gpt_scratch.checkpoint.checkpoint_io import save_checkpoint
from lit_gpt_scratch.checkpoint.compare_checkpoints import read_curves
from lit_gpt_scratch.checkpoint.loading import load_checkpoint, load_model
from lit_gpt_scratch.checkpoint.metadata import CheckpointMetadata, require_same_model, require_same_tokenizer
from lit_gpt_scratch.checkpoint.run_folder import RunFolder, find_checkpoint
from lit_gpt_scratch.errors import UserError


def save_empty(run: RunFolder, time: float = 0.0) -> Path:
    save_checkpoint({}, run.last)
    os.utime(run.last, (time, time))
    return run.last


def test_concurrent_runs_get_different_folders(tmp_path: Path) -> None:
    claimed: list[RunFolder] = []
    threads = [threading.Thread(target=lambda: claimed.append(RunFolder.create(tmp_path, "x"))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(run.version for run in claimed) == list(range(20))


@pytest.mark.parametrize("clock", [0, -100], ids=["the same second", "an earlier clock"])
def test_tensorboard_reads_the_newest_session_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: int) -> None:
    """Also where the process's counter of event files, the end of their names, gets another digit."""
    pytest.importorskip("scipy")
    from lit_gpt_scratch.sweeps.run_results import read_curve

    now = 1_700_000_000
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(8))
    for first in range(0, 9, 3):
        monkeypatch.setattr("time.time", lambda first=first: now + clock * first)
        RunFolder(tmp_path).order_events()
        with SummaryWriter(str(tmp_path), purge_step=first) as writer:
            for step in range(first, first + 5):
                writer.add_scalar("x", first, step)
    expected = [(n, f"{n // 3 * 3.0}") for n in range(9)] + [(n, "6.0") for n in (9, 10)]
    assert read_curves(tmp_path) == {"x": expected}
    assert [point.value for point in read_curve(tmp_path, "x")] == [float(value) for _, value in expected]


def test_ordering_of_sessions_overwrites_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container, host, process id and counter can be the same in every session."""
    now, names = 1_700_000_000, []
    for session, started in enumerate((now, now + 3600, now + 1, now, now, now - 5)):
        monkeypatch.setattr("time.time", lambda started=started: started)
        RunFolder(tmp_path).order_events()
        (tmp_path / f"events.out.tfevents.{started:010d}.host.1.0").write_text(str(session))
        names.append(str(session))
        assert [path.read_text() for path in sorted(tmp_path.iterdir())] == names


def test_version_numbers_are_not_reused(tmp_path: Path) -> None:
    for _ in range(11):
        RunFolder.create(tmp_path, "x")
    (tmp_path / "x" / "version_3").rmdir()
    (tmp_path / "x" / "version_notes").mkdir()
    assert RunFolder.create(tmp_path, "x").version == 11


@pytest.mark.parametrize("given", [None, "last"])
def test_last_is_the_newest_run_with_a_checkpoint(tmp_path: Path, given: str | None) -> None:
    with pytest.raises(UserError, match=r"no run with a checkpoint in .*lit_gpt_scratch.fit"):
        find_checkpoint(given, tmp_path / "none", None)
    runs = [RunFolder.create(tmp_path, "a") for _ in range(12)]
    expected = save_empty(runs[10], time=10)
    save_empty(runs[9], time=20)  # an older run, although saved later
    assert find_checkpoint(given, tmp_path, "a") == expected
    other = save_empty(RunFolder.create(tmp_path, "b"), time=30)
    assert find_checkpoint(given, tmp_path, "a") == expected
    assert find_checkpoint(given, tmp_path, None) == other


def test_checkpoint_is_found_by_its_run_folder(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "x")
    with pytest.raises(UserError, match="contains no checkpoint"):
        find_checkpoint(str(run.path), tmp_path, None)
    last = save_empty(run)
    for given in (run.path, run.checkpoints, last):
        assert find_checkpoint(str(given), tmp_path, None) == last
    with pytest.raises(UserError, match="no checkpoint at"):
        find_checkpoint(str(tmp_path / "missing.ckpt"), tmp_path, None)


def test_run_folder_of_a_checkpoint(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "x")
    assert RunFolder.containing(run.last) == RunFolder(run.path.resolve())
    assert RunFolder.containing(tmp_path / "elsewhere.ckpt") is None


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize(
    "content",
    [b"", b"text", b"PK\3\4 not really", pickle.dumps({"a": 1}), pickle.dumps(Bomb()), None, "tensor", "foreign"],
)
def test_other_files_are_rejected_without_running_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.ckpt"
    if content == "tensor":
        torch.save(torch.zeros(3), path)
    elif content == "foreign":
        torch.save({"state_dict": {}, "epoch": 3}, path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_model(path)
    assert str(path) in str(error.value)
    assert not Path("exploded").exists()


def test_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        load_checkpoint(tmp_path)


def test_model_differences_are_listed() -> None:
    metadata = CheckpointMetadata({"n_layer": 4, "n_head": 3}, 300, 32, "{}")
    require_same_model(metadata, CheckpointMetadata({"n_layer": 4, "n_head": 3}, 300, 32, "{}"))
    newer = CheckpointMetadata({"n_layer": 4, "n_head": 3, "bigram_rows": None}, 300, 32, "{}")  # a newer field
    require_same_model(metadata, newer)
    with pytest.raises(
        UserError,
        match=r"block_size is 32 in the checkpoint, but 64 in this run; n_layer is 4 in the checkpoint, but 5",
    ):
        require_same_model(metadata, CheckpointMetadata({"n_layer": 5, "n_head": 3}, 300, 64, "{}"))
    adapted = CheckpointMetadata({"n_layer": 5, "n_head": 3}, 300, 64, "{}", lora={"rank": 8})
    with pytest.raises(
        UserError,
        match=r"lora.rank is None in the checkpoint, but 8 in this run; n_layer is 4 in the checkpoint, but 5",
    ):
        require_same_model(metadata, adapted, may_differ=("block_size",))
    require_same_tokenizer(metadata, "{}")
    with pytest.raises(UserError, match="a different tokenizer"):
        require_same_tokenizer(metadata, "{ }")


def test_last_falls_back_to_the_best_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A kill may come before the first last.ckpt; newer runs without a checkpoint are reported."""
    for version, name in ((0, "last.ckpt"), (1, "step=3.ckpt")):
        save_checkpoint({"version": version}, tmp_path / f"pretrain/version_{version}/checkpoints" / name)
    (tmp_path / "pretrain/version_2").mkdir()
    found = find_checkpoint("last", tmp_path, "pretrain")
    assert found == tmp_path / "pretrain/version_1/checkpoints/step=3.ckpt"
    assert f"{tmp_path}/pretrain/version_2 has no checkpoint; using {tmp_path}/pretrain/version_1" in caplog.text


def test_errors_inside_the_lock_are_not_mistaken_for_lock_errors(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="another file"), RunFolder(tmp_path).lock():
        raise PermissionError("another file")
    with RunFolder(tmp_path).lock():  # it was released
        pass


@pytest.mark.parametrize(
    "text", ["{", '{"sessions": [3]}', '{"sessions": [{"hardware": 3}]}', '{"sessions": [{"seed": "x"}]}']
)
def test_damaged_provenance_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    (tmp_path / "provenance.json").write_text(text)
    assert RunFolder(tmp_path).read_sessions() == []
    assert "provenance.json cannot be read" in caplog.text


def test_sessions_keep_all_fields(tmp_path: Path) -> None:
    sessions = [{"started": "now", "seed": 3, "hardware": {"threads": 2, "gpu": None}, "changed": {"a": [1, 2]}}]
    (tmp_path / "provenance.json").write_text(json.dumps({"sessions": sessions}))
    assert RunFolder(tmp_path).read_sessions() == sessions


def test_one_of_several_automatic_runs_may_train(tmp_path: Path) -> None:
    """Four processes have found no checkpoint, and create folders at the same time."""
    started, outcomes = threading.Barrier(4), []

    def start() -> None:
        run = RunFolder.create(tmp_path, "x")
        with run.lock():
            started.wait()
            try:
                run.require_only_run()
                outcomes.append("trains")
            except UserError as error:
                outcomes.append(str(error))
            started.wait()

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("trains") == 1
    assert sum("another process has started" in outcome for outcome in outcomes) == 3


def test_an_automatic_run_ignores_folders_of_killed_runs(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "x").lock():
        pass  # killed before its first checkpoint
    run = RunFolder.create(tmp_path, "x")
    with run.lock():
        run.require_only_run()
    save_empty(run, 1.0)
    late = RunFolder.create(tmp_path, "x")
    with late.lock(), pytest.raises(UserError, match="another process has started"):
        late.require_only_run()  # the other run was saved and has ended in the meantime
