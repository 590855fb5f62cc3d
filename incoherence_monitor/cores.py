"""How many CPU cores this process may use: its affinity, and the quota of the container it runs in.

Layer 0: imports nothing of ours.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def cores() -> int:
    """Whole cores that this process may keep busy at a time, at least 1."""
    return max(1, math.floor(min(_allowed(), _quota())))


def _allowed() -> int:
    if hasattr(os, "process_cpu_count"):
        # Python 3.13 on: the affinity, or what the user has told the interpreter.
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _quota() -> float:
    """Of this process, read once."""
    return quota(CONTROL_GROUPS, MEMBERSHIP)


def quota(control_groups: Path, membership: Path) -> float:
    """Cores' worth of time that Linux grants the process by its control groups, of either version.

    Args:
        control_groups: where they are mounted.
        membership: the file that names those of the process.

    Returns:
        The least of the quotas of its groups and of those around them; infinite where there is none, or none that can
        be read.
    """
    found = [math.inf]
    for group in _groups(control_groups, membership):
        found.append(_ratio(_words(group / "cpu.max")))
        found.append(_ratio([*_words(group / "cpu.cfs_quota_us"), *_words(group / "cpu.cfs_period_us")]))
    return min(found)


def _groups(control_groups: Path, membership: Path) -> Iterator[Path]:
    """Folders of the process's groups, each with those around it."""
    roots = [(control_groups, "0::"), *((control_groups / name, ":") for name in ("cpu", "cpu,cpuacct"))]
    lines = [line for line in _words(membership) if line.count(":") >= 2]
    for root, start in roots:
        # In a container its own group is mounted as the root, whatever its name outside.
        yield root
        for line in lines:
            _, controllers, name = line.split(":", 2)
            if line.startswith(start) if start == "0::" else "cpu" in controllers.split(","):
                parts = Path(name.lstrip("/")).parts
                yield from (root.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1))


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except (OSError, ValueError):
        return []


def _ratio(words: list[str]) -> float:
    """Time granted over the period it is granted for; infinite where the one is no positive number."""
    try:
        granted, period = (int(word) for word in words)
    except ValueError:  # "max", or not two of them.
        return math.inf
    return granted / period if granted > 0 and period > 0 else math.inf
