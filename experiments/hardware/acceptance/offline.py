"""Run the acceptance on a machine that reaches no package registry.

    python experiments/hardware/acceptance/offline.py pack      # where there is a registry: download the wheels
    python experiments/hardware/acceptance/offline.py run       # on the GPU machine, in a copy of this repository

`pack` downloads the wheels of `requirements.txt` for Python 3.12 on Linux, without what they depend on, so that PyTorch
is neither downloaded nor replaced. `run` installs them into a folder of its own and runs the acceptance. The time limit
includes the installation and the start of the interpreter. It needs only Python's standard library.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

BEGAN = time.monotonic()
stage_began = [BEGAN]
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
WHEELS, SITE = HERE / "wheels", HERE / "site"
MAX_MEGABYTES = 60
PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 17)] + [
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]
NEVER = ("torch-", "nvidia_", "triton-", "lightning-")
"""First characters of wheels that must not shadow the libraries of the machine."""
MARGIN_SECONDS = 20
"""Part of the time limit in which the command ends after its last row."""
CHECK = """
import importlib, torch
names = ["lit_gpt_scratch.acceptance.rows", "lit_gpt_scratch.cli.fit", "lit_gpt_scratch.data", "datasets", "tiktoken"]
for name in names:
    importlib.import_module(name)
print(f"torch {torch.__version__} in {torch.__path__[0]}, CUDA {torch.cuda.is_available()}")
"""


def pack() -> None:
    """Download the wheels, and check that they are small and do not contain PyTorch."""
    for old in WHEELS.glob("*.whl"):  # pip does not install two versions of a library
        old.unlink()
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
        *(f"--python-version={PYTHON}", "--implementation=cp", *platforms),
        *(f"--requirement={HERE / 'requirements.txt'}", f"--dest={WHEELS}"),
    ]
    subprocess.run(command, check=True)
    wheels = require_wheels()
    megabytes = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{len(wheels)} wheels, {megabytes:.1f} MB, in {WHEELS.relative_to(ROOT)}")
    if megabytes > MAX_MEGABYTES:
        sys.exit(f"error: the wheels have more than {MAX_MEGABYTES} MB; shorten requirements.txt")


def require_wheels() -> list[Path]:
    """Return the wheels; exit with an error if there are none, or if one would shadow a library of the machine."""
    wheels = sorted(WHEELS.glob("*.whl"))
    if not wheels:
        sys.exit("error: no wheels; run 'offline.py pack' where there is a package registry, and copy the folder")
    if wrong := [wheel.name for wheel in wheels if wheel.name.lower().startswith(NEVER)]:
        sys.exit(f"error: {wrong[0]} would shadow the library of this machine; delete it from {WHEELS}")
    return wheels


def run(minutes: float, out: Path, text: Path | None, rows: list[str]) -> int:
    """Install the wheels into ``SITE``, check the imports, and run the acceptance; return its exit code."""
    report_stage("start")
    install = [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade"),
        *("--disable-pip-version-check", "--root-user-action=ignore", f"--target={SITE}"),
    ]
    subprocess.run([*install, *map(str, require_wheels())], check=True)
    report_stage("installation")
    path = os.pathsep.join([str(ROOT), str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    check = subprocess.run([sys.executable, "-c", CHECK], env=environment, cwd=ROOT, capture_output=True, text=True)
    if check.returncode:
        reason = check.stderr.strip().splitlines()[-1]
        print(f"error: {reason}; add the library to requirements.txt, and run 'offline.py pack' again", file=sys.stderr)
        return 2
    print(check.stdout.strip(), flush=True)
    report_stage("imports")
    left = minutes - (time.monotonic() - BEGAN + MARGIN_SECONDS) / 60
    if left <= 0:
        print("error: no time is left after the installation; raise --minutes", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "lit_gpt_scratch.doctor", "--acceptance", f"--minutes={left:.3f}", f"--out={out}"]
    command += [f"--text={text}"] if text else []
    command += ["--rows", *rows] if rows else []
    code = subprocess.run(command, env=environment, cwd=ROOT).returncode
    report_stage("acceptance")
    return code


def report_stage(name: str) -> None:
    """Print the duration of the stage that has ended."""
    now = time.monotonic()
    print(f"{name}: {now - stage_began[-1]:.1f} s, {now - BEGAN:.1f} s in total", flush=True)
    stage_began.append(now)


def main() -> None:
    """Parse the arguments, and download or run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("pack", help="download the wheels")
    running = commands.add_parser("run", help="install the wheels and run the acceptance")
    running.add_argument("--minutes", type=float, default=10.0, help="time limit, with installation and start")
    running.add_argument("--out", type=Path, default=HERE / "results", help="folder for the reports")
    running.add_argument("--text", type=Path, help="the text of tiny Shakespeare")
    running.add_argument("--rows", nargs="+", default=[], metavar="PATTERN", help="rows to measure, see doctor --help")
    given = parser.parse_args()
    if given.command == "pack":
        pack()
    else:
        text = None if given.text is None else given.text.resolve()
        sys.exit(run(given.minutes, given.out.resolve(), text, given.rows))


if __name__ == "__main__":
    main()
