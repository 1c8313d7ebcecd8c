"""On a full disk, diagnostics are dropped and the run continues; everything else is one line, and nothing is damaged.

The full disk is a small file system where mounting one is permitted, and a limit on the size of a file elsewhere. Both
fail in the middle of a write, as a real disk does.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_gpt_scratch.checkpoint.checkpoint_io import verify_checksum
from lit_gpt_scratch.checkpoint.compare_checkpoints import read_curves
from lit_gpt_scratch.text.split import PERMUTATIONS, DuplicateClusters
from lit_gpt_scratch.text.token_shards import TokenShard
from tests.end_to_end import forked
from tests.end_to_end.conftest import Outcome

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="limits and mounts")
SIZES = 40
Mount = Callable[[int], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Mount]:
    """Mount an empty file system of a size in bytes, which replaces the one before."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        subprocess.run(["umount", folder], capture_output=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True)


def sizes(largest: int) -> list[int]:
    """Sizes of disks, from one page to more than is needed."""
    return [4096 * max(1, largest * n // (SIZES - 1) // 4096) for n in range(SIZES)]


def ends_well(outcome: Outcome) -> str:
    """The command succeeded, or failed with one line, which is returned; each output was reported at most once."""
    assert "Traceback" not in outcome.err, outcome.err
    lines = outcome.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert (outcome.code, len(errors)) in ((0, 0), (2, 1)), outcome.err
    warnings = [line for line in lines if line.startswith(("cannot write ", "not compiled"))]
    assert len(warnings) == len(set(warnings)), outcome.err
    assert len(lines) < 200, outcome.err
    if errors:
        assert any(
            word in errors[0] for word in ("No space left", "disk is full", "disk I/O error", "File too large")
        ), errors
    return errors[0] if errors else "success"


def checkpoints_load(runs: Path) -> None:
    """Every checkpoint in the folder is complete, and no temporary file is left."""
    assert not [*runs.rglob("*.part"), *runs.rglob("*.unfinished"), *runs.rglob("*.partial")]
    for path in runs.rglob("*.ckpt"):
        verify_checksum(path)
        torch.load(path, weights_only=True)


def run_interpreter(command: str, folder: Path, *flags: str, **env: str) -> Outcome:
    """Run a command in a new interpreter, because Inductor reads its environment variables when it is imported."""
    line = [sys.executable, "-m", f"lit_gpt_scratch.{command}", *flags]
    done = subprocess.run(
        line, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, capture_output=True, text=True
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def at_step_6(command: str) -> list[str]:
    """Flags that run a shell command in a run."""
    name = "--trainer.callbacks"
    return [f"{name}=tests.custom_callback.CommandAtStep", f"{name}.step=6", f"{name}.command={command}"]


@pytest.mark.slow
def test_full_disk_ends_a_run_in_one_line_and_keeps_its_last_checkpoint(small: list[str], tmp_path: Path) -> None:
    """The limit is half of the size of a checkpoint."""
    runs = tmp_path / "runs"
    first = forked.run(["fit"], tmp_path, *small, f"--runs={runs}", "--trainer.max_steps=4")
    assert first.code == 0, first.err
    [last] = runs.rglob("last.ckpt")
    before = last.read_bytes()
    again = ["--ckpt_path=last", f"--runs={runs}", "--trainer.max_steps=12"]
    outcome = forked.run(["fit"], tmp_path, *again, limits={resource.RLIMIT_FSIZE: len(before) // 2})
    assert outcome.code == 2
    assert "the previous checkpoint is unchanged" in ends_well(outcome)
    assert last.read_bytes() == before
    checkpoints_load(runs)


def test_full_disk_drops_only_diagnostics(small: list[str], tmp_path: Path) -> None:
    """The limit is more than the size of a checkpoint, and less than that of the events of twelve validations."""
    flags = [*small, "--trainer.val_check_interval=1", f"--runs={tmp_path / 'runs'}"]
    outcome = forked.run(["fit"], tmp_path, *flags, limits={resource.RLIMIT_FSIZE: 520_000})
    assert ends_well(outcome) == "success"
    assert "cannot write the TensorBoard events: File too large; the run continues without it" in outcome.err
    [run] = (tmp_path / "runs" / "pretrain").iterdir()
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 12
    assert json.loads((run / "summary.json").read_text())["step"] == 12
    steps = [step for step, _ in read_curves(run)["val/loss"]]  # written separately from the plots, which do not fit
    assert steps == sorted(set(steps))
    assert 0 in steps


@pytest.mark.parametrize("limit", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", ["store", "cache"])
def test_full_disk_leaves_no_part_of_a_store(corpus: Path, tmp_path: Path, place: str, limit: int) -> None:
    flags = [f"--data.source={corpus}", "--data.vocab_size=300", f"--data.{place}={tmp_path / place}"]
    outcome = forked.run(["prepare"], tmp_path, *flags, limits={resource.RLIMIT_FSIZE: limit})
    assert outcome.code == 2
    assert ends_well(outcome).endswith(f"set --data.{place} to another folder")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".npy", ".parquet")]
    again = forked.run(["prepare"], tmp_path, *flags)
    assert again.code == 0, again.err


def test_scratch_files_of_a_split_are_written_completely_or_not_at_all(tmp_path: Path) -> None:
    """``numpy.ndarray.tofile`` loses what does not fit without an error."""
    clusters = DuplicateClusters(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):  # noqa: PT012 - the buffer decides which call writes
            for seed in range(100):
                clusters.add(np.full(PERMUTATIONS, seed, np.uint32))
            clusters.cluster_ids()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        with suppress(OSError):
            clusters.close()


def test_shards_are_written_completely_or_not_at_all(tmp_path: Path) -> None:
    """``numpy.save`` raises an error without a number, or none if the rest is lost when the file is closed."""
    documents = np.array([[0, 9]], "<u8")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        for size in (4_900, 4_990, 20_000):  # numpy's buffer holds 4,096 bytes
            with pytest.raises(OSError, match="File too large") if size > 4_936 else nullcontext():
                TokenShard.write(tmp_path, f"train-{size}", np.arange(size, dtype="<u2"), documents)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    shard = np.load(tmp_path / "train-4900.tokens.npy")
    assert np.array_equal(shard, np.arange(4_900))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-4900.documents.npy", "train-4900.tokens.npy"]


def test_run_folder_that_is_deleted_during_the_run_is_one_line(small: list[str], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    outcome = forked.run(["fit"], tmp_path, *small, f"--runs={runs}", *at_step_6(f"rm -r {runs}"))
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    assert "cannot write" not in outcome.err
    assert outcome.err.splitlines()[-1].startswith(
        f"error: {runs}/pretrain/version_0 was deleted or moved during the run"
    )
    assert not runs.exists()


def test_run_folder_that_becomes_read_only_is_one_line(small: list[str], disk: Mount, tmp_path: Path) -> None:
    runs = disk(20_000_000)
    run = runs / "pretrain" / "version_0"
    command = at_step_6(f"mount -t tmpfs -o ro tmpfs {run}")
    try:
        outcome = forked.run(["fit"], tmp_path, *small, f"--runs={runs}", *command)
    finally:
        subprocess.run(["umount", run], capture_output=True)
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    [error] = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert "cannot save" in error
    assert "Read-only file system" in error
    checkpoints_load(runs)


def test_shard_truncated_during_the_run_is_one_line(small: list[str], tmp_path: Path) -> None:
    """Reading beyond the end of a truncated memory-mapped file kills a process with SIGBUS."""
    cache = tmp_path / "cache"
    flags = [*small, f"--data.cache={cache}", f"--runs={tmp_path / 'runs'}"]
    outcome = forked.run(["fit"], tmp_path, *flags, *at_step_6(f"truncate -s 4096 {cache}/*/train*.tokens.npy"))
    assert outcome.code == 2, (outcome.code, outcome.err)
    assert "Traceback" not in outcome.err
    [error] = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert "has 4,096 bytes instead of" in error
    checkpoints_load(tmp_path / "runs")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_runs_on_disks_of_forty_sizes(small: list[str], disk: Mount, tmp_path: Path) -> None:
    flags = [*small, "--trainer.val_check_interval=4", "--checkpoint.every_n_steps=2"]
    endings = []
    for size in sizes(2_600_000):
        runs = disk(size)
        endings.append(ends_well(forked.run(["fit"], tmp_path, *flags, f"--runs={runs / 'runs'}")))
        checkpoints_load(runs)
    assert {"success"} < set(endings)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("place", ["store", "cache"])
def test_stores_on_disks_of_forty_sizes(corpus: Path, disk: Mount, tmp_path: Path, place: str) -> None:
    endings = []
    for size in sizes(600_000):
        folder = disk(size)
        flags = [f"--data.source={corpus}", "--data.vocab_size=300", f"--data.{place}={folder / place}"]
        endings.append(ends_well(forked.run(["prepare"], tmp_path, *flags)))
        finished = list(folder.rglob("store.json"))
        assert (len(finished), endings[-1] == "success") in ((0, False), (1, True))
    assert {"success"} < set(endings)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("half", range(2))
def test_sweeps_on_disks_of_forty_sizes(disk: Mount, tmp_path: Path, half: int) -> None:
    pytest.importorskip("optuna")
    (tmp_path / "sweep.yaml").write_text("vary:\n  x: [1, 2]\nseeds: [1]\nmetric: val/loss\n")
    endings = []
    for size in sizes(400_000)[half::2]:
        flags = [str(tmp_path / "sweep.yaml"), f"--runs={disk(size) / 'runs'}"]
        outcome = forked.run(["sweep", "tests.sweeps.stub_fit"], tmp_path, *flags)
        assert "Traceback" not in outcome.err, outcome.err
        endings.append((outcome.code, len([line for line in outcome.err.splitlines() if line.startswith("error: ")])))
    assert endings[-1] == (0, 0)
    assert (2, 1) in endings


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("eighth", range(8))
def test_compilers_on_temporary_disks_of_forty_sizes(
    small: list[str], disk: Mount, tmp_path: Path, eighth: int
) -> None:
    """A run continues uncompiled if it was not asked to compile."""
    compiled = [*(flag for flag in small if "compile" not in flag), "--trainer.limit_val_batches=0"]
    for size in sizes(8_000_000)[eighth::8]:
        folder = disk(size)
        env = {"TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        outcome = run_interpreter("fit", tmp_path, *compiled, f"--runs={tmp_path / 'runs'}", **env)
        assert ends_well(outcome) == "success"
        assert ("not compiled" in outcome.err) or size > 1_000_000


@pytest.mark.slow
def test_broken_compiler_changes_no_bit(small: list[str], tmp_path: Path) -> None:
    flags = [flag for flag in small if "compile" not in flag]
    broken = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    runs = {name: tmp_path / name for name in ("default", "uncompiled", "required")}
    outcome = run_interpreter("fit", tmp_path, *flags, f"--runs={runs['default']}", **broken)
    assert ends_well(outcome) == "success"
    assert outcome.err.count("not compiled, because the compiler failed") == 1
    plain = run_interpreter("fit", tmp_path, *flags, "--model.compile=false", f"--runs={runs['uncompiled']}")
    assert plain.code == 0, plain.err
    states = [torch.load(next(runs[name].rglob("last.ckpt")), weights_only=True) for name in ("default", "uncompiled")]
    for name, weight in states[0]["state_dict"].items():
        assert torch.equal(weight, states[1]["state_dict"][name]), name
    required = run_interpreter("fit", tmp_path, *flags, "--model.compile=true", f"--runs={runs['required']}", **broken)
    assert required.code == 2
    assert "Traceback" not in required.err
    [error] = [line for line in required.err.splitlines() if line.startswith("error: ")]
    assert "torch.compile failed" in error


@pytest.mark.slow
def test_generation_with_a_broken_compiler_is_one_line(small: list[str], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert forked.run(["fit"], tmp_path, *small, f"--runs={runs}").code == 0
    broken = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    outcome = run_interpreter("generate", tmp_path, f"--runs={runs}", "--prompt=a", "--compile", **broken)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    [error] = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert "torch.compile failed" in error


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "workers"), [(45, 2), (60, 2), (100, 8), (160, 8), (200, 8), (100, 2)])
def test_too_few_open_files_are_one_line(small: list[str], tmp_path: Path, limit: int, workers: int) -> None:
    """The limit lets the run finish, or is named before the workers start."""
    command = [sys.executable, "-m", "lit_gpt_scratch.fit", *small, f"--data.num_workers={workers}"]
    limited = ["bash", "-c", f'ulimit -n {limit}; exec "$@"', "fit", *command, f"--runs={tmp_path}"]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode in (0, 2), done.stderr
    assert "Traceback" not in done.stderr
    if done.returncode == 2:
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert "ulimit -n" in done.stderr
