"""Number of CPU cores available to this process. Imports no torch, for processes that only start others."""

import os
from pathlib import Path

CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
"""CPU limit of the Linux cgroup: microseconds of CPU time per period, and the length of a period."""


def read_cgroup_cpu_quota(quota: Path = CGROUP_CPU_MAX) -> int | None:
    """CPU quota of a container in cores, at least 1; None without a quota, or on a system without cgroups."""
    if not quota.is_file():
        return None
    limit, _, period = quota.read_text(encoding="ascii").partition(" ")
    return None if limit == "max" else max(1, round(int(limit) / int(period)))


def count_available_cpus() -> int:
    """Cores in this process's affinity mask, or the quota if that is lower."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, read_cgroup_cpu_quota() or count)
