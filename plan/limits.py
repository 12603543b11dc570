"""Limits of the operating system on this process: memory and cores of its control group, both versions."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Version 1 writes "no limit" as the largest multiple of the page size below 2**63.
_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class GroupMemory:
    """A control group's memory limit and what it already uses, page cache that can be dropped not counted."""

    limit: int
    used: int


def cgroup_memory(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> GroupMemory | None:
    """The tightest memory limit from this process's group up to the root; None without one."""
    tightest: GroupMemory | None = None
    for folder in _folders(root, membership, "memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        if limit is None or limit >= _UNLIMITED:
            continue
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        used = max(0, used - _droppable(folder))
        if tightest is None or limit - used < tightest.limit - tightest.used:
            tightest = GroupMemory(limit, used)
    return tightest


def cgroup_cores(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> float | None:
    """Cores that the tightest CPU quota allows, may be fractional; None without a quota."""
    cores: list[float] = []
    for folder in _folders(root, membership, "cpu"):
        text = _text(folder / "cpu.max")
        if text is not None:
            quota, _, period = text.partition(" ")
            if quota != "max":
                cores.append(int(quota) / int(period or 100_000))
            continue
        quota_v1, period_v1 = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota_v1 is not None and quota_v1 > 0 and period_v1:
            cores.append(quota_v1 / period_v1)
    return min(cores, default=None)


def usable_cores(quota: float | None) -> int:
    """Cores this process may use: its affinity mask, bounded by the quota rounded up."""
    has_mask = hasattr(os, "sched_getaffinity")
    allowed = len(os.sched_getaffinity(0)) if has_mask else os.cpu_count() or 1
    return max(1, allowed if quota is None else min(allowed, math.ceil(quota)))


def existing_parent(path: Path) -> Path:
    """`path` itself or its nearest parent that exists as a folder: where its bytes will go."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _folders(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """Folders from the process's own group to the root, for version 2 and for version 1's `controller`."""
    for line in (_text(membership) or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base = root
        elif controller in controllers.split(","):
            base = root / controller
        else:
            continue
        # Inside a container the path named here may not exist below the mount: its root then is our group.
        parts = [part for part in group.split("/") if part and part != ".."]
        for depth in range(len(parts), -1, -1):
            yield base.joinpath(*parts[:depth])


def _droppable(folder: Path) -> int:
    for line in (_text(folder / "memory.stat") or "").splitlines():
        key, _, value = line.partition(" ")
        if key in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text is not None and text.lstrip("-").isdigit() else None
