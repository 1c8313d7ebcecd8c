"""Two sweeps without a shared disk on one PostgreSQL study; one of them is killed."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from tests.sweeps.conftest import read_pids, read_rows

BINARIES = os.pathsep.join([os.environ.get("PATH", ""), *map(str, Path("/usr/lib/postgresql").glob("*/bin"))])
INITDB, PG_CTL = (shutil.which(name, path=BINARIES) for name in ("initdb", "pg_ctl"))
NOT_ROOT = {"user": "nobody"} if os.geteuid() == 0 else {}  # the server does not run as root


@pytest.fixture
def database() -> Iterator[str]:
    """URL of a temporary server."""
    with tempfile.TemporaryDirectory(prefix="pg") as name, socket.socket() as free:
        if NOT_ROOT:
            shutil.chown(name, "nobody")
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        data = Path(name, "data")

        def run(*command: str) -> None:
            subprocess.run(command, check=True, cwd=name, stdout=subprocess.DEVNULL, **NOT_ROOT)

        run(str(INITDB), "-D", str(data), "-U", "sweep", "--auth=trust", "--no-sync")
        options = f"-p {port} -k {name} -c listen_addresses=127.0.0.1"
        run(str(PG_CTL), "-D", str(data), "-o", options, "-l", str(Path(name, "log")), "-w", "start")
        try:
            yield f"postgresql://sweep@127.0.0.1:{port}/postgres"
        finally:
            run(str(PG_CTL), "-D", str(data), "-m", "immediate", "-w", "stop")


@pytest.mark.slow
@pytest.mark.skipif(not (INITDB and PG_CTL), reason="PostgreSQL's server is not installed")
def test_two_machines_share_a_study(
    tmp_path: Path, database: str, sweep_process: Callable[..., "subprocess.Popen[str]"]
) -> None:
    (tmp_path / "s.yaml").write_text("fixed: {seconds: 0.5}\nvary: {x: [1, 2, 3], kind: [a, b]}\nseeds: [1, 2]\n")
    first, second = (sweep_process("s.yaml", "--storage", database, "--runs", runs) for runs in ("one", "two"))
    while len(read_pids(tmp_path / "two", "s")) < 3:
        assert second.poll() is None, second.communicate()[1]
        time.sleep(0.02)
    second.kill()
    second.communicate()
    _, output = first.communicate()
    assert first.returncode == 0, output
    again = sweep_process("s.yaml", "--storage", database, "--runs", "two")
    _, output = again.communicate()
    assert again.returncode == 0, output
    assert read_rows(tmp_path / "one", "s") == read_rows(tmp_path / "two", "s")
    assert len(read_rows(tmp_path / "one", "s")) == 12
    started = [read_pids(tmp_path / name, "s") for name in ("one", "two")]
    twice = started[0].keys() & started[1].keys()
    assert len(twice) <= 1  # the killed run
    assert len(started[0].keys() | started[1].keys()) == 12
    assert all(len(pids) == 1 for each in started for pids in each.values())
