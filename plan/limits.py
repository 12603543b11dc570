"""Limits of the operating system on this process: cores of its control group, and where its bytes go."""

from __future__ import annotations

import math
import os
from pathlib import Path

from ..checkpoint.control_group import GROUPS, MEMBERSHIP, group_folders, number_in, text_of


def cgroup_cores(root: Path = GROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """Cores that the tightest CPU quota allows, may be fractional; None without a quota."""
    cores: list[float] = []
    for folder in group_folders(root, membership, "cpu"):
        text = text_of(folder / "cpu.max")
        if text is not None:
            quota, _, period = text.partition(" ")
            if quota != "max":
                cores.append(int(quota) / int(period or 100_000))
            continue
        quota_v1, period_v1 = number_in(folder / "cpu.cfs_quota_us"), number_in(folder / "cpu.cfs_period_us")
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
