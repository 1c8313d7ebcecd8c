"""Measure the effect of hardware-dependent defaults on the step time, by changing them in the default run.

    python experiments/benchmarks/defaults.py

The step time is measured by `fit --plan`. The settings alternate, so that other load on the machine affects all
settings equally.
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys

CHOICES: dict[str, tuple[list[str], dict[str, str]]] = {
    "the default": ([], {}),
    "float32": (["--trainer.precision=32-true"], {}),
    "not compiled": (["--model.compile=false"], {}),
    "float32, not compiled": (["--trainer.precision=32-true", "--model.compile=false"], {}),
    "half of the threads": ([], {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))}),
    "2 loader processes": (["--data.num_workers=2"], {}),
    "documents masked": (["--data.document_mask=true"], {}),
    "best-fit, documents masked": (["--data.packing=best_fit", "--data.document_mask=true"], {}),
}
"""Flags and environment variables of each setting."""


def milliseconds(flags: list[str], environment: dict[str, str]) -> float:
    """Return the median step time in milliseconds, as measured by `fit --plan`."""
    outcome = subprocess.run(
        [sys.executable, "-m", "lit_gpt_scratch.fit", "--plan", "--trainer.accelerator=cpu", *flags],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"(\d+) ms (?:a|per) step", outcome.stdout + outcome.stderr)
    if found is None:
        sys.exit(f"no measured step in:\n{outcome.stdout}{outcome.stderr}")
    return float(found[1])


def main() -> None:
    """Measure all settings alternately and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in CHOICES}
    for _ in range(given.turns):
        for name, (flags, environment) in CHOICES.items():
            times[name].append(milliseconds(flags, environment))
    default = statistics.median(times["the default"])
    print(
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores; milliseconds per step, {given.turns} turns"
    )
    for name, values in times.items():
        median = statistics.median(values)
        print(
            f"{name:26} {median:6.0f} ({min(values):.0f} to {max(values):.0f})   {median / default:.2f} x the default"
        )


if __name__ == "__main__":
    main()
