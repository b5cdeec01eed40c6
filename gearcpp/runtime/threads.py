"""How many threads: llama.cpp's wait for each other by spinning, so more of them than processors cost a factor, not a percentage."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_cpus(cgroups: Path = _CGROUPS) -> int:
    """Processors that this process may use at once: those of its CPU set, and no more than its quota pays for (`docker run --cpus`)."""
    n_cpu = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(n_cpu, _quota(cgroups) or n_cpu))


def usable_cores(cgroups: Path = _CGROUPS) -> int:
    """Physical cores among them: hyper-threads do not help a memory-bound decode."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in cpus:
        siblings = _TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list"
        cores.add(siblings.read_text().strip() if siblings.is_file() else str(cpu))
    return min(len(cores), usable_cpus(cgroups))


def llama_threads(n_threads: int | None, n_threads_batch: int | None, n_cpu: int | None = None, usable: int | None = None) -> tuple[int, int]:
    """Threads for generation and for prompts: those asked for, else llama_cpp.Llama's choice as far as this process has processors.

    Where only ``n_threads`` was asked for, prompts take as many, as in llama.cpp's programs; llama_cpp.Llama gives them every processor of the machine.

    Args:
        n_threads, n_threads_batch: what was asked for; None or 0: nothing.
        n_cpu, usable: processors of the machine, and of the process; None: as they are.
    """
    n_cpu, usable = n_cpu or os.cpu_count() or 1, usable or usable_cpus()
    return n_threads or min(max(n_cpu // 2, 1), usable), n_threads_batch or n_threads or min(n_cpu, usable)


def _quota(cgroups: Path) -> int | None:
    """Processors that the control group's quota pays for, rounded up; None: it has none, or cannot be read."""
    limits = [limit for folder in _groups(cgroups) if (limit := _limit(folder)) is not None]
    return max(1, -int(-min(limits) // 1)) if limits else None


def _groups(cgroups: Path) -> list[Path]:
    """The folders whose limits hold: inside a container the root; outside, the process's own group and those above it."""
    own = _own_group()
    folders = [cgroups, cgroups / "cpu"]  # cgroup v2, and v1's controller
    for root in tuple(folders):
        folder = root
        for part in own:
            folder = folder / part
            folders.append(folder)
    return folders


def _own_group() -> tuple[str, ...]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return ()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            return Path(path).parts[1:]
    return ()


def _limit(folder: Path) -> float | None:
    try:
        if (v2 := folder / "cpu.max").is_file():
            quota, period = v2.read_text().split()
            return None if quota == "max" else int(quota) / int(period)
        quota_us = int((folder / "cpu.cfs_quota_us").read_text())
        return None if quota_us <= 0 else quota_us / int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError, ZeroDivisionError):
        return None
