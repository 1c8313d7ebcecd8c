"""Count the CPU cores available to this process, without importing torch, for processes that only launch others."""

import os
from pathlib import Path

CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
"""File with the CPU limit of the Linux cgroup: CPU time per period and period length, both in microseconds."""


def read_cgroup_cpu_quota(quota: Path = CGROUP_CPU_MAX) -> int | None:
    """Return the container's CPU quota in cores, at least 1, or None if there is no quota or no cgroup support."""
    if not quota.is_file():
        return None
    limit, _, period = quota.read_text(encoding="ascii").partition(" ")
    return None if limit == "max" else max(1, round(int(limit) / int(period)))


def count_available_cpus() -> int:
    """Return the number of cores in this process's affinity mask, or the CPU quota if that is lower."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, read_cgroup_cpu_quota() or count)
