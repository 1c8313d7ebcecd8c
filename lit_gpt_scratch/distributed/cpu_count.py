"""How many cores this process may use."""

import os
from pathlib import Path

CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
"""The file of the Linux cgroup with "microseconds of processor time, of a period's"."""


def read_cgroup_cpu_quota(quota: Path = CGROUP_CPU_MAX) -> int | None:
    """Cores of a container's quota, at least 1; None without one, or on a system that has no such file."""
    if not quota.is_file():
        return None
    share, _, period = quota.read_text(encoding="ascii").partition(" ")
    return None if share == "max" else max(1, round(int(share) / int(period)))


def count_available_cpus() -> int:
    """Those that the system lets this process run on, or the quota if that is less."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, read_cgroup_cpu_quota() or count)
