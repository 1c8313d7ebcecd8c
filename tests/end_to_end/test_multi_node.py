"""Two machines train the same as one process: two connected network namespaces without a shared disk."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lit_gpt_scratch.checkpoint.compare_checkpoints import compare_curves, read_curves
from lit_gpt_scratch.checkpoint.resume_stress_test import compare_checkpoint_files
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.checkpoint.sharded_checkpoint import MANIFEST
from tests.end_to_end.test_multi_process import fit

PORT = 29511


@dataclass
class Machine:
    """A network namespace, and the working directory of its processes."""

    name: str
    address: str
    interface: str
    folder: Path

    def start(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command in the namespace, with its own home directory."""
        own = {
            "HOME": str(self.folder), "XDG_CACHE_HOME": str(self.folder / "cache"), "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": self.interface, **environment,
        }  # fmt: skip
        with self.errors.open("w") as errors:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                cwd=self.folder,
                env={**os.environ, **own},
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    @property
    def errors(self) -> Path:
        """Standard error of the latest command."""
        return self.folder / "errors.txt"


@pytest.fixture
def machines(corpus: Path, tmp_path: Path) -> Iterator[list[Machine]]:
    """Two machines, each with the texts."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces are made with ip (iproute2)")
    made = [
        Machine(f"lgs{os.getpid()}{side}", f"10.211.0.{side + 1}", f"lgs{side}", tmp_path / f"machine {side}")
        for side in (0, 1)
    ]

    def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ip", *arguments], capture_output=True, text=True)

    try:
        one, other = made
        cable = ["link", "add", one.interface, "netns", one.name, "type", "veth", "peer", other.interface]
        steps = [["netns", "add", machine.name] for machine in made] + [[*cable, "netns", other.name]]
        for machine in made:
            inside = ["-n", machine.name]
            steps.append([*inside, "address", "add", f"{machine.address}/24", "dev", machine.interface])
            steps += [[*inside, "link", "set", name, "up"] for name in ("lo", machine.interface)]
        for step in steps:
            done = ip(*step)
            if done.returncode:
                pytest.skip(f"no network namespaces here: ip {' '.join(step)}: {done.stderr.strip()}")
        for machine in made:
            machine.folder.mkdir()
            shutil.copytree(corpus, machine.folder / "my_texts")
        yield made
    finally:
        for machine in made:
            ip("netns", "delete", machine.name)  # and with it its end of the link


Start = Callable[[Machine, int, list[str]], subprocess.Popen[bytes]]


def torchrun(machine: Machine, rank: int, flags: list[str]) -> subprocess.Popen[bytes]:
    """PyTorch's launcher, on each machine."""
    where = [f"--node-rank={rank}", "--master-addr=10.211.0.1", f"--master-port={PORT}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *where]
    return machine.start(*launcher, "-m", "lit_gpt_scratch.fit", *flags)


def plain(machine: Machine, rank: int, flags: list[str]) -> subprocess.Popen[bytes]:
    """The same command on each machine, and three variables."""
    rendezvous = {"MASTER_ADDR": "10.211.0.1", "MASTER_PORT": str(PORT), "NODE_RANK": str(rank)}
    return machine.start(sys.executable, "-m", "lit_gpt_scratch.fit", *flags, **rendezvous)


def slurm(machine: Machine, rank: int, flags: list[str]) -> subprocess.Popen[bytes]:
    """SLURM's variables of a task in a job of two; address and port are derived from them."""
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job", "SLURM_NODELIST": "10.211.0.[1-2]"}
    sizes = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2"}
    task = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_NODEID": str(rank)}
    return machine.start(sys.executable, "-m", "lit_gpt_scratch.fit", *flags, **job, **sizes, **task)


def together(machines: list[Machine], start: Start, flags: list[str]) -> list[tuple[int, str]]:
    """Exit code and standard error of each."""
    processes = [start(machine, rank, flags) for rank, machine in enumerate(machines)]
    try:
        codes = [process.wait(timeout=120) for process in processes]
        return [(code, machine.errors.read_text()) for code, machine in zip(codes, machines, strict=True)]
    finally:
        for process in processes:
            process.kill()


TWO = ["--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp"]


@pytest.mark.slow
@pytest.mark.parametrize("start", [torchrun, plain, slurm])
def test_two_machines_train_as_one_process(
    machines: list[Machine], small: list[str], tmp_path: Path, start: Start
) -> None:
    """And resume a run of the first machine after its folder is copied to the second."""

    def summary(folder: Path) -> dict[str, float]:
        [run] = (folder / "pretrain").iterdir()
        found: dict[str, float] = json.loads((run / "summary.json").read_text())
        return {name: found[name] for name in ("train/loss", "val/loss", "val/bits_per_byte", "tokens", "step")}

    own = [flag for flag in small if not flag.startswith(("--data.source", "--data.cache"))]
    flags = [*own, "--data.source=my_texts", "--data.batch_size=2", "--data.tokens_per_step=128"]
    alone = summary(fit(tmp_path / "alone", *small, *flags[-2:]).parent.parent)
    for code, stderr in together(machines, start, [*flags, *TWO]):
        assert code == 0, stderr
    assert summary(machines[0].folder / "runs") == pytest.approx(alone, rel=1e-5)
    assert not (machines[1].folder / "runs").exists()
    assert all((machine.folder / "cache").is_dir() for machine in machines)

    again = ["--ckpt_path=last", "--trainer.max_steps=16"]
    shutil.copytree(machines[0].folder / "runs", machines[1].folder / "runs")
    for code, stderr in together(machines, start, again):
        assert code == 0, stderr
    assert summary(machines[0].folder / "runs")["step"] == 16


@pytest.mark.slow
def test_missing_files_are_reported_by_the_machine_that_lacks_them(machines: list[Machine], small: list[str]) -> None:
    """The first machine's run folder, or identical text."""

    def second(flags: list[str]) -> str:
        first, other = (plain(machine, rank, flags) for rank, machine in enumerate(machines))
        try:
            assert other.wait(timeout=120) == 2
            return machines[1].errors.read_text().splitlines()[-1]
        finally:
            first.kill()

    own = [flag for flag in small if not flag.startswith(("--data.source", "--data.cache"))]
    flags = [*own, "--data.source=my_texts", "--trainer.max_steps=2", *TWO]
    (machines[1].folder / "my_texts/00.txt").write_text("Something else.\n")
    assert second(flags).endswith(
        "my_texts on this machine differs from the copy on the machine that runs rank 0; copy it from that machine"
    )
    assert "copy the run folder to every machine, or set --runs to a shared folder" in second(
        [*flags, "--ckpt_path=last"]
    )


def elastic(machine: Machine, restarts: int, processes: int, flags: list[str]) -> subprocess.Popen[bytes]:
    """PyTorch's launcher, which restarts the processes of both machines if one of them fails."""
    rendezvous = [
        "--nnodes=2", f"--nproc-per-node={processes}", f"--max-restarts={restarts}", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=10.211.0.1:{PORT}", "--rdzv-id=run", f"--local-addr={machine.address}",
        f"--rdzv-conf=is_host={int(machine.address == '10.211.0.1')}",  # a namespace does not know its own address
    ]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", *rendezvous]
    # With a shared store, restarted processes read the addresses of the earlier ones, and cannot connect (torch 2.13).
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return machine.start(*launcher, "-m", "lit_gpt_scratch.fit", *flags, **own_store)


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def started(machines: list[Machine], *arguments: Any) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The launchers of both machines; they and their processes are killed at the end."""
    launchers = [elastic(machine, *arguments) for machine in machines]
    try:
        yield launchers
    finally:
        for launcher in launchers:
            for pid in children(launcher.pid) if launcher.poll() is None else ():
                os.kill(pid, signal.SIGKILL)
            launcher.kill()
            launcher.wait()


def number(value: str) -> float:
    """The number in the representation of a logged value."""
    return float(re.search(r"-?\d[\d.e+-]*", value)[0])  # type: ignore[index]


def wait_for_checkpoint(run: RunFolder, launchers: list[subprocess.Popen[bytes]]) -> None:
    """Wait for a complete checkpoint, in one file or sharded."""
    while not (run.last.is_file() or (run.last / MANIFEST).is_file()):
        assert all(launcher.poll() is None for launcher in launchers)
        time.sleep(0.05)


RESTARTED = {
    "ddp": (1, ["--trainer.strategy=ddp"]),
    "fsdp2, sharded": (1, ["--trainer.strategy=fsdp2", "--checkpoint.format=sharded", "--checkpoint.background=true"]),
    "hsdp, sharded": (2, ["--trainer.strategy=hsdp", "--checkpoint.format=sharded"]),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", RESTARTED)
def test_run_is_restarted_after_a_process_was_killed(
    machines: list[Machine], small: list[str], tmp_path: Path, layout: str
) -> None:
    """The same bits as without a kill, and about the same curve as on one machine."""
    processes, layout_flags = RESTARTED[layout]
    rows = ["--data.batch_size=1", "--data.tokens_per_step=128", "--trainer.max_steps=40", "--model.optimizer=AdamW"]
    own = [*small, *rows, "--trainer.log_every_n_steps=1", "--checkpoint.every_n_steps=10"]
    flags = [*own, *layout_flags, "--trainer.num_nodes=2", f"--trainer.devices={processes}", "--ckpt_path=auto"]
    runs = []
    for name in ("undisturbed", "restarted"):
        run = RunFolder(tmp_path / name / "pretrain" / "version_0")
        with started(machines, 3, processes, [*flags, f"--runs={tmp_path / name}"]) as launchers:
            if name == "restarted":
                wait_for_checkpoint(run, launchers)
                os.kill(children(launchers[1].pid)[0], signal.SIGKILL)
            for launcher, machine in zip(launchers, machines, strict=True):
                assert launcher.wait(timeout=300) == 0, machine.errors.read_text()
        runs.append(run)
    assert not list(tmp_path.glob("restarted/pretrain/version_1"))
    undisturbed, restarted = runs
    assert len(json.loads((restarted.path / "provenance.json").read_text())["sessions"]) == 2
    assert compare_checkpoint_files(undisturbed, restarted) == {}
    assert compare_curves(undisturbed.path, restarted.path) == {}
    alone = fit(tmp_path / "alone", *own).parent.parent / "pretrain" / "version_0"
    losses, expected = (dict(read_curves(path)["train/loss"]) for path in (restarted.path, alone))
    assert len(losses) == 40
    for step, value in losses.items():
        assert number(value) == pytest.approx(number(expected[step]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", RESTARTED)
def test_run_ends_if_a_process_of_one_machine_is_stopped(
    machines: list[Machine], small: list[str], tmp_path: Path, layout: str
) -> None:
    """Within the timeout, with one message on each machine, which names the rank."""
    processes, flags = RESTARTED[layout]
    rows = ["--data.batch_size=1", "--data.tokens_per_step=128", "--trainer.max_steps=1000000"]
    several = ["--trainer.num_nodes=2", f"--trainer.devices={processes}", "--collective_timeout=0:00:20"]
    run = RunFolder(tmp_path / "runs" / "pretrain" / "version_0")
    with started(machines, 0, processes, [*small, *rows, *flags, *several, f"--runs={tmp_path / 'runs'}"]) as launchers:
        wait_for_checkpoint(run, launchers)
        os.kill(children(launchers[1].pid)[-1], signal.SIGSTOP)
        sent = time.monotonic()
        assert all(launcher.wait(timeout=120) == 1 for launcher in launchers)  # of torchrun
        assert time.monotonic() - sent < 90
    rank = 2 * processes - 1
    [error] = [line for line in machines[0].errors.read_text().splitlines() if line.startswith("error: ")]
    assert re.match(rf"error: rank \d: rank {rank} exited or stopped responding", error)
    assert "timeout 0:00:20" in error
    assert (run.path / "flight_record" / "rank_0.json").is_file()
