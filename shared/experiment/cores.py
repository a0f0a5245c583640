"""How many runs fit on this machine at once: physical cores that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> int:
    """Physical cores in this process's affinity mask, capped by a container's CPU quota; at least 1.

    Two runs on the two threads of one core are no faster than one after the other, so siblings count once.
    """
    if not hasattr(os, "sched_getaffinity"):
        return max(1, os.cpu_count() or 1)
    allowed = os.sched_getaffinity(0)
    cores = {_siblings(cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota() or len(cores)))


def _siblings(cpu: int) -> str:
    try:
        return (CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _quota() -> int | None:
    """CPUs that the cgroup grants, rounded; None without a limit."""
    try:
        granted, period = CGROUP_QUOTA.read_text().split()
        return None if granted == "max" else max(1, round(int(granted) / int(period)))
    except (OSError, ValueError):
        return None
